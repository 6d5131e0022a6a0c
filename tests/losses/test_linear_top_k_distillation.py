"""Error bounds of distillation of a head from K log-probabilities against roundings counted by hand."""

import numpy as np
import pytest

from helpers.roundings import TINY, Head, scaled_loss, stored, top_k
from loss_core import FusedLinearTopKDistillationConfig
from loss_core.losses import allowances, definition_of, evaluate, named_cases

# V = 5, H = 2, K = 2: classes 3 and 0 have the probabilities 0.5 and 0.2 of the teacher
HEAD = Head(
    np.array([0.5, -1.5]),
    np.array([[1.0, 0.5], [-0.75, 1.25], [0.5, -1.0], [0.25, -0.5], [1.5, -0.25]]),
    np.array([0.3, -0.2, 0.1, 0.4, -0.3]),
)
CLASSES_K, LOG_P_K = np.array([3, 0]), np.log([0.5, 0.2])
WEIGHT, COUNT = 1.7, 3


@pytest.mark.parametrize("upstream", [-0.8, -0.8 * TINY])
@pytest.mark.parametrize("cap", [0.0, 4.0])
def test_every_rounding_is_in_the_bound_once(cap, upstream):
    config = FusedLinearTopKDistillationConfig(logit_softcapping=cap, temperature=2.5)
    arrays = HEAD.arrays() | {"teacher_indices": CLASSES_K[None], "teacher_logprobs": LOG_P_K[None]}
    arrays |= {"labels": np.array([0]), "loss_weights": np.array([WEIGHT]), "num_batch_labels": np.array(COUNT)}
    expected = evaluate(config, arrays, np.array(upstream))
    allowed = allowances(config, arrays, expected, "float32", upstream=np.array(upstream))
    found, coefficient = (
        top_k(HEAD.logits, HEAD.err, CLASSES_K, LOG_P_K, config.tail, cap, 2.5),
        upstream * WEIGHT / COUNT,
    )
    assert allowed["loss"] == pytest.approx(scaled_loss(found.loss, found.err, WEIGHT / COUNT), rel=1e-9)
    errors = HEAD.gradient_errors(coefficient * found.by_raw_V, abs(coefficient) * found.err_raw_V + found.flushed)
    errors |= {"teacher_logprobs": abs(coefficient) * found.err_K}
    assert set(errors) | {"loss_weights"} == set(expected.grads)
    for name, error in errors.items():
        grad = expected.grads[name]
        np.testing.assert_allclose(allowed[name], stored(grad, error), rtol=1e-9, err_msg=name)


def test_the_fused_loss_has_the_cases_over_logits_except_those_that_change_logits():
    recipes = definition_of("TopKDistillation").recipes
    names = {case.name for case in named_cases("FusedLinearTopKDistillation")}
    assert {recipe.name for recipe in recipes if not recipe.over_logits} <= names
    assert not {recipe.name for recipe in recipes if recipe.over_logits} & names
    assert "bias" in names
