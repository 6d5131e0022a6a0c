"""The report of a benchmark as text: on the terminal, plain, and as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from loss_core.bench.report import BenchReport, Missing
from loss_core.bench.tables import (
    GROWTH_HEADINGS,
    GROWTH_LEGEND,
    HEADINGS,
    LEGEND,
    Line,
    facts_of,
    growth_tables,
    heading_of,
    lines_of,
    verdict,
    warnings_of,
)

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {
    "roofline": "dim",
    "best": "bold green",
    "flag": "green",
    "baseline": "",
    "wrong": "bold red",
    "failed": "yellow",
}


def print_bench(console: Console, report: BenchReport) -> None:
    """Print the full report on a terminal."""
    for text, style in _text_lines(report, max(console.width - 1, 40)):
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def bench_text(report: BenchReport, width: int = 119) -> str:
    """The full report as plain text."""
    return "\n".join(text for text, _ in _text_lines(report, width))


def _text_lines(report: BenchReport, width: int) -> Iterator[tuple[str, str]]:
    """Lines and their styles. Tables are not wrapped, so that their columns stay aligned."""
    yield from _wrapped(" · ".join(f"{name} {value}" for name, value in facts_of(report).items()), width)
    for warning in warnings_of(report):
        yield from _wrapped(warning, width, "yellow")
    yield from _wrapped(LEGEND, width)
    for group in report.groups():
        lines = lines_of(group)
        yield "", ""
        yield heading_of(group, report), "bold"
        yield from _table(HEADINGS, [line for line in lines if line.style != "failed"])
        for line in lines:
            if line.note:
                style = "yellow" if line.style in ("failed", "wrong") else "dim"
                yield from _wrapped(f"{line.cells[0]}: {line.note}", width, style)
    growth = growth_tables(report)
    if growth:
        yield "", ""
        yield from _wrapped(f"Growth. {GROWTH_LEGEND}", width)
    for heading, lines in growth:
        yield "", ""
        yield heading, "bold"
        yield from _table(GROWTH_HEADINGS, lines)
    if report.missing:
        yield "", ""
        yield "Not measured here:", ""
        for missing in report.missing:
            yield from _wrapped(f"  {missing_text(missing)}", width)
    yield "", ""
    for text in verdict(report).splitlines():
        yield text, "bold"


def _table(headings: Sequence[str], lines: Sequence[Line]) -> Iterator[tuple[str, str]]:
    widths = [max(map(len, column)) for column in zip(headings, *(line.cells for line in lines), strict=True)]
    yield _aligned(headings, widths), "dim"
    for line in lines:
        yield _aligned(line.cells, widths), _STYLES[line.style]


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([first, *rest]).rstrip()


def missing_text(missing: Missing) -> str:
    """Why a flag or baseline was not measured, and the command that installs it."""
    install = f": {missing.install}" if missing.install and missing.install not in missing.reason else ""
    return f"{missing.name}: {missing.reason}{install}"


def _wrapped(text: str, width: int, style: str = "") -> Iterator[tuple[str, str]]:
    for line in textwrap.wrap(
        text, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    ):  # fmt: skip
        yield line, style


def markdown(report: BenchReport) -> str:
    """The tables as Markdown; those of growth first, which summarize the tables of the calls."""
    growth = [part for heading, lines in growth_tables(report) for part in _markdown(heading, GROWTH_HEADINGS, lines)]
    calls = [part for g in report.groups() for part in _markdown(heading_of(g, report), HEADINGS, lines_of(g))]
    return "\n".join([*growth, *calls])


def _markdown(heading: str, headings: Sequence[str], lines: Sequence[Line]) -> list[str]:
    parts = [f"**{heading}**", "", "| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for line in lines:
        cells = line.cells
        if line.style == "failed":
            cells = (cells[0], line.note, *[""] * (len(headings) - 2))
        name = f"**{cells[0]}**" if line.style in ("best", "flag") else cells[0]
        note = f" ({line.note})" if line.note and line.style != "failed" else ""
        parts.append("| " + " | ".join([f"{name}{note}", *cells[1:]]).replace("  ", " ") + " |")
    return [*parts, ""]
