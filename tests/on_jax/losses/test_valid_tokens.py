"""Ignored tokens skipped in the fused loss's products: by a count on the host, or by the caller's num_valid_tokens."""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loss_core_jax import FusedLinearCrossEntropy
from loss_core_jax.kernels.xla import XlaKernels
from loss_core_jax.losses import valid_tokens

T, V, H = 12, 11, 5
NUM_VALID = 8
SIZES: list[int] = []  # rows of each call of a kernel


@dataclass(frozen=True)
class RecordingKernels(XlaKernels):
    """`jax:xla`, recording the number of rows of each call."""

    def linear_terms(self, rows: Any, linear: Any) -> Any:
        SIZES.append(rows.target.size)
        return super().linear_terms(rows, linear)

    def linear_gradients(self, rows: Any, *more: Any) -> Any:
        SIZES.append(rows.target.size)
        return super().linear_gradients(rows, *more)

    def linear_terms_and_gradients(self, rows: Any, *more: Any) -> Any:
        SIZES.append(rows.target.size)
        return super().linear_terms_and_gradients(rows, *more)


def arrays() -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, V, (2, T // 2))
    labels.reshape(-1)[1::3] = -100
    hidden = rng.standard_normal((2, T // 2, H)).astype(np.float32)
    # Ignored tokens must not affect results.
    hidden.reshape(-1, H)[1::3] = np.nan
    return jnp.asarray(hidden), jnp.asarray(labels), jnp.asarray(rng.standard_normal((V, H)), "float32")


def results(loss_fn: Any, hidden: jax.Array, labels: jax.Array, weight: jax.Array) -> list[jax.Array]:
    def total(hidden: jax.Array, weight: jax.Array) -> Any:
        loss = loss_fn(hidden, labels, weight)
        return jnp.sum(loss) * 1.5, loss

    (_, loss), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, weight)
    return [loss, *grads]


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_ignored_tokens_are_skipped(reduction: str) -> None:
    loss = functools.partial(FusedLinearCrossEntropy, reduction=reduction, kernels=RecordingKernels())
    SIZES.clear()
    reference = results(loss(), *arrays())
    assert set(SIZES) == {T}
    SIZES.clear()
    by_number = functools.partial(loss(), num_valid_tokens=NUM_VALID)
    traced = jax.jit(functools.partial(results, by_number))(*arrays())
    by_sync = results(loss(skip_ignored=True), *arrays())
    assert set(SIZES) == {NUM_VALID}
    for got in (results(by_number, *arrays()), traced, by_sync):
        for a, b in zip(got, reference, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("number", [NUM_VALID - 1, NUM_VALID + 1, T, 0])
def test_a_wrong_number_is_never_a_finite_loss(reduction: str, number: int) -> None:
    loss_fn = functools.partial(FusedLinearCrossEntropy(reduction=reduction), num_valid_tokens=number)
    with pytest.raises(ValueError, match=f"num_valid_tokens is {number}, but {NUM_VALID} of the {T} labels"):
        loss_fn(*arrays())
    loss, *grads = jax.jit(functools.partial(results, loss_fn))(*arrays())
    assert np.isnan(loss).all()
    if number:
        assert all(np.isnan(grad).any() for grad in grads)


@pytest.mark.parametrize("more", [{"num_valid_tokens": 0}, {}])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_without_any_valid_token(reduction: str, more: dict[str, int]) -> None:
    hidden, labels, weight = arrays()
    loss_fn = functools.partial(FusedLinearCrossEntropy(reduction=reduction, skip_ignored=True), **more)
    for x in results(loss_fn, hidden, jnp.full_like(labels, -100), weight):
        assert (x == 0).all()


def test_errors_under_jit_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"can't under jax\.jit: pass their number as num_valid_tokens"):
        jax.jit(FusedLinearCrossEntropy(skip_ignored=True))(*arrays())
    with pytest.raises(TypeError, match="static_argnames"):
        jax.jit(FusedLinearCrossEntropy())(*arrays(), num_valid_tokens=NUM_VALID)


def test_a_count_read_on_the_host_compiles_few_programs() -> None:
    targets = [np.where(np.arange(1000) < n, -1, 0) for n in range(0, 1001, 10)]
    sizes = [valid_tokens.num_rows(target, True, None) for target in targets]
    assert len(set(sizes)) <= 18
    assert all(0 <= size - 1000 + n < 63 for size, n in zip(sizes, range(0, 1001, 10), strict=True))
