"""`check_invariance` detects tokens whose results depend on the others, and reports what the flag promises.

The promises of torch's kernels are tested in tests/on_torch/test_batch_invariance.py.
"""

from dataclasses import fields, make_dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loss_core import (
    LOSS_CONFIG_REGISTRY,
    register_loss,
    unregister_loss,
)
from loss_core.check import check_invariance
from loss_core.dtypes import FORMATS, ordered
from loss_core.losses import definition_of

SMALL = (5, 24)


@pytest.fixture
def wrapped():
    """Registers a loss that is `wrong(right loss, config, **arguments)` in place of the right one."""

    def register(loss, wrong, kernel="torch:eager", definition=None):
        right_cls = LOSS_CONFIG_REGISTRY[loss]
        wrong_cls = make_dataclass("WrongConfig", (), bases=(right_cls,))

        def build(config):
            right = right_cls(**{f.name: getattr(config, f.name) for f in fields(config)}).build(backend=kernel)
            return lambda **call: wrong(right, config, **call)

        register_loss("Wrong", wrong_cls, {kernel: build}, definition=definition or definition_of(loss))
        return "Wrong"

    yield register
    unregister_loss("Wrong")


def minus_the_maximum_of_the_batch(right, config, logits, labels):
    finite = torch.where(logits.isfinite(), logits, 0.0)
    return right(logits - finite.amax(), labels)


def mean_over_the_batch(right, config, logits, labels):
    losses = right(logits, labels)
    return losses.detach() + (losses - losses.detach()) / losses.numel()


def nan_of_ignored_tokens(right, config, logits, labels):
    return right(logits, labels) + 0.0 * logits.detach().masked_fill(logits.isinf(), 0.0).sum()


@pytest.mark.parametrize(
    ("wrong", "tensor", "batch"),
    [
        (minus_the_maximum_of_the_batch, "logits", "among other tokens"),
        (mean_over_the_batch, "logits", "token 0 alone"),
        (nan_of_ignored_tokens, "loss", "between ignored tokens"),
    ],
)
def test_a_dependence_on_the_batch_is_found(wrong, tensor, batch, wrapped):
    report = check_invariance(wrapped("MaskedCrossEntropy", wrong), ["torch:eager"], dtypes=["float32"], shape=SMALL)
    (row,) = report.rows
    assert row.promised
    assert not row.holds
    assert not report.passed
    assert (row.tensor, row.batch) == (tensor, batch)
    assert 0 < row.differing < row.compared
    assert row.reproduce in str(report)


def test_a_dependence_on_the_chunk_size_is_found(wrapped):
    def wrong(right, config, **call):
        return right(**call) * (1.0 + 1e-6 * config.chunk_size)

    report = check_invariance(wrapped("KDLoss", wrong), ["torch:eager"], dtypes=["float32"], shape=SMALL)
    assert report.rows[0].batch == "with chunk_size=1"


def test_a_loss_without_our_kernels_differs_and_does_not_fail(wrapped):
    def own(right, config, logits, labels):
        return F.cross_entropy(logits - logits.amax(), labels, reduction="none", ignore_index=config.ignore_index)

    report = check_invariance(wrapped("MaskedCrossEntropy", own), ["torch:eager"], dtypes=["float32"], shape=SMALL)
    (row,) = report.rows
    assert not row.promised
    assert not row.holds
    assert report.passed
    assert "differs: " in str(report)


def test_auto_promises_nothing():
    (row,) = check_invariance("KDLoss", ["torch"], dtypes=["float32"], shape=SMALL).rows
    assert row.flag == "torch:auto"
    assert not row.promised


def test_a_fused_loss_promises_nothing():
    (row,) = check_invariance("FusedLinearCrossEntropy", ["torch:eager"], dtypes=["float32"], shape=(5, 24, 8)).rows
    assert not row.promised
    assert row.passed


def test_the_gradient_of_a_weight_is_not_compared():
    (row,) = check_invariance("FusedLinearCrossEntropy", ["torch:plain"], dtypes=["float64"], shape=(2, 3, 2)).rows
    # Loss and hidden states: 2 tokens, one at a time in two batches and in two halves, then three times both of them.
    assert row.compared == 2 * (2 + 2 + 3 * 2)


def test_an_exception_is_a_failure_of_its_row(wrapped):
    def wrong(right, config, logits, labels):
        if len(labels) == 1:
            raise RuntimeError("no such kernel image")
        return right(logits, labels)

    loss = wrapped("MaskedCrossEntropy", wrong)
    report = check_invariance([loss, "LogProbs"], ["torch:eager"], dtypes=["float32"], shape=SMALL)
    assert [row.passed for row in report.rows] == [False, True]
    assert "RuntimeError: no such kernel image" in str(report)


def test_a_mean_without_a_count_is_skipped(wrapped):
    definition = definition_of("KDLoss")
    arguments = tuple(a for a in definition.arguments if a.kind != "count" and not a.with_count)
    loss = wrapped("KDLoss", lambda right, config, **call: right(**call), definition=replace(
        definition, arguments=arguments
    ))  # fmt: skip
    report = check_invariance([loss, "KDLoss"], ["torch:eager"], dtypes=["float32"], shape=SMALL)
    assert [row.loss for row in report.rows] == ["KDLoss"]
    assert "how many there are" in report.skipped[0]


@pytest.mark.parametrize("dtype", FORMATS)
def test_ordered_counts_the_numbers_of_a_format(dtype):
    one, u, tiny = 1.0, FORMATS[dtype].u, FORMATS[dtype].tiny
    # Neighbours: below 1 numbers are u apart, above 2 u; the smallest ones 2 u tiny.
    numbers = np.array(
        [-one - 2 * u, -one, -one + u, -2 * u * tiny, -0.0, 0.0, 2 * u * tiny, one - u, one, one + 2 * u]
    )
    found = ordered(numbers, dtype)
    assert (np.diff(found)[[0, 1, 3, 4, 5, 7, 8]] == 1).all()
    assert (np.diff(found) > 0).all()
    assert ordered(np.array([np.nan]), dtype) == ordered(np.array([-np.nan]), dtype)
    assert ordered(np.array([np.inf]), dtype) > found[-1]
