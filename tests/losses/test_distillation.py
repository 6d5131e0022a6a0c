"""Error bounds of distillation against roundings counted by hand."""

import numpy as np
import pytest

from helpers.roundings import TINY, U, jensen_shannon, kl_divergence, scaled_loss, softmax, stored
from loss_core import KDLossConfig
from loss_core.losses import allowances, evaluate

WEIGHT, COUNT = 1.7, 3
LOGITS = {"student_logits": [0.5, -1.0, 2.25], "teacher_logits": [-3.0, -1.25, -2.5]}


def bounds_of(config, upstream):
    """Oracle result and allowances of one token with a weight and a count."""
    arrays = {name: np.array([z_V]) for name, z_V in LOGITS.items()}
    arrays |= {"labels": np.array([0]), "loss_weights": np.array([WEIGHT]), "num_batch_labels": np.array(COUNT)}
    expected = evaluate(config, arrays, np.array(upstream))
    return expected, allowances(config, arrays, expected, "float32", upstream=np.array(upstream))


def sides(temp):
    """Both distributions, and the error of their log-ratio: of both lse, both z, and the rounding of the difference."""
    z_V = {name: np.array(raw_V) / temp for name, raw_V in LOGITS.items()}
    top = {name: np.max(np.abs(z)) for name, z in z_V.items()}
    # The reciprocal of the temperature, and the product with it.
    err_z = {name: 2 * U * top[name] if temp != 1 else 0.0 for name in z_V}
    student, teacher = (softmax(z_V[name], err_z[name]) for name in LOGITS)
    return student, teacher, student.err_lse + teacher.err_lse + sum(err_z.values()) + 2 * U * sum(top.values())


def assert_bounds(config, upstream, kl, err_kl, err_student_V, err_teacher_V):
    (expected, allowed), temp = bounds_of(config, upstream), config.temperature
    err = temp**2 * (err_kl + 3 * U * kl)
    assert allowed["loss"] == pytest.approx(scaled_loss(temp**2 * kl, err, WEIGHT / COUNT), rel=1e-10)
    coefficient = abs(upstream) * WEIGHT / COUNT * temp
    for name, error_V in (("student_logits", err_student_V), ("teacher_logits", err_teacher_V)):
        np.testing.assert_allclose(
            allowed[name][0], stored(expected.grads[name][0], coefficient * error_V), rtol=1e-10, err_msg=name
        )


@pytest.mark.parametrize("upstream", [-0.8, -0.8 * TINY])
@pytest.mark.parametrize("temp", [1.0, 2.5])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_every_rounding_of_a_divergence_is_in_the_bound_once(divergence, temp, upstream):
    student, teacher, err_ratio = sides(temp)
    if divergence == "forward_kl":
        kl, err, of_student_V, of_teacher_V = kl_divergence(student, teacher, err_ratio)
    else:
        kl, err, of_teacher_V, of_student_V = kl_divergence(teacher, student, err_ratio)
    assert_bounds(KDLossConfig(temperature=temp, divergence=divergence), upstream, kl, err, of_student_V, of_teacher_V)


@pytest.mark.parametrize("upstream", [-0.8, -0.8 * TINY])
@pytest.mark.parametrize("temp", [1.0, 2.5])
def test_every_rounding_of_a_mixture_is_in_the_bound_once(temp, upstream):
    config = KDLossConfig(temperature=temp, divergence="jsd", beta=0.3)
    assert_bounds(config, upstream, *jensen_shannon(*sides(temp), 0.3))


def test_a_class_of_probability_0_has_no_gradient_even_of_an_infinite_divergence():
    arrays = {"student_logits": np.array([[-np.inf, 0.0, 0.0]]), "teacher_logits": np.array([[0.0, 0.0, -np.inf]])}
    found = evaluate(KDLossConfig(), arrays | {"labels": np.array([0])})
    assert found.loss == np.inf
    np.testing.assert_array_equal(found.grads["teacher_logits"], [[np.nan, -np.inf, 0]])
    np.testing.assert_array_equal(found.grads["student_logits"], [[-0.5, 0, 0.5]])
