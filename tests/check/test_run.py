"""`check` and `compare`: what they run, what they accept, what they refuse."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loss_core import (
    LOSS_CONFIG_REGISTRY,
    BackendUnavailable,
    FusedLinearCEConfig,
    LossConfig,
    MaskedCrossEntropyConfig,
)
from loss_core.check import assert_backends_agree, check, compare


def test_correct_kernels_pass():
    report = check(backends=["torch:eager"], dtypes=["float32", "bfloat16"])
    assert report.passed, str(report)
    assert {row.loss for row in report.rows} == set(LOSS_CONFIG_REGISTRY)
    assert all(row.cases >= 15 and row.worst is not None for row in report.rows)


def test_a_config_instance_is_kept_as_it_is():
    config = MaskedCrossEntropyConfig(reduction="none", ignore_index=3)
    report = check(config, ["torch:eager"], dtypes=["float32"])
    assert report.passed, str(report)
    cases = report.rows[0].cases
    assert cases < check("MaskedCrossEntropy", ["torch:eager"], dtypes=["float32"]).rows[0].cases


def test_shapes_random_cases_and_captured_inputs():
    report = check("KDLoss", ["torch:eager"], dtypes=["float32"], shape=(5, 33), num_random=7, seed=3)
    assert report.passed, str(report)
    again = check("KDLoss", ["torch:eager"], dtypes=["float32"], shape=(5, 33), num_random=7, seed=3)
    assert [row.worst for row in again.rows] == [row.worst for row in report.rows]
    captured = {"logits": np.random.default_rng(0).standard_normal((4, 9)), "labels": np.arange(4)}
    report = check("MaskedCrossEntropy", ["torch:eager"], dtypes=["float32"], inputs=captured)
    assert report.passed
    assert report.rows[0].cases == 1


def test_report_is_json():
    report = check("KDLoss", ["torch:eager"], dtypes=["float16"], only=["basic"])
    data = json.loads(report.to_json())
    assert data["passed"] is True
    assert data["rows"][0]["worst"]["case"] == "basic"
    assert sum(map(sum, (h.tolist() for h in report.histograms.values()))) > 1000


def test_bad_arguments():
    with pytest.raises(ValueError, match="Unknown backend flag 'torch:egaer'"):
        check("KDLoss", ["torch:egaer"])
    with pytest.raises(BackendUnavailable, match="torch:triton"):
        check("KDLoss", ["torch:triton"])
    with pytest.raises(ValueError, match="Unknown dtype 'fp8'"):
        check("KDLoss", ["torch"], dtypes=["fp8"])
    with pytest.raises(ValueError, match="shape must be"):
        check("KDLoss", ["torch"], shape=(3,))
    with pytest.raises(TypeError, match="Unknown loss name 'KD'"):
        check("KD", ["torch"])
    with pytest.raises(TypeError, match=r"no definition of LossConfig in float64.*compare"):
        check(LossConfig(), ["torch"])


def test_assert_backends_agree():
    assert_backends_agree(FusedLinearCEConfig(reduction="mean"), ["torch"], dtypes=["float32"])


def _log_softmax_loss(x, y):
    wide = x.float() if x.dtype != torch.float64 else x
    return F.cross_entropy(wide, y)


def _logsumexp_loss(x, y):
    wide = x.float() if x.dtype != torch.float64 else x
    return (torch.logsumexp(wide, -1) - wide.gather(1, y[:, None])[:, 0]).mean()


INPUTS = {
    "x": np.random.default_rng(0).standard_normal((16, 100)) * 3,
    "y": np.random.default_rng(1).integers(0, 100, 16),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_compare_accepts_two_ways_to_compute_the_same(dtype):
    report = compare(_log_softmax_loss, _logsumexp_loss, INPUTS, dtype=dtype, frameworks=("torch", "torch"))
    assert report.passed, str(report)
    assert {row.worst.tensor for row in report.rows} <= {"loss", "x"}


def test_compare_detects_a_formula_that_is_off_by_a_millionth():
    def off(x, y):
        return _logsumexp_loss(x, y) * (1 + 1e-6)

    report = compare(_log_softmax_loss, off, INPUTS, frameworks=("torch", "torch"))
    assert not report.passed


def test_compare_detects_sums_in_bfloat16():
    def coarse(x, y):
        return F.cross_entropy(x, y)

    report = compare(_log_softmax_loss, coarse, INPUTS, dtype="bfloat16", frameworks=("torch", "torch"))
    assert not report.passed
    assert compare(
        coarse, coarse, INPUTS, dtype="bfloat16", arithmetic="bfloat16", frameworks=("torch", "torch")
    ).passed


def test_compare_names_inputs_it_cannot_differentiate():
    with pytest.raises(ValueError, match=r"grad_of names \['y'\].*\['x'\]"):
        compare(_log_softmax_loss, _logsumexp_loss, INPUTS, grad_of=["y"], frameworks=("torch", "torch"))
