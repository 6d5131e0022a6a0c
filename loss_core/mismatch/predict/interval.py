"""Interval arithmetic for computed values, whose errors come from the order of sums and the platform's functions.

Rounding is monotone, so an interval is rounded by rounding its ends: if no error can move a value across the boundary
between two numbers of the format, the result is a single number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.dtypes import FORMATS, round_to

Floats = NDArray[np.float64]

# Format of the arithmetic between two stored results.
FLOAT32 = FORMATS["float32"]


@dataclass(frozen=True)
class Interval:
    """Least, exact, and largest value of each element."""

    low: Floats
    value: Floats
    high: Floats

    def map(self, increasing: Callable[[Floats], Any]) -> Interval:
        """Apply a nondecreasing elementwise function, or a selection of elements."""
        return Interval(increasing(self.low), increasing(self.value), increasing(self.high))

    def plus(self, other: Interval) -> Interval:
        return Interval(self.low + other.low, self.value + other.value, self.high + other.high)

    def minus(self, other: Interval) -> Interval:
        return Interval(self.low - other.high, self.value - other.value, self.high - other.low)

    def widened(self, error: Floats) -> Interval:
        """Add an absolute error on either side, except to infinite values."""
        error = np.where(np.isfinite(self.value), error, 0.0)
        return Interval(self.low - error, self.value, self.high + error)

    def rounded(self, fmt: str) -> Interval:
        """Round to a format; a no-op for float32, whose roundings are part of the errors."""
        return self if fmt == FLOAT32.name else self.map(lambda values: round_to(values, fmt))

    def step(self, increasing: Callable[[Floats], Any], roundings: Floats | float, fmt: str) -> Interval:
        """Apply an elementwise function with an error of so many float32 roundings, and round to a format."""
        after = self.map(increasing)
        return after.widened(roundings * FLOAT32.u * np.abs(after.value)).rounded(fmt)
