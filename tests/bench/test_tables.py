"""Cells, verdict, warnings."""

from __future__ import annotations

import pytest

from helpers.bench import row
from loss_core.bench.report import BASELINE, BenchReport, best_baseline_of, share_text
from loss_core.bench.tables import HEADINGS, lines_of, time_text, verdict, warnings_of


def test_ratios_stay_within_a_framework():
    rows = [
        row("roofline", 1.0),
        row("torch:eager", 2.0),
        row("jax:xla", 3.0),
        row("plain-torch", 4.0, BASELINE),
        row("plain-jax", 1.5, BASELINE),
        row("compiled-torch", 2.5, BASELINE),
    ]
    cells = {line.cells[0]: dict(zip(HEADINGS, line.cells, strict=True)) for line in lines_of(rows)}
    assert cells["torch:eager"]["x plain"] == "0.50"
    assert cells["torch:eager"]["x baseline"] == "0.80"
    assert cells["jax:xla"]["x baseline"] == "2.00"
    assert cells["torch:eager"]["of roofline"] == "50%"
    assert cells["roofline"]["x plain"] == cells["roofline"]["x baseline"] == ""
    assert verdict(BenchReport(rows=rows)).splitlines() == [
        "KDLoss 8x10 float32: torch:eager 2.00 s, 0.80 of compiled-torch's 2.50 s",
        "KDLoss 8x10 float32: jax:xla 3.00 s, 2.00 of plain-jax's 1.50 s",
    ]


def test_a_wrong_baseline_is_not_the_best_baseline():
    rows = [row("plain-torch", 4.0, BASELINE), row("cce", 1.0, BASELINE, loss_error=float("inf"))]
    assert best_baseline_of(rows, "torch") is rows[0]
    again = BenchReport.from_json(BenchReport(rows=rows).to_json())
    assert again.rows[1].loss_error == float("inf")


def test_a_busy_machine_is_a_warning():
    busy = BenchReport(machine={"load": 6.0, "cores": 2})
    assert "busy" in warnings_of(busy)[0]
    assert warnings_of(BenchReport(machine={"load": 0.1, "cores": 2})) == []


@pytest.mark.parametrize(("seconds", "text"), [(2.0, "2.00 s"), (0.0123, "12.3 ms"), (456e-6, "456 µs"), (None, "")])
def test_a_time_has_three_digits(seconds, text):
    assert time_text(seconds) == text


@pytest.mark.parametrize(("share", "text"), [(0.6, "60%"), (0.29, "29%"), (0.9375, "93.75%"), (1, "100%")])
def test_a_share_is_shown_exactly(share, text):
    assert share_text(share) == text
