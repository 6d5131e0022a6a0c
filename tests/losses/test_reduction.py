"""Reduction of token losses: by hand, and the rounding of the sum."""

import numpy as np
import pytest

from helpers.roundings import COEFFICIENT, NEAR_ZERO, U, softmax
from loss_core import MaskedCrossEntropyConfig
from loss_core.losses import allowances, evaluate
from loss_core.losses.reduction import Reduction, masked_rows, times_rows, valid_tokens

LOGITS_TV = np.array([[0.5, -1.0, 2.25], [3.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, -2.0, 1.0]])
LABELS_T = np.array([1, 0, -100, 2])


@pytest.mark.parametrize(("reduction", "upcast"), [("sum", True), ("mean", True), ("none", True), ("mean", False)])
def test_every_rounding_of_a_sum_is_in_the_bound_once(reduction, upcast):
    config = MaskedCrossEntropyConfig(reduction=reduction, fp32_upcast=upcast)
    arrays = {"logits": LOGITS_TV, "labels": LABELS_T}
    expected = evaluate(config, arrays)
    allowed = allowances(config, arrays, expected, "bfloat16")
    loss_T, err_T = np.zeros(4), np.zeros(4)
    for row in (0, 1, 3):
        sm = softmax(LOGITS_TV[row])
        loss_T[row] = -sm.log_p_V[LABELS_T[row]]
        err_T[row] = sm.err_lse + U * (abs(LOGITS_TV[row, LABELS_T[row]]) + 2 * loss_T[row])
    scale = 1 / 3 if reduction == "mean" else 1.0
    loss, err = scale * loss_T, scale * err_T
    if reduction != "none":
        # A sum of all 4; each has a coefficient.
        loss, err = loss.sum(), err.sum() + (4 + COEFFICIENT) * U * loss.sum()
    np.testing.assert_allclose(expected.loss, loss, rtol=1e-12)
    u = U if upcast else 2.0**-8
    np.testing.assert_allclose(allowed["loss"], err + u * (loss + err) + NEAR_ZERO, rtol=1e-10)


@pytest.mark.parametrize("ignore_index", [-100, 0, 1, 3, 7])
@pytest.mark.parametrize("mask", [None, [[1, 0]], [[0.5], [0.0]], [[True, True], [False, True]]])
def test_a_token_is_valid_unless_its_label_is_ignore_index_or_the_mask_is_0(mask, ignore_index):
    labels = np.array([[1, 0], [3, -100]])
    arrays = {"labels": labels} | ({} if mask is None else {"mask": np.array(mask)})
    of_mask = np.ones((2, 2), bool) if mask is None else np.broadcast_to(np.array(mask) != 0, (2, 2))
    expected = [label != ignore_index and of for label, of in zip(labels.flat, of_mask.flat, strict=True)]
    assert valid_tokens(arrays, ignore_index).tolist() == expected


def test_the_values_of_an_ignored_row_do_not_matter():
    keep_T = np.array([True, False])
    np.testing.assert_array_equal(masked_rows(np.array([[[1, 2]], [[np.nan, np.inf]]]), keep_T), [[1, 2], [0, 0]])
    with np.errstate(invalid="ignore"):
        products = times_rows(np.array([-2.0, 0.0]), np.array([[1, 2], [np.nan, np.inf]]))
    np.testing.assert_array_equal(products, [[-2, -4], [0, 0]])


@pytest.mark.parametrize(
    ("kind", "count", "weighted", "loss", "coefficients"),
    [
        ("sum", None, True, 1 * 2 + 3 * 5, [1, 0, 3]),
        ("sum", None, False, 2 + 5, [1, 0, 1]),
        ("sum", 4, True, 17 / 4, [1 / 4, 0, 3 / 4]),
        ("sum", 1, False, 7, [1, 0, 1]),
        ("sum", 0, True, 0, [0, 0, 0]),
        ("mean", None, True, 17 / 2, [1 / 2, 0, 3 / 2]),
    ],
)
def test_a_reduction_by_hand(kind, count, weighted, loss, coefficients):
    keep_T, weights_T = np.array([True, False, True]), np.array([1.0, 7.0, 3.0]) if weighted else None
    reduction = Reduction(kind, (3,), keep_T, None if count is None else np.array(count), weights_T)
    loss_T = np.array([2.0, 0.0, 5.0])
    assert float(reduction.loss(loss_T)) == loss
    np.testing.assert_array_equal(reduction.coefficients(None), coefficients)
    np.testing.assert_array_equal(reduction.coefficients(np.array(-2.0)), -2 * np.array(coefficients))
    if weighted:
        unweighted = np.array([1.0, 0.0, 1.0]) * reduction.scale
        np.testing.assert_array_equal(reduction.coefficients(None, weighted=False), unweighted)
        np.testing.assert_array_equal(reduction.weights_grad(loss_T, np.array(-2.0))["loss_weights"],
                                      -2 * loss_T * reduction.scale)  # fmt: skip
    else:
        assert reduction.weights_grad(loss_T, None) == {}


@pytest.mark.parametrize(("kind", "count"), [("mean", None), ("sum", 0)])
def test_without_valid_tokens_the_loss_is_0_even_if_rows_are_nan(kind, count):
    keep_T = np.array([count is not None] * 2)
    reduction = Reduction(kind, (2,), keep_T, None if count is None else np.array(count))
    assert float(reduction.loss(np.array([np.inf, np.nan]))) == 0
    assert reduction.scale == 0
