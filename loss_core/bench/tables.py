"""The tables of a benchmark: headings, cells and the words around them; `bench_text` shows them."""

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
    "implementation and of the best baseline, on the same framework; of roofline: roofline / time; memory: most held "
    "above the inputs, gradients included; errors: relative, against float64"
)

GROWTH_HEADINGS = ("", "x size", "time", "x time", "exponent", "of roofline", "memory", "beside gradients")

GROWTH_LEGEND = (
    "x size, x time: the largest over the smallest; exponent: slope of log time over log size by least squares, 1 is "
    "linear; of roofline: roofline / time, which load on the machine that changes from call to call moves less; "
    "memory: most held above the inputs, then without the gradients, which grow with T or V by their nature; to: from "
    "the smallest size to the largest"
)


@dataclass(frozen=True)
class Line:
    """One row of a table, as text.

    Attributes:
        cells: one per heading.
        note: what stands behind the cells.
        style: "roofline", "best" (our fastest), "flag", "baseline", "wrong" or "failed".
    """

    cells: tuple[str, ...]
    note: str
    style: str


def lines_of(group: Sequence[BenchRow]) -> list[Line]:
    """The rows of a group: the roofline, then ours and the baselines from fast to slow, then what failed."""
    roofline = roofline_of(group)
    ours = best_flag_of(group)
    ordered = sorted(group, key=lambda row: (row.kind != ROOFLINE, row.seconds is None, row.seconds or 0.0))
    made = []
    for row in ordered:
        # The roofline's time is compared with nothing.
        compared = [other for other in group if row.kind != ROOFLINE]
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
    share = f", {share_text(row.ignored)} ignored" if row.ignored else ""
    return f"{row.loss}, {' x '.join(f'{n:,}' for n in row.shape)}, {row.dtype}, {_how(report)}{share}{_ranks(report)}"


def _how(report: BenchReport) -> str:
    return "forward only" if report.settings.get("forward_only") else "forward + backward"


def _ranks(report: BenchReport) -> str:
    return f", over {tp} ranks" if (tp := report.settings.get("tp", 1)) > 1 else ""


def growth_tables(report: BenchReport) -> list[tuple[str, list[Line]]]:
    """How the implementations grow: heading and rows of each series that is long enough to tell."""
    made = []
    for series in series_of(report):
        lines = []
        for growth in growth_of(series):
            first, last = growth.first, growth.last
            beside = "", "", ""
            if first.kind != ROOFLINE:
                shares = [_roofline_share(row, series) for row in (first, last)]
                beside = (
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
                *beside,
            )
            # The roofline's note is the rates of one call.
            note = first.note if first.kind != ROOFLINE and first.note == last.note else ""
            lines.append(Line(cells, note, first.kind))
        if lines:
            made.append((series_heading(series, report), lines))
    return made


def series_heading(series: Series, report: BenchReport) -> str:
    """What differs between the calls of a series, and what does not."""
    row = series.rows[0]
    losses = {row.loss for row in series.rows}
    loss = row.loss if len(losses) == 1 else str(row.config.get("name"))
    names = [name for name in "TVH"[: len(row.shape)] if name != series.axis]
    fixed = " x ".join(f"{row.shape['TVH'.index(name)]:,}" for name in names)
    share = f", {share_text(row.ignored)} ignored" if row.ignored and series.axis != SHARE else ""
    ends = [size_text(size, series.axis) for size in (series.sizes[0], series.sizes[-1])]
    what = f"over {series.axis}, {ends[0]} to {ends[1]}, at {' x '.join(names)} = {fixed}"
    return f"{loss}, {row.dtype}, {_how(report)}{share}{_ranks(report)}: {what}"


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
    """The accelerator, or the processor and its widest vectors."""
    device = str(report.machine.get("device", "cpu"))
    if device != "cpu":
        return device
    vector = report.machine.get("vector")
    return f"{report.machine.get('processor', 'cpu')}{f' ({vector})' if vector else ''}"


def warnings_of(report: BenchReport) -> list[str]:
    """What makes the times doubtful."""
    found = []
    load, cores = report.machine.get("load"), report.machine.get("cores") or 1
    if load is not None and load > cores / 2:
        found.append(f"The machine was busy: load {load} on {cores} cores when the run began. Times are uncertain.")
    spreads = [row.spread for row in report.rows if row.kind != ROOFLINE and row.spread is not None]
    if spreads and median(spreads) > 0.25:
        found.append(f"The rounds differ by {median(spreads):.0%} in the median: run it again on a quiet machine.")
    if others := report.machine.get("accelerator_processes"):
        found.append(f"Other processes held memory of the accelerator: {others}.")
    return found


def verdict(report: BenchReport) -> str:
    """For each call and framework: our fastest flag and the best baseline."""
    said = []
    for group in report.groups():
        head = call_text(*group[0].group)
        frameworks = dict.fromkeys(row.framework for row in group if row.kind == FLAG)
        for framework in frameworks:
            ours, other = best_flag_of(group, framework), best_baseline_of(group, framework)
            if ours is None or not ours.seconds:
                said.append(f"{head}: no flag of {framework} gave a result")
                continue
            text = f"{head}: {ours.implementation} {time_text(ours.seconds)}"
            if other is not None and other.seconds:
                text += f", {ours.seconds / other.seconds:.2f} of {other.implementation}'s {time_text(other.seconds)}"
            said.append(text)
    return "\n".join(said)
