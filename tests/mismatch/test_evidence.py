"""Hypotheses that are all within their bounds are tested against each other."""

from __future__ import annotations

import numpy as np

from loss_core.mismatch.causes import RECORDED, Cause
from loss_core.mismatch.evidence import weigh
from loss_core.mismatch.hypotheses import Hypothesis, Outcome
from loss_core.mismatch.predict.head import Formula
from loss_core.mismatch.predict.interval import Interval
from loss_core.mismatch.predict.precision import FLOAT32, PRECISIONS


def outcome(precision, predicted, observed, cause=RECORDED, width=1.0):
    hypothesis = Hypothesis(precision, Cause(cause, "", Formula()))
    return Outcome(hypothesis, Interval(predicted - width, predicted, predicted + width), observed)


def evidence_of(num_tokens, noise, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal(num_tokens)
    b = a + 1e-2 * rng.standard_normal(num_tokens)
    observed = a + noise * rng.standard_normal(num_tokens)
    return weigh([outcome(FLOAT32, b, observed), outcome(PRECISIONS[1], a, observed)])


def test_a_residual_that_follows_another_prediction_refutes():
    evidence = evidence_of(1000, 1e-4)
    assert [o.hypothesis.precision for o in evidence.causes] == [PRECISIONS[1]]
    assert [o.hypothesis.precision for o in evidence.refuted] == [FLOAT32]


def test_few_tokens_and_large_noise_refute_nothing():
    for evidence in (evidence_of(20, 1e-4), evidence_of(200, 0.1)):
        assert len(evidence.causes) == 2
        assert evidence.refuted == []


def test_no_hypothesis_is_refuted_wrongly_in_many_draws():
    # B is true, with noise from far below to far above the difference to A.
    for seed, noise in enumerate(np.geomspace(1e-6, 0.1, 400)):
        kept = evidence_of(150, noise, seed=seed).causes
        assert PRECISIONS[1] in [o.hypothesis.precision for o in kept]


def test_a_wide_bound_does_not_win_over_what_is_closer():
    rng = np.random.default_rng(0)
    observed = rng.standard_normal(50)
    near, far = observed + 1e-3, observed + 1e-1 * rng.standard_normal(50)
    evidence = weigh([outcome(FLOAT32, near, observed, width=1e-4), outcome(PRECISIONS[1], far, observed)])
    assert evidence.causes == []
    assert len(evidence.refuted) == 1


def test_the_same_bits_and_what_changes_nothing_visible_are_one_cause():
    rng = np.random.default_rng(0)
    predicted = rng.standard_normal(100)
    observed = predicted + 1e-4 * rng.standard_normal(100)
    evidence = weigh([
        outcome(FLOAT32, predicted, observed),
        outcome(PRECISIONS[1], predicted, observed),
        outcome(FLOAT32, predicted + 1e-9, observed, cause="padded"),
    ])  # fmt: skip
    assert len(evidence.causes) == 1
    assert [o.hypothesis.cause.name for o in evidence.same[0]] == [RECORDED, "padded"]


def test_two_that_refute_each_other_remain_and_the_third_is_refuted():
    # Both equally far from what was observed, on either side of it; the third much further.
    rng = np.random.default_rng(0)
    observed, apart = rng.standard_normal(1000), 1e-3 * rng.standard_normal(1000)
    far = observed + 0.1 * rng.standard_normal(1000)
    below, above, third = (
        outcome(precision, predicted, observed)
        for precision, predicted in zip(PRECISIONS, (observed - apart, observed + apart, far), strict=False)
    )
    evidence = weigh([below, above, third])
    assert evidence.causes == [below, above]
    assert evidence.refuted == [third]
