"""What the fields of configs accept: each function raises a ValueError that names field, value and what is accepted."""

from __future__ import annotations

import math
import numbers

REDUCTIONS = ("sum", "mean", "none")

_INT64 = 2**63


def check_reduction(value: object) -> None:
    """Refuse what is no reduction."""
    if not isinstance(value, str) or value not in REDUCTIONS:
        raise ValueError(f"Invalid reduction: {value!r}. reduction must be one of {', '.join(map(repr, REDUCTIONS))}.")


def check_bool(name: str, value: object) -> None:
    """Refuse what is no bool; a NumPy one neither."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}.")


def check_integer(name: str, value: object, low: int = -_INT64) -> None:
    """Refuse what is no integer, is below `low`, or does not fit 64 bits."""
    accepted = "an integer of 64 bits" if low == -_INT64 else f"an integer >= {low}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) < _INT64:
        raise ValueError(f"{name} must be {accepted}, got {value!r}.")


def check_number(name: str, value: object, accepted: str, *, zero: bool = False, below: float = math.inf) -> None:
    """Refuse what is no finite number > 0 (or 0, if accepted) and below a limit, or does not fit float32."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        hint = " (a string: YAML reads 1e-3 as text, write 1.0e-3)" if isinstance(value, str) else ""
        raise ValueError(f"{name} must be {accepted}, got {value!r}{hint}.")
    if value < 0 or (value == 0 and not zero) or float(value) >= below:
        raise ValueError(f"{name} must be {accepted}, got {value!r}.")
    # Kernels use its square and its reciprocal in float32, which holds 2**-126 to 2**127.
    if value != 0 and not 2.0**-63 <= float(value) <= 2.0**63:
        raise ValueError(f"{name} must be {accepted}, in 2**-63 to 2**63 (1.1e-19 to 9.2e18), got {value!r}.")
