"""The benchmark as a table: the cells, and how the terminal and Markdown show them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loss_core.bench_report import BenchReport, BenchRow, Missing, best_flag_of, best_peer_of, floor_of, plain_of

if TYPE_CHECKING:
    from rich.console import Console

HEADINGS = ("", "time", "±", "x plain", "x peer", "of floor", "memory", "first call", "loss error", "grad error")

LEGEND = (
    "time: median of the rounds; ±: spread of the middle half; x plain, x peer: share of the time of the plain "
    "implementation and of the best peer; of floor: floor / time; memory: most held above the inputs, gradients "
    "included; errors: relative, against float64"
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
    floor, plain, best = floor_of(group), plain_of(group), best_peer_of(group)
    ours = best_flag_of(group)
    ordered = sorted(group, key=lambda row: (row.kind != "floor", row.seconds is None, row.seconds or 0.0))
    made = []
    for row in ordered:
        style = "failed" if row.seconds is None else "wrong" if row.wrong else "best" if row is ours else row.kind
        cells = (
            row.implementation,
            time_text(row.seconds),
            "" if row.spread is None else f"{row.spread:.0%}",
            _ratio(row.seconds, plain.seconds if plain else None),
            _ratio(row.seconds, best.seconds if best else None),
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
    return f"{row.loss}, {' x '.join(f'{n:,}' for n in row.shape)}, {row.dtype}, {what}{share}"


def machine_text(report: BenchReport) -> str:
    """Device, threads and versions in one line."""
    device = report.machine.get("device", "cpu")
    name = f"{report.machine.get('processor', '?')}" if device == "cpu" else str(device)
    versions = " · ".join(f"{name} {version}" for name, version in report.versions.items())
    return f"{name}, {report.settings.get('threads', '?')} threads · {versions} · {report.date[:16].replace('T', ' ')}"


def verdict(report: BenchReport) -> str:
    """For each group: our fastest flag and the best peer."""
    said = []
    for group in report.groups():
        ours, peer = best_flag_of(group), best_peer_of(group)
        if ours is None or not ours.seconds:
            said.append(f"{group[0].loss}: no flag gave a result")
        elif peer is None or not peer.seconds:
            said.append(f"{ours.loss}: {ours.implementation} {time_text(ours.seconds)}, no peer beside it")
        else:
            said.append(
                f"{ours.loss} {'x'.join(map(str, ours.shape))} {ours.dtype}: {ours.implementation} "
                f"{time_text(ours.seconds)}, {ours.seconds / peer.seconds:.2f} of {peer.implementation}'s "
                f"{time_text(peer.seconds)}"
            )
    return "\n".join(said)


_STYLES = {"floor": "dim", "best": "bold green", "flag": "green", "peer": "", "wrong": "bold red", "failed": "yellow"}


def print_bench(console: Console, report: BenchReport) -> None:
    """The whole report as text."""
    _print_wrapped(console, machine_text(report))
    _print_wrapped(console, LEGEND)
    for group in report.groups():
        lines = lines_of(group)
        console.print()
        console.print(heading_of(group, report), style="bold", markup=False, highlight=False, soft_wrap=True)
        cells = [HEADINGS, *(line.cells for line in lines if line.style != "failed")]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        console.print(_aligned(HEADINGS, widths), style="dim", highlight=False, soft_wrap=True)
        for line in lines:
            if line.style != "failed":
                text = _aligned(line.cells, widths)
                console.print(text, style=_STYLES[line.style], markup=False, highlight=False, soft_wrap=True)
        for line in lines:
            if line.note:
                _print_wrapped(
                    console,
                    f"{line.cells[0]}: {line.note}",
                    _STYLES["failed" if line.style in ("failed", "wrong") else "floor"],
                )
    if report.missing:
        console.print()
        _print_wrapped(console, "Not measured here:")
        for missing in report.missing:
            _print_wrapped(console, f"  {missing_text(missing)}")
    console.print()
    console.print(verdict(report), style="bold", markup=False, highlight=False, soft_wrap=True)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([first, *rest]).rstrip()


def missing_text(missing: Missing) -> str:
    """Why something was not measured, and the line that installs it."""
    install = f": {missing.install}" if missing.install and missing.install not in missing.reason else ""
    return f"{missing.name}: {missing.reason}{install}"


def _print_wrapped(console: Console, text: str, style: str = "") -> None:
    for line in textwrap.wrap(
        text, max(console.width - 1, 40), subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    ):
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


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
