"""The tables of a benchmark report: headings, cells, legends, warnings and verdict, as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from loss_core.bench.growth import SHARE, Series, growth_of, series_of
from loss_core.bench.report import (
    FLAG,
    ROOFLINE,
    BenchReport,
    BenchRow,
    best_baseline_of,
    best_flag_of,
    call_text,
    plain_of,
    roofline_of,
    share_text,
)

HEADINGS = ("", "time", "±", "x plain", "x baseline", "of roofline", "memory", "first call", "loss error", "grad error")

LEGEND = (
    "time: median of the rounds; ±: spread of the middle half; x plain, x baseline: share of the time of the plain "
    "implementation and of the best baseline, on the same framework; of roofline: roofline / time; memory: peak "
    "above the inputs, gradients included; errors: relative, against float64"
)

GROWTH_HEADINGS = ("", "x size", "time", "x time", "exponent", "of roofline", "memory", "beside gradients")

GROWTH_LEGEND = (
    "x size, x time: the largest over the smallest; exponent: slope of log time over log size by least squares, 1 is "
    "linear; of roofline: roofline / time, on which a changing load of the machine has less effect; memory: peak above "
    "the inputs, then without the gradients, whose size is that of T or V; to: from the smallest size to the largest"
)


@dataclass(frozen=True)
class Line:
    """One row of a table, as text.

    Attributes:
        cells: one per heading.
        note: text after the cells.
        style: "roofline", "best" (our fastest), "flag", "baseline", "wrong" or "failed".
    """

    cells: tuple[str, ...]
    note: str
    style: str


def lines_of(group: Sequence[BenchRow]) -> list[Line]:
    """Table lines of a group: the roofline, then flags and baselines from fast to slow, then failures."""
    roofline = roofline_of(group)
    ours = best_flag_of(group)
    ordered = sorted(group, key=lambda row: (row.kind != ROOFLINE, row.seconds is None, row.seconds or 0.0))
    lines = []
    for row in ordered:
        # The roofline is a bound, not an implementation: it has no ratios.
        compared = [] if row.kind == ROOFLINE else group
        plain, baseline = plain_of(compared, row.framework), best_baseline_of(compared, row.framework)
        style = "failed" if row.seconds is None else "wrong" if row.wrong else "best" if row is ours else row.kind
        cells = (
            row.implementation,
            time_text(row.seconds),
            "" if row.spread is None else f"{row.spread:.0%}",
            _ratio(row.seconds, plain.seconds if plain else None),
            _ratio(row.seconds, baseline.seconds if baseline else None),
            _percent(roofline, row.seconds),
            "" if row.kind == ROOFLINE else memory_text(row.peak),
            "" if row.kind == ROOFLINE else time_text(row.first_call),
            error_text(row.loss_error),
            error_text(row.grad_error),
        )
        lines.append(Line(cells, f"WRONG: {row.note}".rstrip(": ") if row.wrong else row.error or row.note, style))
    return lines


def time_text(seconds: float | None) -> str:
    """A time with three digits and a unit."""
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
    """Heading of a group: what its rows measure."""
    row = group[0]
    share = f", {share_text(row.ignored)} ignored" if row.ignored else ""
    return f"{row.loss}, {' x '.join(f'{n:,}' for n in row.shape)}, {row.dtype}, {_mode(report)}{share}{_ranks(report)}"


def _mode(report: BenchReport) -> str:
    return "forward only" if report.settings.get("forward_only") else "forward + backward"


def _ranks(report: BenchReport) -> str:
    return f", over {tp} ranks" if (tp := report.settings.get("tp", 1)) > 1 else ""


def growth_tables(report: BenchReport) -> list[tuple[str, list[Line]]]:
    """Heading and lines of each series that is long enough for an exponent."""
    tables = []
    for series in series_of(report):
        lines = []
        for growth in growth_of(series):
            first, last = growth.first, growth.last
            roofline_and_memory = "", "", ""
            if first.kind != ROOFLINE:
                shares = [_roofline_share(row, series) for row in (first, last)]
                roofline_and_memory = (
                    " to ".join(shares) if all(shares) else "",
                    _from_to(first.peak, last.peak),
                    _from_to(first.working, last.working),
                )
            cells = (
                first.implementation,
                f"{growth.size_factor:.3g}",
                f"{time_text(first.seconds)} to {time_text(last.seconds)}",
                f"{growth.time_factor:.3g}",
                f"{growth.exponent:.2f}",
                *roofline_and_memory,
            )
            # The roofline's note has the rates of one call.
            note = first.note if first.kind != ROOFLINE and first.note == last.note else ""
            lines.append(Line(cells, note, first.kind))
        if lines:
            tables.append((series_heading(series, report), lines))
    return tables


def series_heading(series: Series, report: BenchReport) -> str:
    """Heading of a series: the size that differs between its calls, and those that do not."""
    row = series.rows[0]
    losses = {row.loss for row in series.rows}
    loss = row.loss if len(losses) == 1 else str(row.config.get("name"))
    names = [name for name in "TVH"[: len(row.shape)] if name != series.axis]
    fixed = " x ".join(f"{row.shape['TVH'.index(name)]:,}" for name in names)
    share = f", {share_text(row.ignored)} ignored" if row.ignored and series.axis != SHARE else ""
    ends = [size_text(size, series.axis) for size in (series.sizes[0], series.sizes[-1])]
    sizes = f"over {series.axis}, {ends[0]} to {ends[1]}, at {' x '.join(names)} = {fixed}"
    return f"{loss}, {row.dtype}, {_mode(report)}{share}{_ranks(report)}: {sizes}"


def size_text(size: float, axis: str) -> str:
    """A size along an axis."""
    return share_text(size) if axis == SHARE else f"{size:,.0f}"


def _roofline_share(row: BenchRow, series: Series) -> str:
    return _percent(roofline_of(other for other in series.rows if other.group == row.group), row.seconds)


def _percent(roofline: float | None, seconds: float | None) -> str:
    return f"{roofline / seconds:.0%}" if roofline and seconds else ""


def _from_to(first: int | None, last: int | None) -> str:
    return "" if first is None or last is None else f"{memory_text(first)} to {memory_text(last)}"


def facts_of(report: BenchReport) -> dict[str, str]:
    """Device, threads, versions and date, by name."""
    facts = {"device": device_of(report), "threads": str(report.settings.get("threads", "?"))} | report.versions
    return facts | {"date": report.date[:16].replace("T", " ")}


def device_of(report: BenchReport) -> str:
    """Name of the accelerator, or of the processor with its widest vector instructions."""
    device = str(report.machine.get("device", "cpu"))
    if device != "cpu":
        return device
    vector = report.machine.get("vector")
    return f"{report.machine.get('processor', 'cpu')}{f' ({vector})' if vector else ''}"


def warnings_of(report: BenchReport) -> list[str]:
    """Reasons to doubt the times."""
    warnings = []
    load, cores = report.machine.get("load"), report.machine.get("cores") or 1
    if load is not None and load > cores / 2:
        warnings.append(f"The machine was busy: load {load} on {cores} cores when the run began. Times are uncertain.")
    spreads = [row.spread for row in report.rows if row.kind != ROOFLINE and row.spread is not None]
    if spreads and median(spreads) > 0.25:
        warnings.append(f"The rounds differ by {median(spreads):.0%} in the median: run it again on a quiet machine.")
    if others := report.machine.get("accelerator_processes"):
        warnings.append(f"Other processes held memory of the accelerator: {others}.")
    return warnings


def verdict(report: BenchReport) -> str:
    """For each call and framework: our fastest flag and the best baseline."""
    lines = []
    for group in report.groups():
        head = call_text(*group[0].group)
        frameworks = dict.fromkeys(row.framework for row in group if row.kind == FLAG)
        for framework in frameworks:
            ours, other = best_flag_of(group, framework), best_baseline_of(group, framework)
            if ours is None or not ours.seconds:
                lines.append(f"{head}: no flag of {framework} gave a result")
                continue
            text = f"{head}: {ours.implementation} {time_text(ours.seconds)}"
            if other is not None and other.seconds:
                text += f", {ours.seconds / other.seconds:.2f} of {other.implementation}'s {time_text(other.seconds)}"
            lines.append(text)
    return "\n".join(lines)
