"""Error bounds of distillation from K log-probabilities against roundings counted by hand."""

import numpy as np
import pytest

from helpers.roundings import TINY, scaled_loss, stored, top_k
from loss_core import TopKDistillationConfig
from loss_core.losses import allowances, evaluate

# V = 5, K = 2: classes 3 and 0 have the probabilities 0.5 and 0.2 of the teacher
RAW_V, CLASSES_K, LOG_P_K = np.array([0.5, -1.0, 2.25, 0.75, 1.5]), np.array([3, 0]), np.log([0.5, 0.2])
WEIGHT, COUNT = 1.7, 3


@pytest.mark.parametrize("upstream", [-0.8, -0.8 * TINY])
@pytest.mark.parametrize("temp", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("cap", [0.0, 4.0])
@pytest.mark.parametrize("tail", [False, True])
def test_every_rounding_is_in_the_bound_once(tail, cap, temp, upstream):
    config = TopKDistillationConfig(tail=tail, logit_softcapping=cap, temperature=temp)
    arrays = {"student_logits": RAW_V[None], "teacher_indices": CLASSES_K[None], "teacher_logprobs": LOG_P_K[None]}
    arrays |= {"labels": np.array([0]), "loss_weights": np.array([WEIGHT]), "num_batch_labels": np.array(COUNT)}
    expected = evaluate(config, arrays, np.array(upstream))
    allowed = allowances(config, arrays, expected, "float32", upstream=np.array(upstream))
    found, coefficient = top_k(RAW_V, 0.0, CLASSES_K, LOG_P_K, tail, cap, temp), upstream * WEIGHT / COUNT
    assert allowed["loss"] == pytest.approx(scaled_loss(found.loss, found.err, WEIGHT / COUNT), rel=1e-9)
    np.testing.assert_allclose(expected.grads["student_logits"][0], coefficient * found.by_raw_V, rtol=1e-9)
    errors = {"student_logits": abs(coefficient) * found.err_raw_V + found.flushed}
    for name, error in (errors | {"teacher_logprobs": abs(coefficient) * found.err_K}).items():
        bound = stored(expected.grads[name][0], error)
        np.testing.assert_allclose(allowed[name][0], bound, rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("tail", [False, True])
def test_a_class_with_teacher_probability_0_has_no_effect(tail):
    raw_V = RAW_V.copy()
    raw_V[0] = -np.inf  # by the student, too
    arrays = {"student_logits": raw_V[None], "teacher_indices": CLASSES_K[None], "labels": np.array([0])}
    arrays |= {"teacher_logprobs": np.array([[np.log(0.5), -np.inf]])}
    found = evaluate(TopKDistillationConfig(tail=tail), arrays)
    q_V = np.exp(raw_V) / np.sum(np.exp(raw_V))
    rest = 0.5 * np.log(0.5 / (1 - q_V[3])) if tail else 0.0
    assert found.loss == pytest.approx(0.5 * np.log(0.5 / q_V[3]) + rest)
    of_tail = np.log(0.5 / (1 - q_V[3])) if tail else -1.0
    by_teacher_K = [0.5 * (np.log(0.5 / q_V[3]) - of_tail), 0]
    np.testing.assert_allclose(found.grads["teacher_logprobs"][0], by_teacher_K)
    w_V = np.where(raw_V == -np.inf, 0.0, 0.5 * q_V / (1 - q_V[3]) if tail else 0.0)
    w_V[3] = 0.5
    np.testing.assert_allclose(found.grads["student_logits"][0], np.sum(w_V) * q_V - w_V, atol=1e-15)


@pytest.mark.parametrize("index", [3, -1, 2**40])
def test_an_index_that_is_no_class_makes_its_own_token_nan(index):
    arrays = {
        "student_logits": np.array([[0.5, -1.0, 2.25], [1.0, 2.0, 3.0]]),
        "teacher_indices": np.array([[0, 1], [2, index]]),
        "teacher_logprobs": np.log([[0.5, 0.25], [0.5, 0.25]]),
        "labels": np.array([0, 0]),
    }
    expected = evaluate(TopKDistillationConfig(), arrays | {"num_batch_labels": np.float64(1.0)})
    assert np.isnan(expected.loss)
    for found in expected.grads.values():
        assert np.isfinite(found[0]).all()
        assert np.isnan(found[1]).all()
    ignored = evaluate(TopKDistillationConfig(), arrays | {"labels": np.array([0, -100])})
    assert np.isfinite(ignored.loss)
