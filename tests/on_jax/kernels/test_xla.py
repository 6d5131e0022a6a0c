"""How `jax:xla` cuts calls up, and what it makes of platforms and dtypes."""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loss_core_jax import FusedLinearCrossEntropy
from loss_core_jax.kernels.xla import CPU, XlaKernels
from loss_core_jax.kernels.xla.chunks import plan_for, widened_on_cpu

T, V, H = 37, 507, 16
IGNORE = -100


def products(kernels: XlaKernels, platform: str = "cpu") -> list[str]:
    """The products of a forward with bfloat16 hidden states, as the program for that platform has them."""
    shapes = (jax.ShapeDtypeStruct((T, H), jnp.bfloat16), jax.ShapeDtypeStruct((V, H), jnp.bfloat16))
    labels = jnp.arange(T)
    traced = jax.jit(lambda h, w: FusedLinearCrossEntropy(kernels=kernels)(h, labels, w)).trace(*shapes)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    return [line for line in text.splitlines() if "dot_general" in line]


@pytest.mark.parametrize("units", [True, False])
def test_the_first_product_of_bfloat16_goes_to_the_units_that_a_cpu_has(units: bool) -> None:
    widened = ("float16",) if units else ("float16", "bfloat16")
    found = products(XlaKernels(cpu=CPU._replace(widened=widened)))
    assert found
    assert all(("xbf16" in line) == units and "xf32>" in line for line in found), found


def test_sizes_are_those_of_the_platform_that_the_program_is_compiled_for() -> None:
    kernels = XlaKernels(cpu=CPU._replace(widened=("bfloat16",)))
    assert all("xbf16" not in line for line in products(kernels, "cpu"))
    assert all("xbf16" in line for line in products(kernels, "cuda"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fma avx512_bf16 sse", ("float16",)),
        ("amx_bf16", ("float16",)),
        ("fma avx512f", ("bfloat16", "float16")),
    ],
)
def test_which_cpu_has_units_for_bfloat16(flags: str, expected: tuple[str, ...], tmp_path: Any) -> None:
    listed = tmp_path / "cpuinfo"
    listed.write_text(f"processor : 0\nflags : {flags}\n\nprocessor : 1\nflags : avx512_bf16\n")
    assert widened_on_cpu(listed) == expected
    assert widened_on_cpu(tmp_path / "none") == ("bfloat16", "float16")


@pytest.mark.parametrize("vocab", [1, 31, 32000, 50257, 128256])
@pytest.mark.parametrize("num_rows", [1, 37, 4096])
def test_chunks_and_tiles_cover_the_call_with_little_to_spare(num_rows: int, vocab: int) -> None:
    weight = jax.ShapeDtypeStruct((vocab, 512), "float32")
    plan = plan_for(num_rows, weight, jnp.dtype("float32"), CPU, partitioned=False)  # type: ignore[arg-type]
    assert num_rows <= plan.num_chunks * plan.chunk < num_rows + plan.num_chunks
    assert 1 <= plan.tile <= min(vocab, CPU.tile)
    assert plan.chunk * vocab * 4 <= max(CPU.logits_bytes, CPU.chunk[1] * vocab * 4)


@pytest.mark.parametrize("skip", [None, False])
def test_chunks_of_ignored_tokens_are_left_out_under_jit(skip: bool | None) -> None:
    num_tokens, counted = 90, 20  # six chunks, of which two hold the tokens that are valid
    sizes = CPU._replace(logits_bytes=0, chunk=(16, 16), tile=128)
    rng = np.random.default_rng(3)
    hidden = jnp.asarray(rng.normal(size=(num_tokens, H)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(V, H)), jnp.float32)
    places = rng.permutation(num_tokens)[:counted]
    labels = np.full(num_tokens, IGNORE)
    labels[places] = rng.integers(0, V, counted)
    # What nobody needs may be anything.
    hidden = hidden.at[np.setdiff1d(np.arange(num_tokens), places)].set(jnp.nan)
    loss = FusedLinearCrossEntropy(skip_ignored=skip, kernels=XlaKernels(cpu=sizes))
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 2)))
    program = run.lower(hidden, jnp.asarray(labels), weight).compile().as_text()
    # A branch without products, for the chunks behind the valid tokens.
    assert (" conditional(" in program) == (skip is None)
    value, grads = run(hidden, jnp.asarray(labels), weight)
    alone = jax.value_and_grad(FusedLinearCrossEntropy(), argnums=(0, 2))
    expected, expected_grads = alone(hidden[places], jnp.asarray(labels[places]), weight)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grads[0][places], expected_grads[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads[1], expected_grads[1], rtol=1e-5, atol=1e-5)
    assert jnp.count_nonzero(grads[0]) == jnp.count_nonzero(grads[0][places])
