"""The allowances can fail: kernels that compute in the next lower arithmetic do, as `Row.lower` predicts."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loss_core import FusedLinearCEConfig, FusedLinearKDConfig
from loss_core.check import check, compare
from loss_core.losses import evaluate, named_cases
from loss_core.losses.bounds.sensitivity import condition_number


def in_bfloat16(loss_of):
    """A loss computed in bfloat16; the result is converted to float32."""

    def wrong(right, config, labels, **logits):
        keep, vocab = labels != config.ignore_index, next(iter(logits.values())).shape[-1]
        rows = [z.bfloat16().reshape(-1, vocab)[keep.flatten()] for z in logits.values()]
        return loss_of(*rows, labels[keep]).float()

    return wrong


def cross_entropy(z, labels):
    return F.cross_entropy(z, labels, reduction="sum")


def distillation(student, teacher, labels):
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


class TF32(torch.autograd.Function):
    """Rounds to the 11 significant bits of an operand; its backward is the identity."""

    @staticmethod
    def forward(ctx, x):
        kept = (x.view(torch.int32) + (1 << 12)) & ~((1 << 13) - 1)
        return kept.view(torch.float32)

    @staticmethod
    def backward(ctx, grad):
        return grad


def tf32_operands(right, config, hidden_states, lm_weight, **call):
    return right(hidden_states=TF32.apply(hidden_states), lm_weight=TF32.apply(lm_weight), **call)


def bfloat16_logits(right, config, hidden_states, labels, lm_weight):
    logits = (hidden_states @ lm_weight.T).float()
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum", ignore_index=config.ignore_index)


def bfloat16_accumulator(right, config, hidden_states, labels, lm_weight):
    # Autograd adds the gradients of the parts in the weight's dtype.
    parts = zip(hidden_states.flatten(0, -2).split(8), labels.flatten().split(8), strict=True)
    return sum(right(h, y, lm_weight) for h, y in parts)


LOWER = [
    ("MaskedCrossEntropy", "float32", "bfloat16 softmax", in_bfloat16(cross_entropy)),
    ("MaskedCrossEntropy", "bfloat16", "bfloat16 softmax", in_bfloat16(cross_entropy)),
    ("KDLoss", "float32", "bfloat16 softmax", in_bfloat16(distillation)),
    ("KDLoss", "bfloat16", "bfloat16 softmax", in_bfloat16(distillation)),
    ("FusedLinearCrossEntropy", "float32", "TF32 products", tf32_operands),
    ("FusedLinearCrossEntropy", "bfloat16", "bfloat16 logits", bfloat16_logits),
    ("FusedLinearCrossEntropy", "bfloat16", "bfloat16 accumulator", bfloat16_accumulator),
]


@pytest.mark.parametrize(
    ("loss", "dtype", "arithmetic", "wrong"), LOWER, ids=["-".join(row[:3]).replace(" ", "-") for row in LOWER]
)
def test_kernels_in_lower_arithmetic_fail_where_the_row_says_so(loss, dtype, arithmetic, wrong, inject):
    inject(loss, wrong)
    report = check(["Wrong", loss], ["torch:eager"], dtypes=[dtype], only=["none-ignored"])
    rows = {row.loss: row for row in report.rows}
    assert rows[loss].passed, str(report)
    assert rows[loss].lower[arithmetic] == 1
    assert not rows["Wrong"].passed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_a_row_of_cases_that_detect_nothing_is_insensitive(dtype):
    report = check("FusedLinearCrossEntropy", ["torch:eager"], dtypes=[dtype], only=["all-ignored", "vocab-1"])
    (row,) = report.rows
    assert report.passed
    assert row.insensitive == list(row.lower)
    assert set(row.lower.values()) == {0}
    assert str(report).endswith(f", insensitive to {' and '.join(row.lower)}")
    (read,) = json.loads(report.to_json())["rows"]
    assert (read["lower"], read["insensitive"]) == (row.lower, row.insensitive)


def test_a_row_counts_the_cases_that_each_lower_arithmetic_fails():
    cases = ["basic", "all-ignored", "huge-logits"]
    (row,) = check("FusedLinearCrossEntropy", ["torch:eager"], dtypes=["bfloat16"], only=cases).rows
    assert row.cases == 3
    assert row.lower == {"bfloat16 logits": 2, "bfloat16 accumulator": 1}
    assert row.insensitive == []


# Few tokens: a sum of the weight's gradient in 16 bits passes every named case.
SMALL = {"dtypes": ["bfloat16"], "shape": (4, 16, 8)}


def test_an_insensitive_row_gets_a_harder_case():
    report = check("FusedLinearCrossEntropy", ["torch:eager", "torch:plain"], against="torch:plain", **SMALL)
    names = [case.name for case in named_cases("FusedLinearCrossEntropy", shape=SMALL["shape"])]
    assert report.passed, str(report)
    for row in report.rows:
        assert (row.cases, row.harder) == (len(names) + 1, ["harder-1"])
        assert row.lower["bfloat16 accumulator"] == 1
    assert (report.calls, report.total) == (len(names) + 1, len(names) + 1)
    assert f"{len(names) + 1} cases with harder-1, worst" in str(report)
    assert [row["harder"] for row in json.loads(report.to_json())["rows"]] == [["harder-1"]] * len(report.rows)


def test_the_harder_case_fails_a_kernel_that_passes_all_others(inject):
    config = inject("FusedLinearCrossEntropy", bfloat16_accumulator)
    # One random case alone, of those without optional arguments.
    report = check(config, ["torch"], num_random=1, seed=22, first=0, **SMALL)
    assert {finding.case for finding in report.failures} == {"harder-1"}
    assert {finding.tensor for finding in report.failures} == {"lm_weight"}
    assert report.failures[0].reproduce.endswith(" --backend torch:auto --dtype bfloat16 --case harder-1")
    again = check(config, ["torch"], dtypes=["bfloat16"], only=["harder-1"])
    assert [str(finding) for finding in again.failures] == [str(finding) for finding in report.failures]


@pytest.mark.parametrize(
    ("config", "harder", "insensitive"),
    [
        (FusedLinearKDConfig(temperature=100.0), ["harder-1", "harder-2"], []),
        # All logits are between -0.001 and 0.001.
        (
            FusedLinearCEConfig(logit_softcapping=0.001),
            ["harder-1", "harder-2", "harder-3"],
            ["float16 logits", "float16 accumulator"],
        ),
    ],
    ids=["second", "none"],
)
def test_harder_cases_end_when_one_is_sensitive_or_after_three(config, harder, insensitive):
    (row,) = check(config, ["torch:eager"], dtypes=["float16"]).rows
    assert (row.harder, row.insensitive) == (harder, insensitive)


def test_no_harder_cases_are_added_to_selected_ones():
    (case,) = named_cases("FusedLinearCrossEntropy", shape=SMALL["shape"], only=("basic",))
    for selected in ({"only": ["basic"]}, {"inputs": case.arrays}):
        options = {"dtypes": ["bfloat16"]} if "inputs" in selected else SMALL
        (row,) = check("FusedLinearCrossEntropy", ["torch:eager"], **options, **selected).rows
        assert (row.cases, row.harder, row.insensitive) == (1, [], ["bfloat16 accumulator"])


def test_one_undetected_arithmetic_is_enough():
    (row,) = check("FusedLinearCrossEntropy", ["torch:eager"], dtypes=["bfloat16"], only=["huge-logits"]).rows
    assert row.insensitive == ["bfloat16 accumulator"]


def test_two_flags_against_each_other_can_fail_as_well():
    report = check("MaskedCrossEntropy", ["torch:eager", "jax:xla"], dtypes=["float32"], only=["basic", "all-ignored"])
    assert [(row.against, row.lower) for row in report.rows] == [
        ("float64", {"bfloat16 softmax": 1}),
        ("float64", {"bfloat16 softmax": 1}),
        ("jax:xla", {"bfloat16 softmax": 1}),
    ]


def test_between_two_flags_allowances_add_up_and_more_passes():
    report = check("FusedLinearCrossEntropy", ["torch:eager"], dtypes=["bfloat16"], only=["softcap-ragged"],
                   against="torch:plain")  # fmt: skip
    lower = {row.against: row.lower for row in report.rows if row.flag == "torch:eager"}
    assert lower["float64"] == {"bfloat16 logits": 1, "bfloat16 accumulator": 1}
    assert lower["torch:plain"] == {"bfloat16 logits": 0, "bfloat16 accumulator": 1}


def test_a_row_has_the_condition_of_its_worst_call():
    (row,) = check("MaskedCrossEntropy", ["torch:eager"], dtypes=["float64"], only=["offset", "mean"]).rows
    (case,) = named_cases("MaskedCrossEntropy", only=(row.worst.case,))
    assert row.worst.condition == pytest.approx(condition_number(case.arrays, evaluate(case.config, case.arrays)))
    (empty,) = check("MaskedCrossEntropy", ["torch:eager"], dtypes=["float32"], only=["all-ignored"]).rows
    assert np.isnan(empty.worst.condition)


def test_two_callables_without_a_definition_have_no_lower_arithmetic():
    def double(x):
        return x * 2

    report = compare(double, double, {"x": np.ones(3)}, frameworks=("torch", "torch"))
    assert all(row.lower == {} and row.insensitive == [] for row in report.rows)
