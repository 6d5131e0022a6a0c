"""Arithmetic with infinities, guarded where the plain expression would yield NaN."""

from __future__ import annotations

from typing import Any

Array = Any
Namespace = Any


def relative(xp: Namespace, m: Array, new_m: Array) -> Array:
    """m - new_m for maxima or logits; -inf where both are -inf."""
    # -inf minus -inf is NaN; -inf minus the lowest finite number is -inf. An empty piece must stay the identity.
    return m - xp.clip(new_m, xp.finfo(new_m.dtype).min, None)


def weighted(xp: Namespace, weight: Array, value: Array) -> Array:
    """weight * value; 0 where the weight is 0, even if the value is inf or NaN."""
    # The value is masked before the product, so that the derivative is 0 as well.
    return weight * xp.where(weight == 0, xp.zeros_like(value), value)


def log(xp: Namespace, x: Array) -> Array:
    """Natural logarithm; -inf at 0, without a warning and with a derivative of 0 there."""
    is_zero = x == 0
    return xp.where(is_zero, xp.full_like(x, -float("inf")), xp.log(xp.where(is_zero, xp.ones_like(x), x)))
