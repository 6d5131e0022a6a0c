"""Rows of logits in memory: terms by chunks of rows, the gradient in one pass."""

# T = tokens, C = tokens of a chunk, V = vocabulary

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from loss_core.row_terms import Coefficients, Objective, RowTerms
from loss_core_jax.inputs import IGNORED, arithmetic_dtype
from loss_core_jax.kernels import Rows, Shard
from loss_core_jax.kernels.xla.chunks import finite, map_chunks, rows_within, without_ignored, zero_if_ignored

# XLA for CPU writes a cast of the logits out before it sums over it; chunks bound this temporary, and keep it in cache.
TEMPORARY_BYTES = 8 << 20


def terms(rows: Rows, objective: Objective, shard: Shard, temporary_bytes: int) -> RowTerms:
    """Terms of each row; two passes over the logits."""
    logits, target, num_classes = rows
    dtype, vocab = arithmetic_dtype(logits), logits.shape[-1]
    of_rows = functools.partial(
        _terms, num_classes=num_classes, needs_z_sum=objective.needs_z_sum, gather=not shard.partitioned
    )
    # Without a cast XLA sums exp(z - m) straight from the logits: no temporaries, so no chunks.
    if logits.dtype == dtype or shard.partitioned:
        return of_rows(logits, target)
    # A tuple for the loop over chunks, which takes no None.
    flat = map_chunks(
        lambda *chunk: tuple(x for x in of_rows(*chunk) if x is not None),
        (logits.reshape(-1, vocab), target.reshape(-1)),
        rows_within(temporary_bytes, vocab * dtype.itemsize, at_least=16),
    )
    return RowTerms(*(x.reshape(target.shape) for x in flat))


def _terms(
    logits: jax.Array, target: jax.Array, *, num_classes: jax.Array | None, needs_z_sum: bool, gather: bool
) -> RowTerms:
    z = logits.astype(arithmetic_dtype(logits))
    # The loss does not depend on m, so it may be held constant: second derivatives get no 0 / 0 from ties.
    m = lax.stop_gradient(jnp.max(z, axis=-1))
    s = _sum_exp(z, finite(m), target)
    z_sum = _z_sum(z, target, num_classes) if needs_z_sum else None
    found = RowTerms(m, s, _target_logit(logits, target, gather=gather).astype(z.dtype), z_sum)
    return without_ignored(found, target)


@jax.custom_jvp
def _sum_exp(z: jax.Array, m: jax.Array, target: jax.Array) -> jax.Array:
    """Sum of exp(z - m) over the last axis; m is held constant."""
    # The rows as they are: zeros in place of ignored ones would be a copy of all, made before the sum.
    return jnp.sum(jnp.exp(z - m[..., None]), axis=-1)


@_sum_exp.defjvp
def _sum_exp_jvp(primals: tuple[jax.Array, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    z, m, target = primals
    # For second derivatives: without the zeros a NaN in an ignored row would meet a cotangent of 0.
    exp = jnp.exp(zero_if_ignored(z, target) - jnp.where(target == IGNORED, 0, m)[..., None])
    return _sum_exp(z, m, target), jnp.sum(exp * zero_if_ignored(tangents[0], target), axis=-1)


def _z_sum(z: jax.Array, target: jax.Array, num_classes: jax.Array | None) -> jax.Array:
    z = zero_if_ignored(z, target)
    if num_classes is not None:
        z = jnp.where(_columns(z) < num_classes, z, 0)
    return jnp.sum(z, axis=-1)


def _target_logit(logits: jax.Array, target: jax.Array, *, gather: bool) -> jax.Array:
    """The logit of each row's class, -inf where the row has none here."""
    # Gathered from the logits as given: from a cast XLA would write the cast out once more.
    if gather:
        t = jnp.take_along_axis(logits, jnp.maximum(target, 0)[..., None], axis=-1)[..., 0]
    else:
        is_target = _columns(logits) == target[..., None]
        t = jnp.sum(jnp.where(is_target, logits, jnp.zeros((), logits.dtype)), axis=-1)
    return jnp.where(target >= 0, t, -jnp.inf)


def gradient(rows: Rows, terms: RowTerms, coefficients: Coefficients) -> jax.Array:
    """Gradient of the logits: one elementwise pass, which XLA fuses and runs on all cores, with no temporaries."""
    logits, target = rows.logits, rows.target
    z = zero_if_ignored(logits.astype(arithmetic_dtype(logits)), target)
    # exp(z - m) times 1 / s rather than exp(z - lse): at logits of 1e4 the lse has lost the digits that count.
    gradient = jnp.exp(z - finite(terms.m)[..., None]) * coefficients.scale[..., None]
    if coefficients.uniform is not None:
        gradient = gradient - coefficients.uniform[..., None]
    gradient = gradient + jnp.where(_columns(z) == target[..., None], coefficients.target[..., None], 0)
    return zero_if_ignored(gradient, target).astype(logits.dtype)


def _columns(rows: jax.Array) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, rows.shape, rows.ndim - 1)
