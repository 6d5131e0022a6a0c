"""Metrics by hand, and how near two logits must be for accuracy to be either."""

import numpy as np
import pytest

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


def test_accuracy_is_exact_unless_two_logits_are_as_near_as_rounding():
    near = np.nextafter(np.float32(3.0), np.float32(4.0))
    config, arrays, found = _found([[3.0, near, 0.0], [3.0, 3.1, 0.0]], [0, 0], reduction="none")
    allowed = allowances(config, arrays, found, "float32")["loss"][1]
    assert found.loss[1].tolist() == [0, 0]
    assert allowed[0] >= 1
    assert allowed[1] < 1e-6
