"""The oracle itself: hand-computed cases, central differences, high-precision arithmetic."""

from dataclasses import replace

import mpmath
import numpy as np
import pytest

from loss_core import (
    FusedLinearCEConfig,
    KDLossConfig,
    LogProbsConfig,
    LossConfig,
    MaskedCrossEntropyConfig,
    TEParallelCEConfig,
)
from loss_core.losses import error_ratio, named_cases, random_cases
from loss_core.losses.oracle import allowances, evaluate
from loss_core.registry import our_losses


def test_hand_computed_cross_entropy():
    # softmax([0, ln 3]) = [1/4, 3/4]
    logits = np.array([[0.0, np.log(3.0)], [5.0, 5.0], [1.0, 2.0]])
    labels = np.array([0, 1, -100])
    result = evaluate(MaskedCrossEntropyConfig(), {"logits": logits, "labels": labels})
    assert result.loss == pytest.approx(np.log(4) + np.log(2), rel=1e-15)
    np.testing.assert_allclose(result.grads["logits"], [[-0.75, 0.75], [0.5, -0.5], [0, 0]], rtol=1e-15)
    mean = evaluate(TEParallelCEConfig(reduction="mean"), {"logits": logits, "labels": labels})
    assert mean.loss == pytest.approx((np.log(4) + np.log(2)) / 2)
    none = evaluate(MaskedCrossEntropyConfig(reduction="none"), {"logits": logits, "labels": labels}, np.arange(3.0))
    np.testing.assert_allclose(none.loss, [np.log(4), np.log(2), 0])
    np.testing.assert_allclose(none.grads["logits"], [[0, 0], [0.5, -0.5], [0, 0]])


def test_hand_computed_distillation():
    # Teacher [1/2, 1/2] and student [1/4, 3/4] at T = 1: KL = ln 2 - (ln 3) / 2.
    arrays = {
        "student_logits": np.array([[0.0, np.log(3.0)]]),
        "teacher_logits": np.zeros((1, 2)),
        "labels": np.array([0]),
    }
    result = evaluate(KDLossConfig(), arrays)
    assert result.loss == pytest.approx(np.log(2) - np.log(3) / 2)
    np.testing.assert_allclose(result.grads["student_logits"], [[-0.25, 0.25]])
    # The same distributions at T = 2 need logits twice as large, and the loss is T^2 = 4 times as large.
    hot = {**arrays, "student_logits": 2 * arrays["student_logits"]}
    assert evaluate(KDLossConfig(temperature=2.0), hot).loss == pytest.approx(4 * float(result.loss))


def test_hand_computed_reverse_and_mixture():
    # Teacher [1/2, 1/2] and student [1/4, 3/4]: KL(s || t) = (3/4) ln 3 - ln 2. With beta = 1/4 the mixture is
    # [5/16, 11/16], so that p_t / M = [8/5, 8/11] and p_s / M = [4/5, 12/11].
    arrays = {
        "student_logits": np.array([[0.0, np.log(3.0)]]),
        "teacher_logits": np.zeros((1, 2)),
        "labels": np.array([0]),
    }
    kl = 0.75 * np.log(3) - np.log(2)
    reverse = evaluate(KDLossConfig(divergence="reverse_kl"), arrays)
    assert reverse.loss == pytest.approx(kl)
    by_class = np.array([[0.25 * (-np.log(2) - kl), 0.75 * (np.log(1.5) - kl)]])
    np.testing.assert_allclose(reverse.grads["student_logits"], by_class)
    np.testing.assert_allclose(reverse.grads["teacher_logits"], [[0.25, -0.25]])
    kl_t, kl_s = np.log(64 / 55) / 2, np.log(4 / 5) / 4 + 3 * np.log(12 / 11) / 4
    jsd = evaluate(KDLossConfig(divergence="jsd", beta=0.25), arrays)
    assert jsd.loss == pytest.approx(kl_t / 4 + 3 * kl_s / 4)
    by_student = 0.75 * np.array([[0.25 * (np.log(4 / 5) - kl_s), 0.75 * (np.log(12 / 11) - kl_s)]])
    np.testing.assert_allclose(jsd.grads["student_logits"], by_student)
    np.testing.assert_allclose(jsd.grads["teacher_logits"][0, 0], 0.25 * 0.5 * (np.log(8 / 5) - kl_t))
    # It is 0 at either end, and its limit over beta, or over 1 - beta, is a divergence of Kullback and Leibler.
    for beta, limit in ((1e-7, "forward_kl"), (1 - 1e-7, "reverse_kl")):
        near = evaluate(KDLossConfig(divergence="jsd", beta=beta), arrays).loss / min(beta, 1 - beta)
        assert near == pytest.approx(float(evaluate(KDLossConfig(divergence=limit), arrays).loss), rel=1e-5)
        at = evaluate(KDLossConfig(divergence="jsd", beta=round(beta)), arrays)
        assert at.loss == evaluate(KDLossConfig(divergence=limit), arrays).loss


def test_hand_computed_fused_linear():
    hidden, weight = np.array([[2.0]]), np.array([[0.0], [np.log(3.0) / 2]])
    result = evaluate(FusedLinearCEConfig(), {"hidden_states": hidden, "labels": np.array([1]), "lm_weight": weight})
    assert result.loss == pytest.approx(np.log(4 / 3))
    np.testing.assert_allclose(result.grads["lm_weight"], [[0.5], [-0.5]])
    np.testing.assert_allclose(result.grads["hidden_states"], [[-0.25 * np.log(3) / 2]])


def test_weights_counts_and_masks_by_hand():
    logits, labels = np.zeros((2, 2)), np.array([0, 1])
    arrays = {"logits": logits, "labels": labels, "loss_weights": np.array([1.0, 3.0]), "num_label_tokens": np.array(4)}
    result = evaluate(MaskedCrossEntropyConfig(), arrays)
    assert result.loss == pytest.approx(np.log(2))
    np.testing.assert_allclose(result.grads["loss_weights"], [np.log(2) / 4] * 2)
    masked = evaluate(MaskedCrossEntropyConfig(), {"logits": logits, "labels": labels, "mask": np.array([0, 1])})
    assert masked.loss == pytest.approx(np.log(2))
    zero = evaluate(MaskedCrossEntropyConfig(), {**arrays, "num_label_tokens": np.array(0)})
    assert zero.loss == 0
    assert not zero.grads["logits"].any()


def _smooth(case):
    log_p = case.arrays.get("teacher_logprobs")
    if log_p is not None and case.config.tail and np.any(1 - np.exp(log_p).sum(-1) < 1e-3):
        return False  # a tail that has no more than the step, by which it would come or go
    return all(np.isfinite(value).all() for value in case.arrays.values()) and case.name not in (
        "huge-logits",  # curvature beyond what a difference quotient resolves
        "offset",
    )


@pytest.mark.parametrize("loss", our_losses())
def test_gradients_against_central_differences(loss):
    rng = np.random.default_rng(0)
    cases = [case for case in [*named_cases(loss), *random_cases(loss, 20, seed=1)] if _smooth(case)]
    assert len(cases) > 20
    for case in cases:
        result = evaluate(case.config, case.arrays, case.upstream)
        assert set(case.grad_of) == set(result.grads), case.name
        upstream = np.ones_like(result.loss) if case.upstream is None else np.array(case.upstream)
        if getattr(case.config, "metrics", ()):
            # Behind the loss, and not differentiated.
            upstream[1:] = 0
        for name in case.grad_of:
            direction = rng.standard_normal(case.arrays[name].shape)
            direction /= np.linalg.norm(direction)
            step = 1e-5

            def objective(shift, name=name, direction=direction, case=case, upstream=upstream):
                moved = {**case.arrays, name: case.arrays[name] + shift * direction}
                return float(np.sum(evaluate(case.config, moved).loss * upstream))

            quotient = (objective(step) - objective(-step)) / (2 * step)
            slope = float(np.sum(result.grads[name] * direction))
            size = max(abs(slope), float(np.linalg.norm(result.grads[name])))
            assert quotient == pytest.approx(slope, rel=1e-5, abs=1e-6 * size + 1e-7), (case.name, name)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_against_high_precision(scale):
    rng = np.random.default_rng(0)
    student, teacher = rng.standard_normal((2, 40)) * scale
    arrays = {"logits": student[None], "labels": np.array([7])}
    with mpmath.workdps(60):
        zs, zt = ([mpmath.mpf(float(x)) for x in z] for z in (student, teacher))
        lse_s, lse_t = (mpmath.log(mpmath.fsum(mpmath.exp(z) for z in row)) for row in (zs, zt))
        ce = lse_s - zs[7]
        p_t = [mpmath.exp(z - lse_t) for z in zt]
        kl = mpmath.fsum(p * ((t - lse_t) - (s - lse_s)) for p, t, s in zip(p_t, zt, zs, strict=True))
        got_ce = float(evaluate(MaskedCrossEntropyConfig(), arrays).loss)
        kd = {"student_logits": student[None], "teacher_logits": teacher[None], "labels": np.array([0])}
        got_kl = float(evaluate(KDLossConfig(), kd).loss)
        p_s = [mpmath.exp(z - lse_s) for z in zs]
        both = list(zip(p_s, p_t, strict=True))
        jsd = mpmath.fsum((t * mpmath.log(2 * t / (s + t)) + s * mpmath.log(2 * s / (s + t))) / 2 for s, t in both)
        got_jsd = float(evaluate(KDLossConfig(divergence="jsd"), kd).loss)
        assert got_jsd == pytest.approx(float(jsd), rel=1e-13)
        assert got_ce == pytest.approx(float(ce), rel=1e-14)
        assert got_kl == pytest.approx(float(kl), rel=1e-13)


@pytest.mark.parametrize(
    ("got", "expected", "allowed", "share"),
    [
        (np.inf, 65000.0, 504.0, 0),
        (np.inf, 65000.0, 503.0, np.inf),
        (-np.inf, -65000.0, 504.0, 0),
        (np.inf, -65000.0, 504.0, np.inf),
        (65000.0, 65000.0, 0.0, 0),
        (2.0, 1.0, 4.0, 0.25),
        (1.0, 2.0, 0.25, 4),
        (1.0, 2.0, 0.0, np.inf),
        (np.nan, np.nan, 0.0, 0),
        (np.nan, 1.0, 1.0, np.inf),
        (1.0, np.nan, 1.0, np.inf),
    ],
)
def test_error_ratio_and_overflow_to_infinity(got, expected, allowed, share):
    # float16, whose largest number is 65504
    found = error_ratio(np.array([got]), np.array([expected]), np.array([allowed]), "float16")
    assert found.tolist() == [share]


def test_no_definition():
    with pytest.raises(TypeError, match="no definition of LossConfig"):
        evaluate(LossConfig(), {})


@pytest.mark.parametrize("config", [MaskedCrossEntropyConfig(metrics=("accuracy",)), LogProbsConfig()])
@pytest.mark.parametrize("ignore_index", [-100, -1, 3, 2**40])
def test_an_ignored_label_is_no_class_whatever_its_value(config, ignore_index):
    config = replace(config, ignore_index=ignore_index)
    arrays = {"logits": np.array([[0.5, -1.0, 2.25], [1.0, 2.0, 3.0]]), "labels": np.array([1, ignore_index])}
    expected = evaluate(config, arrays)
    allowed = allowances(config, arrays, expected, "float32")
    for found in (expected.grads["logits"], allowed["logits"]):
        assert found[0].all()
        assert not found[1].any()
