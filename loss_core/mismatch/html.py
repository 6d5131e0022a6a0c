"""The report on a trainer and its engine as one self-contained HTML page."""

from __future__ import annotations

import numpy as np

from loss_core.mismatch.report import MismatchReport, rows_of
from loss_core.mismatch.statistics import BANDS, HISTOGRAM_EDGES, Statistics
from loss_core.mismatch.text import (
    HYPOTHESIS_HEADINGS,
    LEGEND,
    TOKEN_HEADINGS,
    explanation_heading,
    hypothesis_cells,
    statistics_lines,
    token_cells,
)
from loss_core.page import blank_figure, head, render_page, svg_of, without_frame

# Colour-blind safe (Okabe & Ito).
_BLUE, _RED = "#0072b2", "#c62828"


def mismatch_page(report: MismatchReport, command: str) -> str:
    """The HTML page of a report from `explain`; all text from the report is escaped.

    Args:
        command: the command line that produced the report.
    """
    return render_page(
        "mismatch/page.html.j2",
        **head(report.conclusion, good=report.agree, command=command, versions={}),
        lines=statistics_lines(report.statistics),
        histogram=_histogram(report.statistics),
        token_headings=TOKEN_HEADINGS,
        tokens=[token_cells(token) for token in report.statistics.worst],
        headings=HYPOTHESIS_HEADINGS,
        systems=[
            (explanation_heading(e), [(word, hypothesis_cells(word, outcome)) for word, outcome in rows_of(e)])
            for e in report.explanations.values()
        ],
        legend=LEGEND,
        notes=report.notes,
    )


def _histogram(statistics: Statistics) -> str:
    """Histogram of log10 |difference|, with the bands as vertical lines, as an SVG element."""
    width = float(HISTOGRAM_EDGES[1] - HISTOGRAM_EDGES[0])
    edges = np.concatenate([[HISTOGRAM_EDGES[0] - width], HISTOGRAM_EDGES, [HISTOGRAM_EDGES[-1] + width]])
    with blank_figure(6.2, 2.4) as figure:
        axes = figure.subplots()
        axes.stairs(statistics.histogram, edges, color=_BLUE, fill=True, alpha=0.5)
        for band in BANDS:
            axes.axvline(np.log10(band), color=_RED, linewidth=1.2)
        axes.set_xlabel("|difference|, in nats, as a power of ten")
        axes.set_ylabel("tokens")
        without_frame(axes)
        return svg_of(figure)
