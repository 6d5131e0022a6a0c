"""Chunks and tiles of `jax:xla`, and its handling of platforms and dtypes."""

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
    """The products of a forward with bfloat16 hidden states in the program for a platform."""
    shapes = (jax.ShapeDtypeStruct((T, H), jnp.bfloat16), jax.ShapeDtypeStruct((V, H), jnp.bfloat16))
    labels = jnp.arange(T)
    traced = jax.jit(lambda h, w: FusedLinearCrossEntropy(kernels=kernels)(h, labels, w)).trace(*shapes)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    return [line for line in text.splitlines() if "dot_general" in line]


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_bfloat16_products_are_computed_in_float32_on_a_cpu_without_instructions(has_bfloat16: bool) -> None:
    widened = ("float16",) if has_bfloat16 else ("float16", "bfloat16")
    found = products(XlaKernels(cpu=CPU._replace(widened=widened)))
    assert found
    assert all(("xbf16" in line) == has_bfloat16 and "xf32>" in line for line in found), found


def test_sizes_are_those_of_the_platform_of_the_program() -> None:
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
def test_bfloat16_instructions_are_read_from_cpuinfo(flags: str, expected: tuple[str, ...], tmp_path: Any) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nflags : {flags}\n\nprocessor : 1\nflags : avx512_bf16\n")
    assert widened_on_cpu(cpuinfo) == expected
    assert widened_on_cpu(tmp_path / "none") == ("bfloat16", "float16")


@pytest.mark.parametrize("vocab", [1, 31, 32000, 50257, 128256])
@pytest.mark.parametrize("num_rows", [1, 37, 4096])
def test_chunks_and_tiles_cover_the_call_with_little_padding(num_rows: int, vocab: int) -> None:
    weight = jax.ShapeDtypeStruct((vocab, 512), "float32")
    plan = plan_for(num_rows, weight, jnp.dtype("float32"), CPU, partitioned=False)  # type: ignore[arg-type]
    assert num_rows <= plan.num_chunks * plan.chunk < num_rows + plan.num_chunks
    assert 1 <= plan.tile <= min(vocab, CPU.tile)
    assert plan.chunk * vocab * 4 <= max(CPU.logits_bytes, CPU.chunk[1] * vocab * 4)


@pytest.mark.parametrize("skip", [None, False])
def test_chunks_of_ignored_tokens_are_skipped_under_jit(skip: bool | None) -> None:
    num_tokens, num_valid = 90, 20  # six chunks, two of them with valid tokens
    sizes = CPU._replace(logits_bytes=0, chunk=(16, 16), tile=128)
    rng = np.random.default_rng(3)
    hidden = jnp.asarray(rng.normal(size=(num_tokens, H)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(V, H)), jnp.float32)
    valid = rng.permutation(num_tokens)[:num_valid]
    labels = np.full(num_tokens, IGNORE)
    labels[valid] = rng.integers(0, V, num_valid)
    # Ignored tokens may be anything.
    hidden = hidden.at[np.setdiff1d(np.arange(num_tokens), valid)].set(jnp.nan)
    loss = FusedLinearCrossEntropy(skip_ignored=skip, kernels=XlaKernels(cpu=sizes))
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 2)))
    program = run.lower(hidden, jnp.asarray(labels), weight).compile().as_text()
    # A branch without products, for the chunks after the valid tokens.
    assert (" conditional(" in program) == (skip is None)
    value, grads = run(hidden, jnp.asarray(labels), weight)
    valid_alone = jax.value_and_grad(FusedLinearCrossEntropy(), argnums=(0, 2))
    expected, expected_grads = valid_alone(hidden[valid], jnp.asarray(labels[valid]), weight)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grads[0][valid], expected_grads[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads[1], expected_grads[1], rtol=1e-5, atol=1e-5)
    assert jnp.count_nonzero(grads[0]) == jnp.count_nonzero(grads[0][valid])
