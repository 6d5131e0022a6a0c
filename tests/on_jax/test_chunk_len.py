"""`chunk_len` of ChunkedCrossEntropy on JAX: it bounds the logits, and does not change results; and `compile`."""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loss_core import BackendUnavailable, ChunkedCEConfig
from loss_core_jax import ChunkedCrossEntropy, FusedLinearCrossEntropy
from loss_core_jax.kernels.xla.chunks import ACCELERATOR, CPU, plan_for

# H = 4 so that neither the weight's gradient nor the hidden states are larger than a few rows of logits.
T, V, H, CHUNK = 60, 300, 4, 8
RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(T, H)), jnp.float32)
WEIGHT = jnp.asarray(RNG.normal(size=(V, H)), jnp.float32)
LABELS = RNG.integers(0, V, T)
LABELS[::3] = -100


def gradients(loss: Any) -> Any:
    return jax.value_and_grad(lambda h, w: loss(h, LABELS, w).sum(), (0, 1))


def largest_array(fn: Any) -> int:
    """Elements of the largest array in the program of a function."""
    text = jax.jit(fn).lower(HIDDEN, WEIGHT).as_text()
    return max(math.prod(map(int, shape.split("x")[:-1])) for shape in re.findall(r"tensor<([0-9x]+x)[a-z]", text))


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_at_most_chunk_len_rows_of_logits_exist(reduction: str) -> None:
    for fn in (gradients, lambda loss: lambda h, w: loss(h, LABELS, w)):
        assert largest_array(fn(ChunkedCrossEntropy(CHUNK, reduction=reduction))) <= CHUNK * V
        # Otherwise the line above would hold for any chunk_len.
        assert largest_array(fn(FusedLinearCrossEntropy(reduction=reduction))) >= T * V


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunk_len", [1, 7, 10**9])
def test_results_do_not_depend_on_chunk_len(chunk_len: int, reduction: str) -> None:
    value, grads = gradients(ChunkedCrossEntropy(chunk_len, reduction=reduction))(HIDDEN, WEIGHT)
    expected, expected_grads = gradients(FusedLinearCrossEntropy(reduction=reduction))(HIDDEN, WEIGHT)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for got, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("partitioned", [False, True])
@pytest.mark.parametrize("sizes", [CPU, ACCELERATOR], ids=["cpu", "accelerator"])
def test_plans_respect_chunk_len(sizes: Any, partitioned: bool) -> None:
    for num_rows, vocab, max_rows in ((1, 7, 512), (37, 1, 1), (4096, 50257, 3), (4096, 128, 4095)):
        weight: Any = jax.ShapeDtypeStruct((vocab, 64), "float32")
        limits: Any = {"partitioned": partitioned, "block_rows": max_rows}
        plan = plan_for(num_rows, weight, jnp.dtype("float32"), sizes, **limits)
        assert plan.chunk <= max_rows
        assert plan.num_chunks * plan.chunk >= num_rows


def test_compile_must_be_true() -> None:
    refusal = r"got compile=False: XLA compiles whatever JAX runs\. Use compile=True, or backend='torch:eager'"
    with pytest.raises(BackendUnavailable, match=refusal):
        ChunkedCEConfig(compile=False).build(backend="jax")
    with pytest.raises(BackendUnavailable, match=refusal):
        ChunkedCrossEntropy(compile=False)


def test_losses_with_different_chunk_len_are_not_equal() -> None:
    assert ChunkedCrossEntropy(8) == ChunkedCrossEntropy(8)
    assert len({ChunkedCrossEntropy(8), ChunkedCrossEntropy(9), ChunkedCrossEntropy()}) == 3
