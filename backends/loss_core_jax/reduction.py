"""Reduction of the losses of rows: the factor of each row, the sum, and the metrics."""

# T = tokens (any leading dimensions)

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from loss_core.field_checks import NUM_VALID, TOKEN_METRICS
from loss_core_jax.inputs import IGNORED, INVALID

# Values and metrics of each row, each of the shape of the labels.
RowResults = tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]

# What a cross entropy returns: the loss, or with metrics the pair (loss, metrics).
Result = jax.Array | tuple[jax.Array, dict[str, jax.Array]]


# Under jit, so that an eager call runs one program.
@functools.partial(jax.jit, static_argnames=("dtype", "mean"))
def row_scale(
    target: jax.Array,
    dtype: Any,
    *,
    mean: bool = False,
    count: jax.Array | None = None,
    loss_weights: jax.Array | None = None,
) -> jax.Array:
    """Factor of each row's loss in the total, shape of target; 0 for ignored rows.

    Args:
        target: classes, IGNORED or INVALID.
        dtype: of the arithmetic.
        mean: divide by the number of rows that are not ignored (at least 1).
        count: divide by this instead; where it is 0, every factor is 0.
        loss_weights: factor of each row, or None.
    """
    valid = target != IGNORED
    # where, not a product: a weight of inf at an ignored row times 0 is NaN.
    scale = valid.astype(dtype) if loss_weights is None else jnp.where(valid, loss_weights.astype(dtype), 0)
    if count is not None:
        divisor = jnp.where(count == 0, 1, count.astype(dtype))
        return jnp.where(count == 0, 0, scale / divisor)
    if mean:
        return scale / jnp.maximum(jnp.sum(valid), 1).astype(dtype)
    return scale


@jax.jit
def total(loss: jax.Array, scale: jax.Array, count: jax.Array | None) -> jax.Array:
    """Sum of scale * loss over all rows; see `guard_count`."""
    return guard_count(jnp.sum(scale * loss), count)


def guard_count(total: jax.Array, count: jax.Array | None) -> jax.Array:
    """A total divided by the count: 0 (with gradient 0) where the count is 0, NaN where it is negative or NaN."""
    if count is None:
        return total
    # The factors of a count of 0 are 0, but 0 * inf (a target of probability 0) is NaN.
    return jnp.where(count == 0, 0, total * jnp.where(count >= 0, 1, jnp.nan).astype(total.dtype))


def valid_losses(loss: jax.Array, target: jax.Array) -> jax.Array:
    """Losses of rows: 0 where the row is ignored, NaN where its label is invalid."""
    return jnp.where(target == IGNORED, 0, nan_if_invalid(loss, target))


def valid_upstream(upstream: jax.Array, target: jax.Array) -> jax.Array:
    """Upstream gradients of rows: 0 where the row is ignored, even if inf or NaN; NaN where its label is invalid."""
    return jnp.where(target == IGNORED, 0, nan_if_invalid(upstream, target))


def nan_if_invalid(value: jax.Array, target: jax.Array) -> jax.Array:
    """The values, NaN where the row's label is invalid."""
    return jnp.where(target == INVALID, jnp.nan, value)


def row_metrics(names: Sequence[str]) -> tuple[str, ...]:
    """The metrics that have a value for each row: all but the number of valid tokens."""
    return tuple(name for name in names if name in TOKEN_METRICS)


def with_metrics(
    names: Sequence[str],
    loss: jax.Array,
    metrics: Sequence[jax.Array],
    target: jax.Array,
    reduce: Callable[[jax.Array], jax.Array],
) -> Result:
    """The loss, or with metrics the pair (loss, metrics by name); metrics are reduced and not differentiated.

    Args:
        metrics: of each row, in the order of `row_metrics(names)`.
        target: of all rows, classes or IGNORED or INVALID.
        reduce: the reduction of the loss.
    """
    if not names:
        return loss
    values: dict[str, Any] = dict(zip(row_metrics(names), map(reduce, metrics), strict=True))
    values[NUM_VALID] = jnp.sum(target != IGNORED)
    return loss, {name: lax.stop_gradient(values[name]) for name in names}
