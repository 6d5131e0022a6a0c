"""The report of a benchmark as one self-contained page: no script, no link, pictures inside."""

from __future__ import annotations

from loss_core.bench_figures import group_pictures, growth_pictures
from loss_core.bench_report import BenchReport
from loss_core.bench_tables import HEADINGS, LEGEND, facts_of, heading_of, lines_of, verdict, warnings_of
from loss_core.page import render_page


def bench_page(report: BenchReport) -> str:
    """The page; everything that comes from the report is escaped."""
    return render_page(
        "bench.html.j2",
        verdict=verdict(report).splitlines(),
        command=report.command or "loss_core.bench.bench(...)",
        facts=facts_of(report),
        legend=f"{LEGEND[:1].upper()}{LEGEND[1:]}.",
        warnings=warnings_of(report),
        headings=HEADINGS,
        groups=[(heading_of(g, report), lines_of(g), group_pictures(g)) for g in report.groups()],
        growth=growth_pictures(report),
        missing=report.missing,
    )
