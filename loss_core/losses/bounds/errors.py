"""Errors of a result, before its final rounding where that is known, and the smallest error that a comparison detects.

A gradient for 16-bit inputs is computed in float32 and rounded to nearest once, when it is stored. That rounding is
far larger than the errors of the arithmetic, and would hide them if it were part of the allowed error. But it is known:
the value y before rounding is off by at most e, so y lies in [x - e, x + e]; rounding is monotone; so the stored g is
explained if and only if some number of that interval rounds to g. Nothing is assumed about the distribution of
rounding errors, so this holds for constant rows and zeros as well.

The elements of a result are at different distances from the next rounding boundary, so an error d that is common to
all n of them changes some of them as soon as d is about 2 u / n, with u the unit roundoff of the stored dtype: all
elements together detect an error that a single one does not.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from loss_core.dtypes import FloatFormat, compute_format, float_format, round_to
from loss_core.losses.definition import Floats


class Errors(NamedTuple):
    """Elementwise errors of a result.

    Attributes:
        error, allowed: of the value before its final rounding if that is known, else of the stored value.
        ratio: error / allowed; above 1 is a failure, inf if only one of result and expected value is NaN.
    """

    error: Floats
    allowed: Floats
    ratio: Floats


def error_ratio(got: Floats, expected: Floats, allowed: Floats, dtype: str) -> Floats:
    """|got - expected| / allowed, elementwise: above 1 is a failure, inf where only one of got and expected is NaN."""
    top = float_format(dtype).max
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.abs(got - expected)
        ratio = np.where(error == 0, 0.0, error / allowed)
        same = (np.isnan(got) & np.isnan(expected)) | (got == expected)
        # A result beyond the format's range may be stored as infinity.
        overflow = np.isinf(got) & (np.sign(got) == np.sign(expected)) & (np.abs(expected) + allowed >= top)
        return np.where(same | overflow, 0.0, np.where(np.isnan(ratio), np.inf, ratio))


def is_rounded(dtype: str) -> bool:
    """Whether results of this dtype are computed in a wider one, and rounded when stored."""
    return compute_format(dtype).name != dtype


def errors_as_stored(got: Floats, expected: Floats, allowed: Floats, dtype: str) -> Errors:
    """|got - expected|, for results whose rounding is not known."""
    with np.errstate(invalid="ignore"):
        return Errors(np.abs(got - expected), allowed, error_ratio(got, expected, allowed, dtype))


def errors_before_rounding(got: Floats, expected: Floats, allowed: Floats, dtype: str) -> Errors:
    """Smallest error of any value that rounds to `got`, for results rounded once, to nearest, to the dtype."""
    stored = errors_as_stored(got, expected, allowed, dtype)
    if not is_rounded(dtype):
        return stored
    fmt = float_format(dtype)
    inside = _before_storing(expected, allowed, fmt)
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = _rounding_to(np.abs(got), fmt)
        # Both signs at once: the interval is mirrored where got is negative, and symmetric where it is 0.
        value = np.where(got > 0, expected, np.where(got < 0, -expected, np.abs(expected)))
        error = np.maximum(np.maximum(np.where(got == 0, 0.0, low - value), value - high), 0.0)
        ratio = np.where(error == 0, 0.0, error / inside)
    # Equal, NaN and overflowed elements keep the result of `error_ratio`.
    known = (stored.ratio == 0) | np.isinf(stored.ratio)
    return Errors(np.where(known, stored.error, error), inside, np.where(known, stored.ratio, ratio))


def smallest_found(expected: Floats, allowed: Floats, dtype: str, rounded: bool) -> float:
    """The smallest d for which expected * (1 + d) and expected * (1 - d) would both fail in some element.

    An element x fails at d = allowed / |x|; if it is rounded once, at the d for which it leaves the numbers that round
    to the same as x - e and x + e. The result is the smallest d of all elements.

    Args:
        rounded: whether results are rounded once, to nearest, to the dtype.
    Returns:
        d; inf if all elements are 0, which have no relative error.
    """
    nonzero = (np.abs(expected) <= float_format(dtype).max) & (expected != 0)
    size, allowed = np.abs(expected[nonzero]), allowed[nonzero]
    if not size.size:
        return float("inf")
    with np.errstate(over="ignore", invalid="ignore"):
        if not (rounded and is_rounded(dtype)):
            return float(np.min(allowed / size))
        fmt = float_format(dtype)
        inside = _before_storing(size, allowed, fmt)
        least = round_to(size - inside, dtype)
        _, above = _rounding_to(round_to(size + inside, dtype), fmt)
        below, _ = _rounding_to(least, fmt)
        grown = np.min(above / size - 1)
        shrunk = np.min(np.where(least > 0, 1 - below / size, np.inf))
        return float(max(grown, shrunk))


def _before_storing(expected: Floats, allowed: Floats, fmt: FloatFormat) -> Floats:
    """The error from which `rounding.stored` computed `allowed`; still includes the flush to 0 near 0."""
    inside = np.maximum((allowed - fmt.near_zero - fmt.u * np.abs(expected)) / (1 + fmt.u), 0.0) + fmt.near_zero
    return np.where(allowed == 0, 0.0, inside)


def _rounding_to(size: Floats, fmt: FloatFormat) -> tuple[Floats, Floats]:
    """Ends of the interval of numbers that round to each number, which is >= 0 and exact in the format.

    From 2^k on numbers are 2 u 2^k apart, and below 2^k half of that; below the normal range they stay 2 u tiny apart.
    """
    fraction, exponent = np.frexp(size)
    # frexp gives 0 the exponent of 1.
    step = np.maximum(np.where(size == 0, 0.0, np.ldexp(fmt.u, exponent)), 2 * fmt.u * fmt.tiny)
    step_below = np.where(fraction == 0.5, np.maximum(step / 2, 2 * fmt.u * fmt.tiny), step)
    return size - step_below / 2, size + step / 2
