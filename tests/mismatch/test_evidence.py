"""Hypotheses that are all within their bounds are weighed by what was observed."""

from __future__ import annotations

import numpy as np

from loss_core.mismatch.causes import RECORDED, Cause, Formula
from loss_core.mismatch.evidence import weigh
from loss_core.mismatch.hypotheses import Hypothesis, Outcome
from loss_core.mismatch.interval import Interval
from loss_core.mismatch.precision import FLOAT32, PRECISIONS

RNG = np.random.default_rng(0)


def outcome(precision, predicted, observed, cause=RECORDED, width=1.0):
    hypothesis = Hypothesis(precision, Cause(cause, "", Formula()))
    return Outcome(hypothesis, Interval(predicted - width, predicted, predicted + width), observed)


def weighed(num_tokens, noise, width_of_b=1.0):
    a = RNG.standard_normal(num_tokens)
    b = a + 1e-2 * RNG.standard_normal(num_tokens)
    observed = a + noise * RNG.standard_normal(num_tokens)
    return weigh([outcome(FLOAT32, b, observed, width=width_of_b), outcome(PRECISIONS[1], a, observed)])


def test_a_residual_that_follows_another_prediction_refutes():
    evidence = weighed(1000, 1e-4)
    assert [o.hypothesis.precision for o in evidence.causes] == [PRECISIONS[1]]
    assert [o.hypothesis.precision for o in evidence.refuted] == [FLOAT32]


def test_few_tokens_and_large_noise_refute_nothing():
    for evidence in (weighed(20, 1e-4), weighed(200, 0.3)):
        assert len(evidence.causes) == 2
        assert evidence.refuted == []


def test_no_hypothesis_is_refuted_wrongly_in_many_draws():
    # B is true, with noise from far below to far above the difference to A.
    for noise in np.geomspace(1e-6, 0.1, 400):
        kept = weighed(150, noise).causes
        assert PRECISIONS[1] in [o.hypothesis.precision for o in kept]


def test_a_wide_bound_does_not_win_over_what_is_closer():
    observed = RNG.standard_normal(50)
    near, far = observed + 1e-3, observed + 1e-1 * RNG.standard_normal(50)
    evidence = weigh([outcome(FLOAT32, near, observed, width=1e-4), outcome(PRECISIONS[1], far, observed)])
    assert evidence.causes == []
    assert len(evidence.refuted) == 1


def test_the_same_bits_and_what_changes_nothing_visible_are_one_cause():
    predicted = RNG.standard_normal(100)
    observed = predicted + 1e-4 * RNG.standard_normal(100)
    evidence = weigh([
        outcome(FLOAT32, predicted, observed),
        outcome(PRECISIONS[1], predicted, observed),
        outcome(FLOAT32, predicted + 1e-9, observed, cause="padded"),
    ])  # fmt: skip
    assert len(evidence.causes) == 1
    assert [o.hypothesis.cause.name for o in evidence.same[0]] == [RECORDED, "padded"]
