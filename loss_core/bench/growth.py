"""How time and memory grow over T, over V, and over the share of valid tokens.

A series holds the calls of a report that differ in one of the three alone. What an implementation costs at its two ends
and the exponent between them tell how it grows: an exponent of 1 is linear, of 2 quadratic, of 0 constant.

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

# Two sizes make an exponent out of one quotient, with nothing that could contradict it.
_LEAST_SIZES = 3


@dataclass(frozen=True)
class Series:
    """Calls that differ in one size alone.

    Attributes:
        axis: T, V, or SHARE: what differs.
        rows: of all these calls, from the smallest to the largest, without those that are wrong or have no time.
    """

    axis: str
    rows: tuple[BenchRow, ...]

    @property
    def implementations(self) -> list[str]:
        """Names, in the order of the report."""
        return list(dict.fromkeys(row.implementation for row in self.rows))

    @property
    def sizes(self) -> list[float]:
        """What was measured, from the smallest to the largest."""
        return sorted({size_of(row, self.axis) for row in self.rows})

    def of(self, implementation: str) -> list[BenchRow]:
        """Rows of one implementation, from the smallest to the largest."""
        return [row for row in self.rows if row.implementation == implementation]


@dataclass(frozen=True)
class Growth:
    """One implementation along a series.

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
    """Size of a call along an axis: T, V, or the share of 0 to 1."""
    return 1 - row.ignored if axis == SHARE else row.shape[AXES.index(axis)]


def series_of(report: BenchReport) -> list[Series]:
    """Every set of calls of a report, two at least, whose loss, dtype and sizes are equal but for one size."""
    found: list[Series] = []
    timed = [row for row in report.rows if row.seconds and not row.wrong]
    for axis in AXES:
        alike: dict[str, list[BenchRow]] = {}
        for row in timed:
            # The config, not its name: two of one class may differ in a field.
            fixed = [size_of(row, other) for other in AXES if other != axis]
            key = json.dumps([row.config, row.dtype, fixed, row.shape[2:]], sort_keys=True)
            alike.setdefault(key, []).append(row)
        for rows in alike.values():
            series = Series(axis, tuple(sorted(rows, key=lambda row: size_of(row, axis))))
            if len(series.sizes) > 1:
                found.append(series)
    return found


def growth_of(series: Series) -> list[Growth]:
    """How each implementation grows; none for one that was measured at fewer than three sizes."""
    found = []
    for implementation in series.implementations:
        rows = series.of(implementation)
        sizes = [size_of(row, series.axis) for row in rows]
        if len(set(sizes)) < _LEAST_SIZES:
            continue
        times = [row.seconds or 0.0 for row in rows]
        found.append(Growth(rows[0], rows[-1], sizes[-1] / sizes[0], times[-1] / times[0], exponent(sizes, times)))
    return found


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Slope of log(time) over log(size), by least squares.

    Args:
        sizes: positive, two of them different.
        times: positive, one per size.
    """
    x, y = np.log(np.asarray(sizes, np.float64)), np.log(np.asarray(times, np.float64))
    x -= x.mean()
    slope = float(x @ y / (x @ x))
    assert math.isfinite(slope)
    return slope
