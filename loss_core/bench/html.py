"""The report of a benchmark as one self-contained HTML page: no scripts, no links, inline figures."""

from __future__ import annotations

from loss_core.bench.figures import group_pictures, growth_pictures
from loss_core.bench.report import BenchReport
from loss_core.bench.tables import (
    GROWTH_HEADINGS,
    GROWTH_LEGEND,
    HEADINGS,
    LEGEND,
    facts_of,
    growth_tables,
    heading_of,
    lines_of,
    verdict,
    warnings_of,
)
from loss_core.page import render_page


def bench_page(report: BenchReport) -> str:
    """The page as HTML; everything from the report is escaped."""
    return render_page(
        "bench/page.html.j2",
        verdict=verdict(report).splitlines(),
        bad=False,
        command=report.command or "loss_core.bench.bench(...)",
        facts=facts_of(report),
        legend=_sentence(LEGEND),
        warnings=warnings_of(report),
        headings=HEADINGS,
        groups=[(heading_of(g, report), lines_of(g), group_pictures(g)) for g in report.groups()],
        growth_headings=GROWTH_HEADINGS,
        growth_legend=_sentence(GROWTH_LEGEND),
        growth_tables=growth_tables(report),
        growth=growth_pictures(report),
        missing=report.missing,
    )


def _sentence(legend: str) -> str:
    return f"{legend[:1].upper()}{legend[1:]}."
