"""Arithmetic with infinities: what NaN would come of where a number is meant."""

from __future__ import annotations

from typing import Any

Array = Any
Namespace = Any


def relative(xp: Namespace, m: Array, new_m: Array) -> Array:
    """m - new_m, of maxima or logits; -inf where both are."""
    # -inf minus -inf is NaN, and minus the least finite number -inf: an empty piece must stay the identity.
    return m - xp.clip(new_m, xp.finfo(new_m.dtype).min, None)


def weighted(xp: Namespace, weight: Array, value: Array) -> Array:
    """weight * value, 0 where the weight is, even if the value is inf or NaN."""
    # Inside of the product, so that its derivative is 0 as well.
    return weight * xp.where(weight == 0, xp.zeros_like(value), value)


def log(xp: Namespace, x: Array) -> Array:
    """Logarithm, -inf at 0 without a warning, and with a derivative of 0 there."""
    none = x == 0
    return xp.where(none, xp.full_like(x, -float("inf")), xp.log(xp.where(none, xp.ones_like(x), x)))
