"""The condition number of a loss: by hand, and as what the worst relative changes of its inputs do."""

import numpy as np
import pytest

from loss_core import LOSS_CONFIG_REGISTRY, MaskedCrossEntropyConfig
from loss_core.losses import OracleResult, evaluate, named_cases
from loss_core.losses.condition import condition_number


def condition_of(config, arrays, upstream=None):
    return condition_number(arrays, evaluate(config, arrays, upstream), upstream)


def test_of_two_classes_by_hand():
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
    """Upstream times each result, with inputs that are off by the relative change d, the way that makes it larger."""
    worst = {name: case.arrays[name] * (1 + d * np.sign(case.arrays[name]) * np.sign(grads[name])) for name in grads}
    result = evaluate(case.config, case.arrays | worst, case.upstream).loss
    terms = result if case.upstream is None else case.upstream * result
    return terms[0] if getattr(case.config, "metrics", ()) else terms


@pytest.mark.parametrize("name", ["basic", "mean", "none", "loss-weights", "minus-inf", "metrics", "entropy", "jsd"])
@pytest.mark.parametrize("loss", LOSS_CONFIG_REGISTRY)
def test_it_is_what_the_worst_relative_changes_do(loss, name):
    for case in named_cases(loss, only=(name,)):
        expected = evaluate(case.config, case.arrays, case.upstream)
        larger, same, smaller = (objective(case, expected.grads, d) for d in (1e-6, 0.0, -1e-6))
        with np.errstate(invalid="ignore"):  # a teacher's class that the student rules out: an infinite loss
            relative = (np.sum(larger) - np.sum(smaller)) / 2e-6 / np.sum(np.abs(same))
        found = condition_number(case.arrays, expected, case.upstream)
        assert found == pytest.approx(relative, rel=1e-5, nan_ok=True)


def test_of_a_loss_of_zero():
    arrays = {"x": np.ones(2)}
    assert condition_number(arrays, OracleResult(np.zeros(()), {"x": np.ones(2)})) == np.inf
    assert np.isnan(condition_number(arrays, OracleResult(np.zeros(()), {"x": np.zeros(2)})))
