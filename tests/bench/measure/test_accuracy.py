"""The errors in a report: a wrong result must show."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.bench import job, row
from loss_core import FusedLinearCEConfig, KDLossConfig, MaskedCrossEntropyConfig
from loss_core.bench.measure.accuracy import AccuracyCheck, relative_error
from loss_core.bench.measure.job import Job, make_inputs, sampled_tokens
from loss_core.losses import evaluate


def test_the_relative_error_is_inf_for_nan_and_for_another_shape():
    assert relative_error(np.array([1.0, np.nan]), np.array([1.0, 2.0])) == float("inf")
    assert relative_error(np.zeros(3), np.ones(2)) == float("inf")
    assert relative_error(np.array([3.0, 4.0]), np.array([3.0, 4.0])) == 0
    assert relative_error(np.zeros(2), np.array([3.0, 4.0])) == 1


def test_a_weight_gradient_that_skips_a_block_of_tokens_is_found():
    call = Job(FusedLinearCEConfig(reduction="mean").to_dict(), (64, 40, 8), "float32", ignored=0.25)
    tiles, labels = make_inputs(call)
    arrays = {name: tile.full().astype(np.float64) for name, tile in tiles.items()} | {"labels": labels}
    right = evaluate(call.loss_config(), arrays)
    hidden, weight = arrays["hidden_states"], arrays["lm_weight"]
    sample = {"loss": right.loss, "rows": right.grads["hidden_states"][sampled_tokens(call)]}
    of_hidden = float(np.sum(hidden * right.grads["hidden_states"]))
    of_weight = float(np.sum(weight * right.grads["lm_weight"]))
    check = AccuracyCheck(call)
    reduced = {"loss": right.loss, **right.grads}
    rows = [row("torch:eager", 1.0) for _ in range(2)]
    check.fill_errors(rows[0], [reduced], [sample | {"inner": np.array([of_hidden, of_weight])}])
    check.fill_errors(rows[1], [reduced], [sample | {"inner": np.array([of_hidden, 0.75 * of_weight])}])
    assert rows[0].grad_error < 1e-12
    assert rows[1].grad_error == pytest.approx(0.25, rel=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("config", [MaskedCrossEntropyConfig, FusedLinearCEConfig])
def test_metrics_do_not_change_the_gradient(config, reduction):
    shape = (64, 40, 8) if config is FusedLinearCEConfig else (64, 40)
    plain, with_metrics = (
        AccuracyCheck(Job(config(reduction=reduction, metrics=metrics).to_dict(), shape, "float32")).expected_rows
        for metrics in ((), ("entropy", "lse"))
    )
    assert np.abs(plain).max() > 0
    np.testing.assert_array_equal(with_metrics, plain)


def test_a_loss_of_the_full_call_that_differs_from_all_others_is_an_error():
    call = Job(KDLossConfig().to_dict(), (8, 10), "float32", forward_only=True)
    check = AccuracyCheck(call)
    rows = [row(name, 1.0) for name in ("a", "b", "c")]
    for found, value in zip(rows, (1.0, 1.0001, 1.5), strict=True):
        check.fill_errors(found, [check.expected], [{"loss": np.asarray(value)}])
    check.compare_losses(rows)
    assert [found.wrong for found in rows] == [False, False, True]


def test_a_gradient_that_is_wrong_on_one_rank_is_found():
    check = AccuracyCheck(job("linear_cross_entropy", 40))
    right, found = check.expected, row("torch:eager", 1.0)
    per_rank = [
        {name: value[:20] if name == "lm_weight" else value for name, value in right.items()},
        {name: value[20:] if name == "lm_weight" else 2 * value if name == "hidden_states" else value
         for name, value in right.items()},
    ]  # fmt: skip
    sample = [{"loss": right["loss"], "rows": check.expected_rows}] * 2
    check.fill_errors(found, per_rank, sample)
    assert found.grad_error == pytest.approx(1.0)
    assert found.loss_error == 0
