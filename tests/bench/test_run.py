"""`bench`: real processes on small shapes. Times depend on the machine, so none is asserted."""

from __future__ import annotations

import importlib
import json
import os
import sys

import pytest

from helpers.bench import by_name
from helpers.processes import workers_of
from loss_core import unregister_loss
from loss_core.baselines import TIMED, Baseline
from loss_core.bench import bench
from loss_core.bench.html import bench_page
from loss_core.bench.report import BenchReport, Missing, best_flag_of
from loss_core.bench.tables import growth_tables
from loss_core.bench.text import bench_text, markdown
from loss_core.bench.tune import choices_of
from loss_core.bench.workloads import Workload
from loss_core.dispatch.protocol import BackendUnavailable

# One thread: other tests run at the same time.
SMALL = {"threads": 1, "rounds": 2}


# In one process of pytest-xdist, so that the tests share the report.
pytestmark = pytest.mark.xdist_group("bench")


@pytest.fixture(scope="module")
def report():
    """One run on both frameworks, shared by several tests."""
    return bench(
        "KDLoss",
        ["torch:eager", "jax:xla"],
        shapes=[(64, 1000)],
        baselines=["plain-jax"],
        ignored=0.25,
        **SMALL,
    )


def test_every_implementation_has_time_memory_and_error(report):
    rows = by_name(report)
    assert next(iter(rows)) == "roofline"
    assert set(rows) == {"roofline", "torch:eager", "jax:xla", "plain-jax"}
    for name, row in rows.items():
        assert row.error == "", f"{name}: {row.error}"
        assert len(row.rounds) == 2
        assert row.seconds > 0
        if name != "roofline":
            assert row.first_call > 0
            assert row.calls >= 2
            assert row.loss_error < 1e-5
            assert row.grad_error < 1e-5
            assert not row.wrong
            assert row.error_ratio <= 1 or row.kind == "baseline"
            assert row.error_shape == (64, 1000)


def test_the_roofline_is_below_every_time(report):
    rows = by_name(report)
    assert all(rows["roofline"].seconds < row.seconds for name, row in rows.items() if name != "roofline")
    assert "2 reads + 1 write of the logits" in rows["roofline"].note


def test_each_round_has_a_different_order(report):
    (orders,) = report.orders
    assert len(orders) == 2
    assert len({tuple(sorted(order)) for order in orders}) == 1
    assert len({tuple(order) for order in orders}) > 1


def test_json_has_the_full_report(report):
    text = report.to_json()
    assert BenchReport.from_json(text) == report
    data = json.loads(text)
    assert data["settings"]["ignored"] == [0.25]
    assert {row["ignored"] for row in data["rows"]} == {0.25}
    assert data["versions"]["torch"]
    assert data["machine"]["cores"] >= 1
    assert all({"seconds", "spread", "peak", "grad_error"} <= set(row) for row in data["rows"])


def test_no_process_is_left(report):
    assert workers_of(os.getpid()) == []


WRONG = """
import torch
from dataclasses import dataclass
from loss_core import MaskedCrossEntropyConfig, register_loss
from loss_core_torch import MaskedCrossEntropy

@dataclass
class TwiceConfig(MaskedCrossEntropyConfig):
    pass

@dataclass
class DiesConfig(MaskedCrossEntropyConfig):
    pass

@dataclass
class SkipsConfig(MaskedCrossEntropyConfig):
    pass

class Dies(torch.nn.Module):
    def forward(self, logits, labels):
        import os, sys
        print("the last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 9)

def twice(config):
    right = MaskedCrossEntropy(reduction="mean")
    return lambda logits, labels: 2 * right(logits, labels)

register_loss("Twice", TwiceConfig, {"torch": twice})
def skips(config):
    right = MaskedCrossEntropy(reduction="sum")
    return lambda logits, labels: right(logits[:256], labels[:256]) / len(labels)

register_loss("Skips", SkipsConfig, {"torch": skips})
register_loss("Dies", DiesConfig, {"torch": lambda c: Dies()})
"""


@pytest.fixture
def wrong_losses(tmp_path, monkeypatch):
    """A user's module with losses that are wrong or kill their process."""
    (tmp_path / "wrong_losses.py").write_text(WRONG)
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__("wrong_losses")
    yield "wrong_losses"
    unregister_loss("Twice")
    unregister_loss("Dies")
    unregister_loss("Skips")
    del sys.modules["wrong_losses"]


def test_a_wrong_loss_is_never_best_and_one_that_kills_its_process_is_a_row_with_its_error(wrong_losses):
    # Dies last, so that the process that measured the others serves it as well.
    report = bench(["Twice", "Skips", "Dies"], ["torch:eager"], shapes=[(300, 100)], baselines=[],
                   imports=[wrong_losses], rounds=1, threads=1)  # fmt: skip
    twice, skips, dies = report.groups()
    rows = {row.implementation: row for row in twice}
    assert rows["torch:eager"].wrong
    assert rows["torch:eager"].loss_error == pytest.approx(1.0, rel=1e-3)
    assert best_flag_of(report.rows) is None
    assert choices_of(report) == []
    assert "WRONG" in bench_text(report)

    # Right on the 256 tokens of the reduced call, wrong beyond them.
    rows = {row.implementation: row for row in skips}
    assert rows["torch:eager"].loss_error < 1e-5
    assert rows["torch:eager"].grad_error > 0.1
    assert rows["torch:eager"].wrong

    # A process that dies is a row with its error; the others are still measured.
    rows = {row.implementation: row for row in dies}
    assert rows["torch:eager"].error == "its process was ended by SIGKILL (out of memory?): the last words"
    assert rows["torch:eager"].seconds is None
    assert rows["roofline"].seconds > 0
    assert "SIGKILL" in bench_text(report)


def test_a_workload_sets_its_softcap_and_baselines_that_cannot_run_are_listed(monkeypatch):
    absent = Baseline("absent", "nowhere", "torch", ("linear_cross_entropy",), ("no_such_package",),
                      "pip install no-such-package")  # fmt: skip
    monkeypatch.setitem(TIMED, "absent", absent)
    tiny = Workload("tiny", 8, 10, 4, softcap=5.0, source="nobody/tiny")
    report = bench("FusedLinearCrossEntropy", ["torch:eager"], workloads=[tiny],
                   baselines=["torch-linear-ce", "absent"], rounds=1, threads=1)  # fmt: skip
    rows = by_name(report)
    assert list(rows) == ["roofline", "torch:eager"]
    ours = rows["torch:eager"]
    assert (ours.loss, ours.shape) == ("FusedLinearCrossEntropy, tiny", (8, 10, 4))
    assert ours.config["logit_softcapping"] == 5.0
    assert ours.error_ratio <= 1
    assert report.missing == [
        Missing("absent", "needs no_such_package", "pip install no-such-package"),
        Missing("torch-linear-ce", "FusedLinearCrossEntropy, tiny: torch-linear-ce has no logit_softcapping."),
    ]
    assert "absent: needs no_such_package: pip install no-such-package" in bench_text(report)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"baselines": ["nobody"]}, ValueError, "Unknown baseline 'nobody'"),
        ({"config": "NoLoss"}, ValueError, "Unknown loss 'NoLoss'"),
        ({"backends": ["torch:fast"]}, ValueError, "Unknown backend flag 'torch:fast'"),
        ({"backends": ["torch:te"], "config": "MaskedCrossEntropy"}, BackendUnavailable, "torch:te"),
        ({"shapes": [(4,)]}, ValueError, r"shape must be \(T, V\)"),
        ({"config": "FusedLinearCrossEntropy", "shapes": [(4, 5)]}, ValueError, "hidden size"),
        ({"dtypes": ["int8"]}, ValueError, "int8"),
        ({"ignored": 1.0}, ValueError, "ignored must be a share"),
        ({"ignored": [0.5, -0.1]}, ValueError, r"ignored must be a share in \[0, 1\), got -0.1"),
        ({"rounds": 0}, ValueError, "rounds must be >= 1"),
        (
            {"count_known": True},
            ValueError,
            "count_known is for losses that take num_valid_tokens.*KDLossConfig does not",
        ),
        ({"config": "FusedLinearCrossEntropy", "count_known": True, "tp": 2}, ValueError, "not for tp=2"),
    ],
)
def test_an_invalid_request_raises_before_any_process_is_started(options, error, text):
    with pytest.raises(error, match=text):
        bench(**{"config": "KDLoss", "shapes": [(8, 10)], "baselines": []} | options)


def test_the_page_has_every_table_and_escapes_its_text(report):
    text = report.to_json().replace("KDLoss", "KD<b>Loss")
    page = bench_page(BenchReport.from_json(text))
    assert "KD&lt;b&gt;Loss, 64 x 1,000" in page
    assert "<b>Loss" not in page
    assert page.count("<svg") == 2
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_markdown_has_a_row_for_each_implementation(report):
    table = [line for line in markdown(report).splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(report.rows)
    assert len({line.count("|") for line in table}) == 1


def test_several_shares_are_separate_calls():
    report = bench("MaskedCrossEntropy", ["torch:eager"], shapes=[(64, 100)], ignored=[0.0, 0.5, 0.75, 0.5],
                   baselines=[], rounds=1, threads=1)  # fmt: skip
    assert [(r.implementation, r.ignored) for r in report.rows] == [
        (name, share) for share in (0.0, 0.5, 0.75) for name in ("roofline", "torch:eager")
    ]
    assert report.settings["ignored"] == [0.0, 0.5, 0.75]
    assert all(r.gradients == 4 * 64 * 100 for r in report.rows if r.kind == "flag")
    assert [group[0].ignored for group in report.groups()] == [0.0, 0.5, 0.75]
    assert [line.cells[0] for _, lines in growth_tables(report) for line in lines] == ["roofline", "torch:eager"]
    assert "MaskedCrossEntropy, 64 x 100, float32, forward + backward, 75% ignored" in bench_text(report)
    assert "MaskedCrossEntropy 64x100 float32, 50% ignored: torch:eager" in bench_text(report)
    assert BenchReport.from_json(report.to_json()) == report


# Without count_known one framework is enough, and a baseline receives no count in either case.
@pytest.mark.parametrize(
    ("known", "flags", "baselines"),
    [(False, ["jax:xla"], []), (True, ["torch:eager", "jax:xla"], ["plain-jax"])],
    ids=["unknown", "known"],
)
def test_a_known_count_is_passed_to_our_fused_loss_and_to_no_baseline(tmp_path, monkeypatch, known, flags, baselines):
    # A user-defined loss that asserts the count: on a small call the time would not show it.
    (tmp_path / "counted_losses.py").write_text(COUNTED)
    monkeypatch.syspath_prepend(str(tmp_path))
    counted = importlib.import_module("counted_losses")
    try:
        report = bench(counted.CountedConfig(reduction="mean"), flags, shapes=[(300, 50, 8)],
                       baselines=baselines, ignored=0.5, count_known=known, imports=["counted_losses"],
                       rounds=1, threads=1)  # fmt: skip
    finally:
        unregister_loss("Counted")
        del sys.modules["counted_losses"]
    rows = {row.implementation: row for row in report.rows}
    assert report.settings["count_known"] is known
    for flag in flags:
        assert rows[flag].error == ("" if known else "AssertionError: num_valid_tokens is None"), flag
        assert not known or ("num_valid_tokens" in rows[flag].note and not rows[flag].wrong)
    assert all((rows[baseline].error, rows[baseline].note) == ("", "") for baseline in baselines)


COUNTED = """
from dataclasses import dataclass
from loss_core import FusedLinearCEConfig, register_loss

@dataclass
class CountedConfig(FusedLinearCEConfig):
    pass

def counted(backend):
    def build(config):
        right = FusedLinearCEConfig(reduction="mean").build(backend=backend)
        def loss(*, num_valid_tokens=None, labels, **arrays):
            # Half of the labels, of the full call and of the reduced one.
            assert num_valid_tokens == len(labels) // 2, f"num_valid_tokens is {num_valid_tokens}"
            return right(labels=labels, num_valid_tokens=num_valid_tokens, **arrays)
        return loss
    return build

register_loss("Counted", CountedConfig, {"torch": counted("torch:eager"), "jax": counted("jax:xla")})
"""
