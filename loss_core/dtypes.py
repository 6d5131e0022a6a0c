"""Floating-point formats: unit roundoff and range, and rounding float64 values to a format in NumPy.

NumPy has no bfloat16, so values are stored as float64 and rounded to numbers of the format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format.

    Attributes:
        name: dtype name shared by torch and JAX.
        u: unit roundoff, half the distance from 1 to the next number.
        tiny: smallest normal number.
        max: largest finite number.
        itemsize: bytes per number.
    """

    name: str
    u: float
    tiny: float
    max: float
    itemsize: int

    @property
    def near_zero(self) -> float:
        """Largest error of a stored number below the normal range (subnormal).

        CPUs and GPUs may flush subnormal numbers to 0 in float32 (and bfloat16, which has the same range);
        conversions to float16 keep them, in steps of 2 u tiny.
        """
        return self.u * self.tiny if self.name == "float16" else self.tiny


FORMATS = {
    f.name: f
    for f in (
        FloatFormat("float64", 2.0**-53, 2.0**-1022, float(np.finfo(np.float64).max), 8),
        FloatFormat("float32", 2.0**-24, 2.0**-126, float(np.finfo(np.float32).max), 4),
        FloatFormat("bfloat16", 2.0**-8, 2.0**-126, float.fromhex("0x1.fep127"), 2),
        FloatFormat("float16", 2.0**-11, 2.0**-14, 65504.0, 2),
    )
}

# Significant bits of NVIDIA's TF32, an operand format stored as float32: 10 and the implicit leading one.
TF32_BITS = 11


def float_format(name: str) -> FloatFormat:
    """The format of a dtype name; ValueError with the known names if it is unknown."""
    if name not in FORMATS:
        raise ValueError(f"Unknown dtype {name!r}. Choose one of: {', '.join(FORMATS)}.")
    return FORMATS[name]


def compute_format(name: str) -> FloatFormat:
    """The compute format for inputs of this dtype: float64 for float64, else float32."""
    return FORMATS["float64" if name == "float64" else "float32"]


def round_to(values: NDArray[Any], name: str) -> NDArray[np.float64]:
    """Round to nearest even in the format; returns float64.

    >>> round_to(np.array([1.001, 257.0]), "bfloat16")
    array([  1., 256.])
    """
    float_format(name)
    values = np.asarray(values, np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        if name == "float64":
            return values
        if name == "float32":
            return values.astype(np.float32).astype(np.float64)
        if name == "float16":
            return values.astype(np.float16).astype(np.float64)
        rounded = round_bits(values, 8)
        rounded = np.where(np.abs(rounded) > FORMATS["bfloat16"].max, np.copysign(np.inf, values), rounded)
        return np.where(np.isfinite(values), rounded, values)


def round_bits(values: NDArray[Any], bits: int) -> NDArray[np.float64]:
    """Round to nearest even to `bits` significant bits, with the smallest exponent of float32 and no overflow.

    >>> round_bits(np.array([1 + 2**-11, 1 + 3 * 2**-11]), TF32_BITS).tolist() == [1, 1 + 2**-9]
    True
    """
    values = np.asarray(values, np.float64)
    # frexp returns |mantissa| in [0.5, 1); values are rounded once, from float64.
    _, exponent = np.frexp(values)
    exponent = np.maximum(exponent, -125)  # below the normal range the spacing stays constant
    rounded = np.ldexp(np.round(np.ldexp(values, bits - exponent)), exponent - bits)
    return np.where(np.isfinite(values), rounded, values)


def ordered(values: NDArray[Any], name: str) -> NDArray[np.int64]:
    """Integers in the order of the numbers of a format: adjacent numbers differ by 1.

    -0 and 0 are adjacent, and all NaN map to one integer.

    >>> ordered(np.array([-0.0, 0.0, 1.0, 1.0 + 2**-7]), "bfloat16")
    array([   -1,     0, 16256, 16257])

    Args:
        values: exact in the format.
    """
    float_format(name)
    kind = {"float64": np.float64, "float16": np.float16}.get(name, np.float32)
    stored = np.asarray(values, kind)
    bits = np.where(np.isnan(stored), np.array(np.nan, kind), stored).view(f"i{stored.itemsize}").astype(np.int64)
    if name == "bfloat16":
        # A bfloat16 is the upper half of a float32.
        bits = bits >> 16
    width = 8 * float_format(name).itemsize
    return np.where(bits < 0, bits ^ ((1 << width - 1) - 1), bits)
