"""The report of a check as one self-contained HTML page: no scripts, no external files, figures inline."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.check.cells import condition_text, finds_text, lower_text, worst_of, worst_text
from loss_core.check.judge.matrix import matrices, reasons_not_judged
from loss_core.check.report import HISTOGRAM_EDGES, Report, Row
from loss_core.check.run import DTYPES
from loss_core.check.text import failures_by_command, harder_notes, insensitive_notes, reason_without_install, verdict
from loss_core.page import blank_figure, head, render_page, svg_of, without_frame

# Colour-blind safe (Okabe & Ito), and apart in lightness, so that a grey print can be read too.
_COLOURS = {"float32": "#0072b2", "bfloat16": "#d55e00", "float16": "#009e73", "float64": "#4d4d4d"}
_BAD = "#c62828"


def check_page(report: Report, command: str) -> str:
    """The HTML page of a report; all text from the report is escaped.

    Args:
        command: the command line that produced the report.
    """
    return render_page(
        "check/page.html.j2",
        **head(verdict(report), good=report.passed, command=command, versions=report.versions),
        groups=[(loss, [_cells(row) for row in rows]) for loss, rows in groupby(report.rows, key=lambda row: row.loss)],
        matrices=list(matrices(report)),
        broken=[(verdict, verdict.worst) for verdict in report.broken],
        not_judged=reasons_not_judged(report),
        harder=harder_notes(report),
        insensitive=insensitive_notes(report),
        failures=list(failures_by_command(report)),
        figures=_figures(report),
        unusable=[(status.flag, reason_without_install(status), status.install) for status in report.unusable],
        skipped=report.skipped,
    )


def _cells(row: Row) -> dict[str, Any]:
    worst = worst_of(row)
    ratio, where = worst_text(worst)
    number = worst.error_ratio if worst is not None and not worst.problem else 0.0
    return {
        "passed": row.passed,
        "flag": row.flag,
        "against": row.against,
        "dtype": row.dtype,
        "cases": row.cases,
        "lower": lower_text(row),
        "insensitive": bool(row.insensitive),
        "condition": condition_text(row),
        "ratio": ratio,
        "finds": finds_text(row),
        "where": where,
        # Length of the bar; an error above the allowance fills it.
        "percent": round(100 * min(number, 1.0), 1) if np.isfinite(number) else 100,
        "failures": len(row.failures),
    }


def _figures(report: Report) -> list[tuple[str, str, str]]:
    """For each flag: its name, the caption, the histograms as SVG."""
    figures = []
    # Bin 0 counts errors below all edges.
    first_above = int(np.searchsorted(HISTOGRAM_EDGES, 0.0)) + 1
    for flag in dict.fromkeys(flag for flag, _ in report.histograms):
        counts = {dtype: c for (name, dtype), c in report.histograms.items() if name == flag}
        above = sum(int(c[first_above:].sum()) for c in counts.values())
        total = sum(int(c.sum()) for c in counts.values())
        caption = f"{total:,} values compared with float64; {above:,} beyond their allowance"
        figures.append((flag, caption, _histograms(counts)))
    return figures


def _histograms(counts: Mapping[str, NDArray[np.int64]]) -> str:
    """Stacked histograms of log10(error / allowance), one per dtype, as an SVG element."""
    with blank_figure(6.2, 0.9 + 0.95 * len(counts)) as figure:
        panels = figure.subplots(len(counts), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, dtype in zip(panels, sorted(counts, key=DTYPES.index), strict=True):
            _draw(axes, counts[dtype], _COLOURS[dtype])
            axes.set_ylabel(
                dtype, rotation=0, ha="right", va="center", labelpad=8, color=_COLOURS[dtype], weight="bold"
            )
        top = max(int(c.max()) for c in counts.values())
        panels[0].set_ylim(0.5, max(top, 10) * 2)
        panels[-1].set_xticks(*_ticks())
        panels[-1].set_xlabel("error / allowance")
        figure.supylabel("number of values", fontsize=11)
        return svg_of(figure)


# Wide bins at the ends count exact results, and those above the last edge.
_END = 3 * float(HISTOGRAM_EDGES[1] - HISTOGRAM_EDGES[0])
_BINS = np.concatenate([[HISTOGRAM_EDGES[0] - _END], HISTOGRAM_EDGES, [HISTOGRAM_EDGES[-1] + _END]])


def _draw(axes: Any, counts: NDArray[np.int64], colour: str) -> None:
    axes.axvspan(0, _BINS[-1], color=_BAD, alpha=0.08, linewidth=0)
    # From 0.5, so that a count of 1 is visible on the logarithmic axis.
    axes.stairs(counts, _BINS, baseline=0.5, color=colour, alpha=0.30, fill=True)
    axes.stairs(np.maximum(counts, 0.5), _BINS, baseline=0.5, color=colour, linewidth=1.4)
    axes.axvline(0, color=_BAD, linewidth=1.6)
    axes.set_yscale("log")
    axes.set_yticks([1, 1e3, 1e6], ["1", "1k", "1M"])
    axes.tick_params(axis="y", which="minor", left=False)
    axes.tick_params(axis="y", labelsize=9)
    axes.set_xlim(_BINS[0], _BINS[-1])
    without_frame(axes)
    axes.grid(axis="y", color="#e4e7ec", linewidth=0.8)
    axes.set_axisbelow(True)


def _ticks() -> tuple[list[float], list[str]]:
    decades = np.arange(np.ceil(HISTOGRAM_EDGES[0]) + 1, np.floor(HISTOGRAM_EDGES[-1]))
    ends = [float(_BINS[:2].mean()), float(_BINS[-2:].mean())]
    names = ["exact", *map(_power, decades), f"> {_power(HISTOGRAM_EDGES[-1])}"]
    return [ends[0], *map(float, decades), ends[1]], names


def _power(exponent: float) -> str:
    return {0: "1", 1: "10", 2: "100", -1: "0.1"}.get(int(exponent), f"1e{int(exponent)}")
