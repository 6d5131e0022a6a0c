"""Figures of a benchmark report: time and roofline, memory against time, growth over sizes."""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loss_core.bench.growth import Series, series_of, size_of
from loss_core.bench.report import FLAG, ROOFLINE, BenchReport, BenchRow, roofline_of
from loss_core.bench.tables import series_heading, size_text, time_text
from loss_core.page import blank_figure, svg_of, without_frame

# Colour-blind safe (Okabe & Ito). Ours stand out in blue, baselines are grey.
_OURS, _BASELINE, _WRONG = "#0072b2", "#8a94a6", "#c62828"
_LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d", "#8a94a6")


@dataclass(frozen=True)
class Picture:
    """A figure as SVG, with its title and caption."""

    title: str
    caption: str
    svg: str


def group_pictures(group: Sequence[BenchRow], *, file: bool = False) -> list[Picture]:
    """Time and roofline, and memory against time, of one call; empty if nothing was timed."""
    timed = sorted((r for r in group if r.seconds and r.kind != ROOFLINE), key=lambda r: r.seconds or 0.0)
    if not timed:
        return []
    roofline = roofline_of(group)
    fastest = timed[0]
    caption = f"{len(timed)} implementations; the fastest is {fastest.implementation}, {time_text(fastest.seconds)}"
    pictures = [Picture("Time", caption, _time_picture(timed, roofline, file))]
    if any(row.peak for row in timed):
        caption = "towards the lower left is better; memory above the inputs, gradients included"
        pictures.append(Picture("Memory against time", caption, _memory_picture(timed, roofline, file)))
    return pictures


def growth_pictures(report: BenchReport, *, file: bool = False) -> list[Picture]:
    """Time and memory over each series of calls that differ in one size alone."""
    caption = "both axes logarithmic; dashed grey: linear; dashed below: without the gradients"
    return [
        Picture(series_heading(series, report), caption, _growth_picture(series, file)) for series in series_of(report)
    ]


def _colour(row: BenchRow) -> str:
    return _WRONG if row.wrong else _OURS if row.kind == FLAG else _BASELINE


def _time_picture(rows: Sequence[BenchRow], roofline: float | None, file: bool) -> str:
    """Horizontal bars, fastest first, labelled with time and share of the roofline, which is a vertical line."""
    unit, name = _unit(rows[0].seconds or 1.0)
    with blank_figure(6.2, 0.9 + 0.34 * len(rows)) as figure:
        axes = figure.subplots()
        lengths = [(row.seconds or 0.0) / unit for row in rows]
        # Bars beyond six times the fastest are cut off, so that the others can be compared.
        limit = min(max(lengths), 6 * lengths[0]) * 1.28
        axes.barh(range(len(rows)), lengths, color=[_colour(row) for row in rows], height=0.66)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            share = f",  {roofline / row.seconds:.0%} of the roofline" if roofline and row.seconds else ""
            text = f" {time_text(row.seconds)}{share} "
            inside = length > 0.6 * limit
            axes.text(
                min(length, limit * 0.99), i, text, va="center", ha="right" if inside else "left", fontsize=9,
                color="white" if inside else "#1b2330",
            )  # fmt: skip
        if roofline:
            axes.axvline(roofline / unit, color=_WRONG, linewidth=1.4)
        axes.set_xlim(0, limit)
        axes.set_yticks(range(len(rows)), [row.implementation for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel(f"{name} per call (red: the roofline)")
        _style(axes)
        return svg_of(figure, file=file)


def _memory_picture(rows: Sequence[BenchRow], roofline: float | None, file: bool) -> str:
    unit, name = _unit(rows[0].seconds or 1.0)
    with blank_figure(6.2, 3.6) as figure:
        axes = figure.subplots()
        for row in rows:
            x, y = (row.seconds or 0.0) / unit, max((row.peak or 0) / 2**20, 1.0)
            axes.plot(x, y, "o", color=_colour(row), markersize=7)
            axes.annotate(row.implementation, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=9)
        axes.set_xscale("log")
        axes.set_yscale("log")
        if roofline:
            axes.axvline(roofline / unit, color=_WRONG, linewidth=1.4)
        axes.margins(x=0.25, y=0.15)
        for axis in (axes.xaxis, axes.yaxis):
            _number_axis(axis)
        axes.set_xlabel(f"{name} per call (red: the roofline)")
        axes.set_ylabel("MiB above the inputs")
        _style(axes)
        return svg_of(figure, file=file)


def _growth_picture(series: Series, file: bool) -> str:
    axis = series.axis
    with blank_figure(6.2, 6.4) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        names = series.implementations
        for i, implementation in enumerate(names):
            rows = series.rows_of(implementation)
            sizes = [size_of(row, axis) for row in rows]
            is_roofline = implementation == ROOFLINE
            style: dict[str, Any] = {
                "color": _WRONG if is_roofline else _LINES[i % len(_LINES)],
                "linestyle": ":" if is_roofline else "-",
                "marker": "" if is_roofline else "o",
                "markersize": 4,
            }
            above.plot(sizes, [(row.seconds or 0.0) * 1e3 for row in rows], label=implementation, **style)
            if not is_roofline:
                below.plot(sizes, [_mebibytes(row.peak) for row in rows], **style)
            if not is_roofline and all(row.gradients for row in rows):
                below.plot(sizes, [_mebibytes(row.working) for row in rows], **style | {"linestyle": "--"})
        # Through the largest size, where the constant cost of a call matters least.
        last = series.rows_of(next((name for name in names if name != ROOFLINE), names[0]))[-1]
        line = [(last.seconds or 0.0) * 1e3 * size / size_of(last, axis) for size in series.sizes]
        above.plot(series.sizes, line, label="linear", color="#8a94a6", linestyle="--", linewidth=1.0, zorder=1)
        for axes, label in ((above, "ms per call"), (below, "MiB above the inputs")):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            _widen(axes, series.sizes[-1] / series.sizes[0])
            _number_axis(axes.yaxis)
            axes.set_ylabel(label)
            _style(axes)
        below.set_xticks(series.sizes, [size_text(size, axis) for size in series.sizes])
        below.minorticks_off()
        below.set_xlabel(axis)
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
        return svg_of(figure, file=file)


def _mebibytes(size: int | None) -> float:
    """MiB, at least 1 for a logarithmic axis."""
    return max((size or 0) / 2**20, 1.0)


def _widen(axes: Any, factor: float) -> None:
    """Extend a logarithmic y axis to span at least a factor, so that a flat line looks flat."""
    low, high = axes.get_ylim()
    margin = max(factor / (high / low), 1.0) ** 0.5
    axes.set_ylim(low / margin, high * margin)


def _unit(seconds: float) -> tuple[float, str]:
    return next(
        (size, name) for size, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")) if seconds >= size or size == 1e-6
    )


def _number_axis(axis: Any) -> None:
    """Label ticks with plain numbers instead of powers of ten: the axis spans one or two decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(LogLocator(subs=()))


def _style(axes: Any) -> None:
    without_frame(axes)
    axes.grid(color="#e4e7ec", linewidth=0.8)
    axes.set_axisbelow(True)
