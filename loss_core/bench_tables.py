"""The benchmark as a table: the cells, and how the terminal and Markdown show them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from loss_core.bench_report import (
    FLAG,
    BenchReport,
    BenchRow,
    Missing,
    best_flag_of,
    best_peer_of,
    floor_of,
    framework_of,
    plain_of,
)

if TYPE_CHECKING:
    from rich.console import Console

HEADINGS = ("", "time", "±", "x plain", "x peer", "of floor", "memory", "first call", "loss error", "grad error")

LEGEND = (
    "time: median of the rounds; ±: spread of the middle half; x plain, x peer: share of the time of the plain "
    "implementation and of the best peer, on the same framework; of floor: floor / time; memory: most held above the "
    "inputs, gradients included; errors: relative, against float64"
)


@dataclass(frozen=True)
class Line:
    """One row of a table, as text.

    Attributes:
        cells: one per heading.
        note: what stands behind the cells.
        style: "floor", "best" (our fastest), "flag", "peer", "wrong" or "failed".
    """

    cells: tuple[str, ...]
    note: str
    style: str


def lines_of(group: Sequence[BenchRow]) -> list[Line]:
    """The rows of a group: the floor, then ours and the peers from fast to slow, then what failed."""
    floor = floor_of(group)
    ours = best_flag_of(group)
    ordered = sorted(group, key=lambda row: (row.kind != "floor", row.seconds is None, row.seconds or 0.0))
    made = []
    for row in ordered:
        plain, peer = plain_of(group, framework_of(row)), best_peer_of(group, framework_of(row))
        style = "failed" if row.seconds is None else "wrong" if row.wrong else "best" if row is ours else row.kind
        cells = (
            row.implementation,
            time_text(row.seconds),
            "" if row.spread is None else f"{row.spread:.0%}",
            _ratio(row.seconds, plain.seconds if plain else None),
            _ratio(row.seconds, peer.seconds if peer else None),
            f"{floor / row.seconds:.0%}" if floor and row.seconds else "",
            "" if row.kind == "floor" else memory_text(row.peak),
            "" if row.kind == "floor" else time_text(row.first_call),
            error_text(row.loss_error),
            error_text(row.grad_error),
        )
        made.append(Line(cells, f"WRONG: {row.note}".rstrip(": ") if row.wrong else row.error or row.note, style))
    return made


def time_text(seconds: float | None) -> str:
    """A time with three digits and its unit."""
    if seconds is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            return f"{_digits(seconds / size)} {unit}"
    raise AssertionError


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def memory_text(peak: int | None) -> str:
    """Bytes as MiB."""
    return "" if peak is None else f"{peak / 2**20:,.0f} MiB"


def error_text(error: float | None) -> str:
    """A relative error, to one digit."""
    return "" if error is None else f"{error:.0e}"


def _ratio(seconds: float | None, other: float | None) -> str:
    return f"{seconds / other:.2f}" if seconds and other else ""


def heading_of(group: Sequence[BenchRow], report: BenchReport) -> str:
    """What the rows of a group measure."""
    row = group[0]
    what = "forward only" if report.settings.get("forward_only") else "forward + backward"
    ignored = report.settings.get("ignored", 0.0)
    share = f", {ignored:.0%} ignored" if ignored else ""
    ranks = f", over {tp} ranks" if (tp := report.settings.get("tp", 1)) > 1 else ""
    return f"{row.loss}, {' x '.join(f'{n:,}' for n in row.shape)}, {row.dtype}, {what}{share}{ranks}"


def facts_of(report: BenchReport) -> dict[str, str]:
    """Device, threads, versions and date, by name."""
    device = str(report.machine.get("device", "cpu"))
    facts = {"device": str(report.machine.get("processor", "cpu")) if device == "cpu" else device}
    facts |= {"threads": str(report.settings.get("threads", "?"))} | report.versions
    return facts | {"date": report.date[:16].replace("T", " ")}


def warnings_of(report: BenchReport) -> list[str]:
    """What makes the times doubtful."""
    found = []
    load, cores = report.machine.get("load"), report.machine.get("cores") or 1
    if load is not None and load > cores / 2:
        found.append(f"The machine was busy: load {load} on {cores} cores when the run began. Times are uncertain.")
    spreads = [row.spread for row in report.rows if row.kind != "floor" and row.spread is not None]
    if spreads and median(spreads) > 0.25:
        found.append(f"The rounds differ by {median(spreads):.0%} in the median: run it again on a quiet machine.")
    if others := report.machine.get("accelerator_processes"):
        found.append(f"Other processes held memory of the accelerator: {others}.")
    return found


def verdict(report: BenchReport) -> str:
    """For each call and framework: our fastest flag and the best peer."""
    said = []
    for group in report.groups():
        head = f"{group[0].loss} {'x'.join(map(str, group[0].shape))} {group[0].dtype}"
        frameworks = dict.fromkeys(framework_of(row) for row in group if row.kind == FLAG)
        for framework in frameworks:
            ours, peer = best_flag_of(group, framework), best_peer_of(group, framework)
            if ours is None or not ours.seconds:
                said.append(f"{head}: no flag of {framework} gave a result")
                continue
            text = f"{head}: {ours.implementation} {time_text(ours.seconds)}"
            if peer is not None and peer.seconds:
                text += f", {ours.seconds / peer.seconds:.2f} of {peer.implementation}'s {time_text(peer.seconds)}"
            said.append(text)
    return "\n".join(said)


_STYLES = {"floor": "dim", "best": "bold green", "flag": "green", "peer": "", "wrong": "bold red", "failed": "yellow"}


def print_bench(console: Console, report: BenchReport) -> None:
    """The whole report on a terminal."""
    for text, style in _text_lines(report, max(console.width - 1, 40)):
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def bench_text(report: BenchReport, width: int = 119) -> str:
    """The whole report as plain text."""
    return "\n".join(text for text, _ in _text_lines(report, width))


def _text_lines(report: BenchReport, width: int) -> Iterator[tuple[str, str]]:
    """Lines and their styles. Tables are not wrapped: they are read by their columns."""
    yield from _wrapped(" · ".join(f"{name} {value}" for name, value in facts_of(report).items()), width)
    for warning in warnings_of(report):
        yield from _wrapped(warning, width, "yellow")
    yield from _wrapped(LEGEND, width)
    for group in report.groups():
        lines = lines_of(group)
        yield "", ""
        yield heading_of(group, report), "bold"
        timed = [line for line in lines if line.style != "failed"]
        cells = [HEADINGS, *(line.cells for line in timed)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        yield _aligned(HEADINGS, widths), "dim"
        for line in timed:
            yield _aligned(line.cells, widths), _STYLES[line.style]
        for line in lines:
            if line.note:
                style = "yellow" if line.style in ("failed", "wrong") else "dim"
                yield from _wrapped(f"{line.cells[0]}: {line.note}", width, style)
    if report.missing:
        yield "", ""
        yield "Not measured here:", ""
        for missing in report.missing:
            yield from _wrapped(f"  {missing_text(missing)}", width)
    yield "", ""
    for text in verdict(report).splitlines():
        yield text, "bold"


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([first, *rest]).rstrip()


def missing_text(missing: Missing) -> str:
    """Why something was not measured, and the line that installs it."""
    install = f": {missing.install}" if missing.install and missing.install not in missing.reason else ""
    return f"{missing.name}: {missing.reason}{install}"


def _wrapped(text: str, width: int, style: str = "") -> Iterator[tuple[str, str]]:
    for line in textwrap.wrap(
        text, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    ):  # fmt: skip
        yield line, style


def markdown(report: BenchReport) -> str:
    """The tables as Markdown."""
    parts = []
    for group in report.groups():
        parts += [f"**{heading_of(group, report)}**", ""]
        parts += ["| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
        for line in lines_of(group):
            cells = line.cells
            if line.style == "failed":
                cells = (cells[0], line.note, *[""] * (len(HEADINGS) - 2))
            name = f"**{cells[0]}**" if line.style in ("best", "flag") else cells[0]
            note = f" ({line.note})" if line.note and line.style != "failed" else ""
            parts.append("| " + " | ".join([f"{name}{note}", *cells[1:]]).replace("  ", " ") + " |")
        parts.append("")
    return "\n".join(parts)
