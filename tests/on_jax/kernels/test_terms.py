"""Kernels called directly: optional terms and coefficients, which no loss may use yet."""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loss_core.row_terms import Coefficients, Sums, entropy
from loss_core_jax.inputs import IGNORED
from loss_core_jax.kernels import LinearRows, RowOptions, Rows, Shard
from loss_core_jax.kernels.xla import CPU, XlaKernels

T, V, H = 13, 37, 5
SIZES = CPU._replace(logits_bytes=0, row_bytes=0, pair_bytes=0, chunk=(4, 4), tile=16)
KERNELS = XlaKernels(cpu=SIZES, accelerator=SIZES)
RNG = np.random.default_rng(0)
TARGET = RNG.integers(0, 30, T).astype(np.int32)
TARGET[::4] = IGNORED
VALID = TARGET != IGNORED
ALL_SUMS = Sums(z_sum=True, e=True)


def _entropy(z: np.ndarray) -> np.ndarray:
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    return -(p * np.log(p)).sum(-1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("partitioned", [False, True])
@pytest.mark.parametrize("num_classes", [None, 30])
def test_optional_sums_of_rows(num_classes: int | None, partitioned: bool, dtype: str) -> None:
    logits = RNG.normal(size=(T, V))
    if num_classes is not None:
        logits[:, num_classes:] = -np.inf
    logits[0] = np.nan  # ignored
    rounded = jnp.asarray(logits, dtype)
    rows = Rows(rounded, jnp.asarray(TARGET), None if num_classes is None else jnp.asarray(num_classes))
    terms = KERNELS.row_terms(rows, RowOptions(ALL_SUMS, shard=Shard(partitioned=partitioned)))
    z = np.asarray(rounded, "float64")[VALID, :num_classes]
    assert terms.z_sum is not None
    np.testing.assert_allclose(terms.z_sum[VALID], z.sum(-1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropy(jnp, terms)[VALID], _entropy(z), rtol=1e-5)
    np.testing.assert_allclose((terms.m + jnp.log(terms.s))[VALID], np.log(np.exp(z).sum(-1)), rtol=1e-5)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(terms))


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("num_classes", [None, 30])
def test_optional_sums_of_linear_rows(num_classes: int | None, softcap: float) -> None:
    hidden, weight = RNG.normal(size=(T, H)), RNG.normal(size=(V, H))
    count = None if num_classes is None else jnp.asarray(num_classes)
    rows = LinearRows(jnp.asarray(hidden, "float32"), jnp.asarray(weight, "float32"), jnp.asarray(TARGET), count)
    terms = KERNELS.linear_terms(rows, RowOptions(ALL_SUMS, softcap))
    z = (hidden @ weight.T)[VALID, :num_classes]
    z = softcap * np.tanh(z / softcap) if softcap else z
    assert terms.z_sum is not None
    np.testing.assert_allclose(terms.z_sum[VALID], z.sum(-1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(entropy(jnp, terms)[VALID], _entropy(z), rtol=1e-4)


def test_a_uniform_coefficient_is_subtracted_from_every_column() -> None:
    logits = jnp.asarray(RNG.normal(size=(T, V)), "float32")
    rows = Rows(logits, jnp.asarray(TARGET))
    terms = KERNELS.row_terms(rows, RowOptions())
    scale, target, uniform = RNG.normal(size=(3, T)).astype("float32")
    coefficients = Coefficients(*map(jnp.asarray, (scale, target, uniform)))
    gradient = KERNELS.row_gradient(rows, terms, coefficients, RowOptions())
    expected = np.exp(np.asarray(logits) - np.asarray(terms.m)[:, None]) * scale[:, None] - uniform[:, None]
    expected[np.arange(T), TARGET] = target
    np.testing.assert_allclose(gradient[VALID], expected[VALID], rtol=1e-5, atol=1e-6)
    assert (gradient[~VALID] == 0).all()
