"""Reduction of the losses of rows, against the oracle's reduction."""

import jax.numpy as jnp
import numpy as np
import pytest

from loss_core.losses.reduction import Reduction
from loss_core_jax.inputs import ELSEWHERE, IGNORED, INVALID
from loss_core_jax.reduction import row_scale, total, valid_losses, valid_upstream

# T = 3 rows
LOSS_T, WEIGHTS_T = jnp.array([2.0, 7.0, 5.0]), jnp.array([1.0, 0.5, 3.0])
TARGETS = {"all": [1, 0, ELSEWHERE], "some": [1, IGNORED, 2], "one": [IGNORED, 0, IGNORED], "none": [IGNORED] * 3}
CALLS = [("sum", None, False), ("sum", 4, True), ("sum", 1, False), ("sum", 0, True), ("mean", None, False)]


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize(("kind", "count", "weighted"), CALLS, ids=str)
def test_result_and_factors_are_those_of_the_oracle(kind, count, weighted, targets):
    target = jnp.array(TARGETS[targets])
    keep_T, weights_T = np.array(target) != IGNORED, WEIGHTS_T if weighted else None
    oracle = Reduction(kind, (3,), keep_T, None if count is None else np.array(count), weights_T)
    count = None if count is None else jnp.array(count)
    scale_T = row_scale(target, jnp.float32, mean=kind == "mean", count=count, loss_weights=weights_T)
    assert scale_T.dtype == jnp.float32
    np.testing.assert_allclose(scale_T, oracle.coefficients(None), rtol=1e-6)
    loss = total(valid_losses(LOSS_T, target), scale_T, count)
    np.testing.assert_allclose(loss, oracle.loss(np.asarray(LOSS_T) * keep_T), rtol=1e-6)


def test_an_infinite_weight_of_an_ignored_row_has_no_effect():
    weights_T = jnp.array([1.0, jnp.inf, 3.0])
    assert row_scale(jnp.array(TARGETS["some"]), jnp.float32, loss_weights=weights_T).tolist() == [1, 0, 3]


def test_an_infinite_loss_with_a_count_of_0_is_0():
    count = jnp.array(0.0)
    scale_T = row_scale(jnp.array(TARGETS["all"]), jnp.float32, count=count)
    assert total(jnp.array([jnp.inf, 1.0, 2.0]), scale_T, count) == 0


@pytest.mark.parametrize("count", [-1.0, jnp.nan])
def test_an_invalid_count_makes_the_loss_nan(count):
    count = jnp.array(count)
    scale_T = row_scale(jnp.array(TARGETS["all"]), jnp.float32, count=count)
    assert jnp.isnan(total(LOSS_T, scale_T, count))


@pytest.mark.parametrize("function", [valid_losses, valid_upstream])
def test_an_ignored_row_is_0_and_an_invalid_one_nan(function):
    values = function(jnp.array([2.0, jnp.nan, 5.0, 3.0]), jnp.array([1, IGNORED, INVALID, ELSEWHERE]))
    np.testing.assert_array_equal(values, [2, 0, np.nan, 3])
