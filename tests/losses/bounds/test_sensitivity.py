"""Estimated bounds by hand, and the condition number against the worst relative changes of the inputs."""

import numpy as np
import pytest

from helpers.roundings import NEAR_ZERO, U
from loss_core import LOSS_CONFIG_REGISTRY, MaskedCrossEntropyConfig
from loss_core.dtypes import float_format
from loss_core.losses import OracleResult, evaluate, named_cases
from loss_core.losses.bounds.sensitivity import Sensitivity, condition_number


def test_the_change_for_perturbed_inputs_is_scaled_by_the_growth_of_rounding_errors():
    # Relative to inputs of at least 1, absolute below.
    x, calls = np.array([2.0, 0.5, -4.0]), []

    def run(arrays):
        calls.append(arrays)
        return {"y": 3 * arrays["x"] * arrays["k"], "zero": 0 * arrays["x"]}

    probe = Sensitivity(run, {"x": x, "k": np.full(3, 7.0)}, ["x"], U)
    assert len(calls) == 1 + 8
    found = probe.allowed(2 * U, {"y": float_format("bfloat16"), "zero": float_format("bfloat16")})
    moved, growth = 21 * np.array([2.0, 1.0, 4.0]), 3 + 16
    bound = growth * (moved + 21 * np.abs(x)) * 2 * U + 2.0**-8 * 21 * np.abs(x)
    np.testing.assert_allclose(found["y"], bound, rtol=1e-7)
    assert found["zero"].tolist() == [NEAR_ZERO] * 3


def test_a_perturbation_that_gives_nan_does_not_hide_another():
    found = Sensitivity(lambda x: {"y": np.where(x["x"] < 0, np.nan, x["x"])}, {"x": np.zeros(1)}, ["x"], U)
    assert found.allowed(U, {"y": float_format("float32")})["y"] >= (1 + 16) * U


def test_the_growth_is_that_of_the_longest_axis():
    long = Sensitivity(lambda arrays: {"y": arrays["x"]}, {"x": np.ones(2), "z": np.ones((3, 5))}, ["x"], U)
    bound = (5 + 16) * 2 * U + U
    np.testing.assert_allclose(long.allowed(U, {"y": float_format("float32")})["y"], bound, rtol=1e-6)


def condition_of(config, arrays, upstream=None):
    return condition_number(arrays, evaluate(config, arrays, upstream), upstream)


def test_the_condition_of_two_classes_by_hand():
    # softmax([0, ln 3]) = [1/4, 3/4]: the loss is ln 4 and its gradient (-3/4, 3/4).
    arrays = {"logits": np.array([[0.0, np.log(3.0)]]), "labels": np.array([0])}
    by_hand = 0.75 * np.log(3) / np.log(4)
    for upstream in (None, np.array(-2.0)):
        assert condition_of(MaskedCrossEntropyConfig(), arrays, upstream) == pytest.approx(by_hand)
    ignored = {"logits": np.array([[0.0, np.log(3.0)], [np.nan, np.inf]]), "labels": np.array([0, -100])}
    assert condition_of(MaskedCrossEntropyConfig(), ignored) == pytest.approx(by_hand)


def test_offset_logits_are_ill_conditioned():
    logits, labels = np.random.default_rng(0).standard_normal((5, 7)), np.arange(5)
    near, far = (
        condition_of(MaskedCrossEntropyConfig(), {"logits": logits + offset, "labels": labels}) for offset in (0, 1e4)
    )
    assert near < 10
    assert far > 1e3 * near


def objective(case, grads, d):
    """upstream * result, with inputs changed by the relative error d in the direction that increases it."""
    worst = {name: case.arrays[name] * (1 + d * np.sign(case.arrays[name]) * np.sign(grads[name])) for name in grads}
    result = evaluate(case.config, case.arrays | worst, case.upstream).loss
    terms = result if case.upstream is None else case.upstream * result
    return terms[0] if getattr(case.config, "metrics", ()) else terms


@pytest.mark.parametrize("name", ["basic", "mean", "none", "loss-weights", "minus-inf", "metrics", "entropy", "jsd"])
@pytest.mark.parametrize("loss", LOSS_CONFIG_REGISTRY)
def test_the_condition_is_the_effect_of_the_worst_relative_changes(loss, name):
    for case in named_cases(loss, only=(name,)):
        expected = evaluate(case.config, case.arrays, case.upstream)
        larger, same, smaller = (objective(case, expected.grads, d) for d in (1e-6, 0.0, -1e-6))
        with np.errstate(invalid="ignore"):  # a teacher's class that the student rules out: an infinite loss
            relative = (np.sum(larger) - np.sum(smaller)) / 2e-6 / np.sum(np.abs(same))
        found = condition_number(case.arrays, expected, case.upstream)
        assert found == pytest.approx(relative, rel=1e-5, nan_ok=True)


def test_the_condition_of_a_loss_of_zero():
    arrays = {"x": np.ones(2)}
    assert condition_number(arrays, OracleResult(np.zeros(()), {"x": np.ones(2)})) == np.inf
    assert np.isnan(condition_number(arrays, OracleResult(np.zeros(()), {"x": np.zeros(2)})))
