"""Where a computed value may lie: what the order of a sum and the platform's exp may move, and no more.

Rounding is monotone, so an interval is rounded by rounding its ends: a value that no error can carry over a boundary
between two numbers of the format stays a single number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.dtypes import FORMATS, round_to

Floats = NDArray[np.float64]

# Of the arithmetic between two stored results.
FLOAT32 = FORMATS["float32"]


@dataclass(frozen=True)
class Interval:
    """Least, exact, and largest value of each element."""

    low: Floats
    value: Floats
    high: Floats

    def map(self, increasing: Callable[[Floats], Any]) -> Interval:
        """A function that never decreases, of each element; or a selection of elements."""
        return Interval(increasing(self.low), increasing(self.value), increasing(self.high))

    def plus(self, other: Interval) -> Interval:
        return Interval(self.low + other.low, self.value + other.value, self.high + other.high)

    def minus(self, other: Interval) -> Interval:
        return Interval(self.low - other.high, self.value - other.value, self.high - other.low)

    def widened(self, error: Floats) -> Interval:
        """With an absolute error more on either side; what is infinite has none."""
        error = np.where(np.isfinite(self.value), error, 0.0)
        return Interval(self.low - error, self.value, self.high + error)

    def rounded(self, fmt: str) -> Interval:
        """Stored in a format; float32 is the arithmetic's own, whose roundings are among the errors."""
        return self if fmt == FLOAT32.name else self.map(lambda values: round_to(values, fmt))

    def step(self, increasing: Callable[[Floats], Any], roundings: Floats | float, fmt: str) -> Interval:
        """A function of each element, with so many relative roundings of float32, stored in a format."""
        after = self.map(increasing)
        return after.widened(roundings * FLOAT32.u * np.abs(after.value)).rounded(fmt)
