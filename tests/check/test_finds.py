"""The smallest errors that a check detects: some far below the rounding of 16 bits; right kernels pass."""

import json

import numpy as np
import pytest
import torch

from loss_core.check import check
from loss_core.registry import our_losses


def scaled(factor):
    """An identity whose gradient is multiplied, in the dtype of the arithmetic."""

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.float()

        @staticmethod
        def backward(ctx, grad):
            return grad * factor

    return Identity.apply


def teacher_gradient_off_by_3e_4(right, config, student_logits, teacher_logits, labels):
    return right(student_logits.float(), scaled(1 + 3e-4)(teacher_logits), labels)


def count_off_by_one(right, config, logits, labels):
    valid = (labels != config.ignore_index).sum()
    return right(logits, labels) * valid / (valid + 1)


def tile_dropped_from_one_row(right, config, logits, labels):
    """The sum over the vocabulary excludes 16 columns of the last row: those with the least probability."""
    keep = labels != config.ignore_index
    with torch.no_grad():
        tiles = logits[-1, :496].float().exp().unflatten(0, (31, 16)).sum(-1)
    dropped = torch.zeros(logits.shape, dtype=torch.bool)
    start = 16 * int(tiles.argmin())
    dropped[-1, start : start + 16] = True
    lse = logits.float().masked_fill(dropped, -torch.inf).logsumexp(-1)
    target = logits.float().gather(-1, torch.where(keep, labels, 0)[..., None])[..., 0]
    return torch.where(keep, lse - target, 0.0).sum()


def failed(report):
    return {(finding.loss, finding.dtype, finding.tensor) for finding in report.failures}


DTYPES = ["float32", "bfloat16"]


def test_a_relative_error_of_3e_4_in_one_gradient_is_found_in_its_own_row_alone(inject):
    inject("KDLoss", teacher_gradient_off_by_3e_4)
    report = check(["Wrong", "KDLoss"], ["torch:eager"], dtypes=["bfloat16"], only=["basic"])
    assert failed(report) == {("Wrong", "bfloat16", "teacher_logits")}
    assert "before it was rounded to bfloat16" in report.failures[0].what


def test_a_count_off_by_one_in_4096_is_found(inject):
    config = inject("MaskedCrossEntropy", count_off_by_one, reduction="mean")
    report = check(config, ["torch:eager"], dtypes=DTYPES, only=["none-ignored"], shape=(4096, 33))
    assert failed(report) == {("Wrong", dtype, tensor) for dtype in DTYPES for tensor in ("loss", "logits")}


def test_a_tile_dropped_from_the_sum_of_one_row_in_a_thousand_is_found(inject):
    config = inject("MaskedCrossEntropy", tile_dropped_from_one_row, reduction="sum")
    report = check(config, ["torch:eager"], dtypes=DTYPES, only=["none-ignored"], shape=(1000, 507))
    found = {(f.dtype, f.tensor): f.position[:1] for f in report.failures}
    assert found["float32", "logits"] == found["bfloat16", "logits"] == (999,)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_right_kernels_pass_random_cases(dtype):
    random = [f"random-0-{i}" for i in range(20)]
    report = check(our_losses(), ["torch:eager"], dtypes=[dtype], only=random, num_random=len(random))
    assert report.passed, str(report)
    assert sum(row.cases for row in report.rows) == 20 * len(our_losses())


def test_a_row_has_the_smallest_error_it_detects_and_json_that_of_each_tensor():
    report = check("MaskedCrossEntropy", ["torch:eager", "torch:plain"], dtypes=["float32", "bfloat16"], only=["basic"])
    fine = {row.dtype: row for row in report.rows}
    assert set(fine["float32"].finds) == {"loss", "logits"}
    assert max(fine["float32"].finds.values()) < 3e-6
    assert fine["bfloat16"].coarsest < 1e-4
    read = json.loads(report.to_json())["rows"][0]
    assert read["coarsest"] == max(read["finds"].values())


def test_finds_is_the_minimum_over_cases_and_coarsest_the_maximum_over_tensors():
    one = check("KDLoss", ["torch:eager"], dtypes=["float32"], only=["basic"]).rows[0]
    other = check("KDLoss", ["torch:eager"], dtypes=["float32"], only=["huge-logits"]).rows[0]
    both = check("KDLoss", ["torch:eager"], dtypes=["float32"], only=["basic", "huge-logits"]).rows[0]
    assert both.finds == {name: min(one.finds[name], other.finds[name]) for name in one.finds}
    assert both.coarsest == max(both.finds.values())


def test_tensors_of_zeros_have_no_relative_error():
    (row,) = check("MaskedCrossEntropy", ["torch:eager"], dtypes=["float32"], only=["all-ignored"]).rows
    assert (row.finds, row.coarsest, row.cases) == ({}, None, 1)


def test_two_flags_against_each_other_may_differ_by_both_allowances():
    report = check("MaskedCrossEntropy", ["torch:eager", "jax:xla"], dtypes=["float32"], only=["basic"])
    oracle, _, pair = report.rows
    assert pair.against == "jax:xla"
    assert pair.finds["logits"] == pytest.approx(2 * oracle.finds["logits"], rel=1e-3)
    assert np.isfinite(pair.coarsest)
