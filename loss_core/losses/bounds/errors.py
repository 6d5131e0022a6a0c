"""The errors of a result, before it was rounded where that is known, and how small an error a comparison finds.

A gradient for 16-bit inputs is computed in float32 and rounded to nearest once, where it is stored. That rounding is
far larger than the errors of the arithmetic, and hides them if it is allowed for as an error. But it is known: the
value y before it is off by at most e, so y lies in [x - e, x + e]; rounding is monotone; so the stored g is explained
if and only if some number of that interval rounds to g. Nothing is assumed about the distribution of roundings, so
this holds for constant rows and zeros as well.

The elements of a result stop at different distances from where they round differently, so an error d that all n of
them share changes some of them as soon as d is about 2 u / n, with u the unit roundoff of the stored dtype: one
comparison of all elements sees what each of them alone could not.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from loss_core.dtypes import FloatFormat, compute_format, float_format, round_to
from loss_core.losses.definition import Floats


class Errors(NamedTuple):
    """Errors of a result, elementwise, of the shape of the result.

    Attributes:
        error, allowed: of the value before it was rounded, if it was; else of the result.
        ratio: error / allowed; above 1 is a failure, inf where one is not a number.
    """

    error: Floats
    allowed: Floats
    ratio: Floats


def error_ratio(got: Floats, expected: Floats, allowed: Floats, dtype: str) -> Floats:
    """|got - expected| / allowed, elementwise: above 1 is a failure, inf where one is not a number."""
    top = float_format(dtype).max
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.abs(got - expected)
        ratio = np.where(error == 0, 0.0, error / allowed)
        same = (np.isnan(got) & np.isnan(expected)) | (got == expected)
        # A result beyond the format's range may be stored as infinity.
        overflow = np.isinf(got) & (np.sign(got) == np.sign(expected)) & (np.abs(expected) + allowed >= top)
        return np.where(same | overflow, 0.0, np.where(np.isnan(ratio), np.inf, ratio))


def is_rounded(dtype: str) -> bool:
    """Whether results of a dtype are computed in a wider one."""
    return compute_format(dtype).name != dtype


def errors_as_stored(got: Floats, expected: Floats, allowed: Floats, dtype: str) -> Errors:
    """|got - expected|: for results of which it is not known how they were rounded."""
    with np.errstate(invalid="ignore"):
        return Errors(np.abs(got - expected), allowed, error_ratio(got, expected, allowed, dtype))


def errors_before_rounding(got: Floats, expected: Floats, allowed: Floats, dtype: str) -> Errors:
    """Least error of the values that round to `got`, for results that were rounded once to the dtype, to nearest."""
    stored = errors_as_stored(got, expected, allowed, dtype)
    if not is_rounded(dtype):
        return stored
    fmt = float_format(dtype)
    inside = _before_storing(expected, allowed, fmt)
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = _rounding_to(np.abs(got), fmt)
        # Both signs at once: where got is not positive, the interval is mirrored, and around 0 it is symmetric.
        value = np.where(got > 0, expected, np.where(got < 0, -expected, np.abs(expected)))
        error = np.maximum(np.maximum(np.where(got == 0, 0.0, low - value), value - high), 0.0)
        ratio = np.where(error == 0, 0.0, error / inside)
    # What is equal, no number, or beyond the range of the dtype has been judged.
    known = (stored.ratio == 0) | np.isinf(stored.ratio)
    return Errors(np.where(known, stored.error, error), inside, np.where(known, stored.ratio, ratio))


def smallest_found(expected: Floats, allowed: Floats, dtype: str, rounded: bool) -> float:
    """The smallest d for which expected * (1 + d) and expected * (1 - d) would both fail in some element.

    An element x fails at d = allowed / |x|; where it is rounded once, at the d with which it leaves the numbers that
    round to what x - e and x + e round to. Of all elements the smallest d counts.

    Args:
        rounded: whether results are rounded once to the dtype, to nearest.
    Returns:
        d; inf where no relative error can be seen, as all elements are 0.
    """
    of_number = (np.abs(expected) <= float_format(dtype).max) & (expected != 0)
    size, allowed = np.abs(expected[of_number]), allowed[of_number]
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
    """The error of which `rounding.stored` has made an allowance; the loss of numbers near 0 stays in it."""
    inside = np.maximum((allowed - fmt.near_zero - fmt.u * np.abs(expected)) / (1 + fmt.u), 0.0) + fmt.near_zero
    return np.where(allowed == 0, 0.0, inside)


def _rounding_to(size: Floats, fmt: FloatFormat) -> tuple[Floats, Floats]:
    """Ends of the interval of numbers that round to each of these numbers of the format, which are >= 0.

    From 2^k on numbers are 2 u 2^k apart, and below 2^k half of that; below the normal range they stay 2 u tiny apart.
    """
    fraction, exponent = np.frexp(size)
    # frexp gives 0 the exponent of 1.
    step = np.maximum(np.where(size == 0, 0.0, np.ldexp(fmt.u, exponent)), 2 * fmt.u * fmt.tiny)
    step_below = np.where(fraction == 0.5, np.maximum(step / 2, 2 * fmt.u * fmt.tiny), step)
    return size - step_below / 2, size + step / 2
