"""From arguments that have been checked to the loss: targets, losses per row, the factor of each row, the sum.

The factor per row is made first, so that the fused loss can fold it into gradients it computes in the forward.
"""

# T = tokens (any leading dimensions)

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from loss_core_jax import sharded
from loss_core_jax.checks import IGNORED, classify
from loss_core_jax.chunked import same_varying_axes
from loss_core_jax.cross_entropy import cross_entropy_rows
from loss_core_jax.distillation import distillation_rows
from loss_core_jax.layout import Layout


@functools.partial(jax.jit, static_argnames=("ignore_index", "reduction", "upcast", "layout"))
def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    mask: jax.Array | None,
    count: jax.Array | None,
    loss_weights: jax.Array | None,
    *,
    ignore_index: int,
    reduction: str,
    upcast: bool,
    layout: Layout | None,
) -> jax.Array:
    """The loss over logits, reduced; arguments have been checked."""
    vocab = logits.shape[-1] if layout is None else layout.vocab(logits.shape[-1])
    target = classify(jnp, labels, mask, ignore_index, vocab)
    if layout is None:
        loss = cross_entropy_rows(*same_varying_axes(logits, target))
    else:
        loss = sharded.cross_entropy_rows(logits, target, layout)
    if reduction != "none":
        scale = _row_scale(target, loss.dtype, mean=reduction == "mean", count=count, loss_weights_T=loss_weights)
        loss = total(loss, scale, count)
    return loss if upcast else loss.astype(logits.dtype)


@functools.partial(jax.jit, static_argnames=("ignore_index", "vocab", "mean", "dtype"))
def linear_targets_and_scale(
    labels: jax.Array,
    count: jax.Array | None,
    loss_weights: jax.Array | None,
    *,
    ignore_index: int,
    vocab: int,
    mean: bool,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """Target and factor of each row, for the fused loss, which sums by itself."""
    target = classify(jnp, labels, None, ignore_index, vocab)
    return target, _row_scale(target, dtype, mean=mean, count=count, loss_weights_T=loss_weights)


@functools.partial(jax.jit, static_argnames=("ignore_index", "temperature", "chunk_size", "upcast", "layout"))
def distillation(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array,
    count: jax.Array | None,
    *,
    ignore_index: int,
    temperature: float,
    chunk_size: int,
    upcast: bool,
    layout: Layout | None,
) -> jax.Array:
    """The divergence, reduced; arguments have been checked."""
    vocab = student.shape[-1] if layout is None else layout.vocab(student.shape[-1])
    target = classify(jnp, labels, None, ignore_index, vocab)
    if layout is None:
        student, teacher, target = same_varying_axes(student, teacher, target)
        loss = distillation_rows(student, teacher, target, temperature, chunk_size)
    else:
        loss = sharded.distillation_rows(student, teacher, target, temperature, chunk_size, layout)
    loss = total(loss, _row_scale(target, loss.dtype, mean=True, count=count, loss_weights_T=None), count)
    return loss if upcast else loss.astype(student.dtype)


def _row_scale(
    target_T: jax.Array, dtype: Any, *, mean: bool, count: jax.Array | None, loss_weights_T: jax.Array | None
) -> jax.Array:
    """Factor of each row's loss in the total, 0 for ignored rows.

    Args:
        target_T: classes, IGNORED or INVALID.
        dtype: of the arithmetic.
        mean: divide by the number of rows that are not ignored (at least 1).
        count: divide by this instead; 0 makes every factor 0.
        loss_weights_T: multiplied in.
    """
    counted_T = target_T != IGNORED
    scale_T = counted_T.astype(dtype)
    if loss_weights_T is not None:
        # where, not a product: a weight of inf at an ignored row must leave no trace.
        scale_T = jnp.where(counted_T, loss_weights_T.astype(dtype), jnp.zeros((), dtype))
    if count is not None:
        safe = jnp.where(count == 0, jnp.ones((), dtype), count.astype(dtype))
        scale_T = jnp.where(count == 0, jnp.zeros((), dtype), scale_T / safe)
    elif mean:
        scale_T = scale_T / jnp.maximum(jnp.sum(counted_T), 1).astype(dtype)
    return scale_T


def total(loss_T: jax.Array, scale_T: jax.Array, count: jax.Array | None) -> jax.Array:
    """Sum of scale * loss, 0 for a count of 0."""
    return zero_without_tokens(jnp.sum(scale_T * loss_T), count)


def zero_without_tokens(loss: jax.Array, count: jax.Array | None) -> jax.Array:
    """The loss, or a 0 that is still connected to the graph when count is 0."""
    # The factors are 0 then, but 0 * inf (a target of probability 0) is NaN.
    return loss if count is None else jnp.where(count == 0, jnp.zeros((), loss.dtype), loss)
