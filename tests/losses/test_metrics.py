"""Metrics by hand, and how close two logits must be for accuracy to be 0 or 1."""

import numpy as np
import pytest

from helpers.roundings import U, entropy, softcapped, softmax, stored
from loss_core import MaskedCrossEntropyConfig
from loss_core.losses import allowances, oracle

# In the order of their names.
NAMES = ("accuracy", "entropy", "lse", "num_valid", "z_loss")


def _found(logits, labels, **fields):
    config = MaskedCrossEntropyConfig(metrics=NAMES, z_loss=0.5, **fields)
    arrays = {"logits": np.asarray(logits, float), "labels": np.asarray(labels)}
    return config, arrays, oracle.evaluate(config, arrays)


def test_of_equal_logits():
    _, _, found = _found([[1.0, 1.0, 1.0, 1.0]], [2])
    lse = 1 + np.log(4)
    assert found.loss == pytest.approx([np.log(4) + 0.5 * lse**2, 1, np.log(4), lse, 1, 0.5 * lse**2])


def test_each_is_reduced_as_the_loss_is():
    logits, labels = [[0.0, 3.0], [0.0, 3.0], [5.0, 0.0]], [1, 0, -100]
    _, _, total = _found(logits, labels)
    _, _, mean = _found(logits, labels, reduction="mean")
    _, _, tokens = _found(logits, labels, reduction="none")
    assert tokens.loss[1].tolist() == [1, 0, 0]
    assert tokens.loss[4].tolist() == [2, 2, 2]
    assert total.loss == pytest.approx([*tokens.loss[:4].sum(1), 2, tokens.loss[5].sum()])
    assert mean.loss == pytest.approx([*tokens.loss[:4].sum(1) / 2, 2, tokens.loss[5].sum() / 2])


def test_accuracy_is_exact_unless_two_logits_are_within_rounding():
    near = np.nextafter(np.float32(3.0), np.float32(4.0))
    config, arrays, found = _found([[3.0, near, 0.0], [3.0, 3.1, 0.0]], [0, 0], reduction="none")
    allowed = allowances(config, arrays, found, "float32")["loss"][1]
    assert found.loss[1].tolist() == [0, 0]
    assert allowed[0] >= 1
    assert allowed[1] < 1e-6


@pytest.mark.parametrize("cap", [0.0, 4.0])
@pytest.mark.parametrize("raw_V", [[0.5, -1.0, 2.25], [-3.0, -1.25, -2.5]], ids=["", "negative"])
def test_every_rounding_is_in_the_bound_once(raw_V, cap):
    config, arrays, found = _found([raw_V], [1], reduction="none", logit_softcapping=cap)
    allowed = allowances(config, arrays, found, "float32")["loss"][1:, 0]
    z_V, _, err_z, _ = softcapped(np.array(raw_V), 0.0, cap)
    sm = softmax(z_V, err_z)
    h, err_h = entropy(sm, err_z)
    # Roundings of l, of the square and of the product, and one more as part of the loss.
    err_z_loss = 0.5 * abs(sm.lse) * (2 * sm.err_lse + 4 * U * abs(sm.lse))
    hit = float(np.argmax(z_V) == 1)
    errors = [stored(hit, 0.0), stored(h, err_h), stored(sm.lse, sm.err_lse), stored(1.0, 0.0)]
    np.testing.assert_allclose(allowed, [*errors, stored(0.5 * sm.lse**2, err_z_loss)], rtol=1e-10)


# The 8 u |m| up to which they are equal, the two roundings of a difference, and twice the 9 u |m| of a softcap.
@pytest.mark.parametrize("z", [[-4.0, -4.0], [4.0, 4.0]], ids=["negative", "positive"])
@pytest.mark.parametrize(
    ("cap", "roundings", "either"),
    [(0.0, 9.9, True), (0.0, 10.1, False), (1e6, 27.9, True), (1e6, 28.1, False), (0.0, 0.0, False)],
)
def test_accuracy_may_be_0_or_1_where_two_logits_are_equal_up_to_rounding(z, cap, roundings, either):
    config, arrays, found = _found([[z[0] - 4 * roundings * U, z[1]]], [0], reduction="none", logit_softcapping=cap)
    assert found.loss[1, 0] == (roundings == 0)
    assert allowances(config, arrays, found, "float32")["loss"][1, 0] == pytest.approx(
        float(either), rel=1e-6, abs=1e-6
    )
