"""How time and memory grow with T, V, and the share of valid tokens.

A series holds the calls of a report that differ in one of the three alone. The growth of an implementation is its costs
at both ends and the exponent of time over size: 1 is linear, 2 quadratic, 0 constant.

>>> exponent([1, 2, 4], [3.0, 6.0, 12.0])
1.0
"""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loss_core.bench.report import BenchReport, BenchRow

T, V, SHARE = "T", "V", "the share of valid tokens"
AXES = (T, V, SHARE)

# With two sizes the exponent is a single quotient, which nothing could contradict.
_MIN_SIZES = 3


@dataclass(frozen=True)
class Series:
    """Calls that differ in one size alone.

    Attributes:
        axis: the size that differs: T, V, or SHARE.
        rows: of all calls, from the smallest to the largest; wrong ones and those without a time are excluded.
    """

    axis: str
    rows: tuple[BenchRow, ...]

    @property
    def implementations(self) -> list[str]:
        """Names, in the order of the report."""
        return list(dict.fromkeys(row.implementation for row in self.rows))

    @property
    def sizes(self) -> list[float]:
        """Sizes along the axis, from the smallest to the largest."""
        return sorted({size_of(row, self.axis) for row in self.rows})

    def rows_of(self, implementation: str) -> list[BenchRow]:
        """Rows of one implementation, from the smallest to the largest."""
        return [row for row in self.rows if row.implementation == implementation]


@dataclass(frozen=True)
class Growth:
    """Growth of one implementation along a series.

    Attributes:
        first, last: rows at the smallest and the largest size.
        size_factor: largest size / smallest.
        time_factor: time at the largest / time at the smallest.
        exponent: of time over size, by `exponent`.
    """

    first: BenchRow
    last: BenchRow
    size_factor: float
    time_factor: float
    exponent: float


def size_of(row: BenchRow, axis: str) -> float:
    """Size of a call along an axis: T, V, or the share of valid tokens in [0, 1]."""
    return 1 - row.ignored if axis == SHARE else row.shape[AXES.index(axis)]


def series_of(report: BenchReport) -> list[Series]:
    """All series of a report: two or more calls with the same loss, dtype and sizes except for one size."""
    all_series: list[Series] = []
    timed = [row for row in report.rows if row.seconds and not row.wrong]
    for axis in AXES:
        by_key: dict[str, list[BenchRow]] = {}
        for row in timed:
            # The config, not its name: two configs of one class may differ in a field.
            fixed = [size_of(row, other) for other in AXES if other != axis]
            key = json.dumps([row.config, row.dtype, fixed, row.shape[2:]], sort_keys=True)
            by_key.setdefault(key, []).append(row)
        for rows in by_key.values():
            series = Series(axis, tuple(sorted(rows, key=lambda row: size_of(row, axis))))
            if len(series.sizes) > 1:
                all_series.append(series)
    return all_series


def growth_of(series: Series) -> list[Growth]:
    """Growth of each implementation that was measured at three or more sizes."""
    growths = []
    for implementation in series.implementations:
        rows = series.rows_of(implementation)
        sizes = [size_of(row, series.axis) for row in rows]
        if len(set(sizes)) < _MIN_SIZES:
            continue
        times = [row.seconds or 0.0 for row in rows]
        growths.append(Growth(rows[0], rows[-1], sizes[-1] / sizes[0], times[-1] / times[0], exponent(sizes, times)))
    return growths


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Slope of log(time) over log(size), by least squares.

    Args:
        sizes: positive, at least two distinct.
        times: positive, one per size.
    """
    x, y = np.log(np.asarray(sizes, np.float64)), np.log(np.asarray(times, np.float64))
    x -= x.mean()
    slope = float(x @ y / (x @ x))
    assert math.isfinite(slope)
    return slope
