"""Rows of logits in memory: terms by chunks of rows, the gradient in one pass."""

# T = tokens, C = tokens of a chunk, V = vocabulary

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from loss_core.row_terms import Coefficients, RowTerms
from loss_core_jax.inputs import IGNORED, arithmetic_dtype
from loss_core_jax.kernels import How, Rows
from loss_core_jax.kernels.xla.chunks import finite, map_chunks, rows_within, without_ignored, zero_if_ignored

# XLA for CPU writes a cast of the logits out before it sums over it; chunks bound this temporary, and keep it in cache.
TEMPORARY_BYTES = 8 << 20


def terms(rows: Rows, how: How, temporary_bytes: int) -> RowTerms:
    """Terms of each row; two passes over the logits."""
    logits, target, num_classes, inverse = rows
    dtype, vocab = arithmetic_dtype(logits), logits.shape[-1]
    # Without a cast or a softcap XLA sums exp(z - m) straight from the logits: no temporaries, so no chunks.
    if (logits.dtype == dtype and not how.softcap) or how.shard.partitioned:
        return _terms(rows, how)

    def of_chunk(logits_CV: jax.Array, target_C: jax.Array, *inverse_C: jax.Array) -> RowTerms:
        return _terms(Rows(logits_CV, target_C, num_classes, *inverse_C), how)

    found = map_chunks(
        of_chunk,
        (logits.reshape(-1, vocab), target.reshape(-1), *([] if inverse is None else [inverse.reshape(-1)])),
        rows_within(temporary_bytes, vocab * dtype.itemsize, at_least=16),
    )
    return RowTerms(*(None if x is None else x.reshape(target.shape) for x in found))


def _terms(rows: Rows, how: How) -> RowTerms:
    target = rows.target
    z, _ = _read(rows, how)
    # The loss does not depend on m, so it may be held constant: second derivatives get no 0 / 0 from ties.
    m = lax.stop_gradient(jnp.max(z, axis=-1))
    s = _sum_exp(z, finite(m), target)
    z_sum = _z_sum(z, target, rows.num_classes) if how.sums.z_sum else None
    e = jnp.sum(weighted_exp(zero_if_ignored(z, target) - finite(m)[..., None]), axis=-1) if how.sums.e else None
    return without_ignored(RowTerms(m, s, _target_logit(rows, how), z_sum, e), target)


def _read(rows: Rows, how: How) -> tuple[jax.Array, jax.Array | None]:
    """z of the logits; and its slope by the logits, where that is not 1 everywhere."""
    z, slope, inverse = rows.logits.astype(arithmetic_dtype(rows.logits)), None, rows.inverse_temperature
    if how.softcap:
        tanh = jnp.tanh(z / how.softcap)
        z, slope = how.softcap * tanh, 1 - tanh * tanh
        if rows.num_classes is not None:
            # Padding is -inf, of which the softcap would make a number.
            z = jnp.where(_columns(z) < rows.num_classes, z, -jnp.inf)
    if inverse is None:
        return z, slope
    return z * inverse[..., None], inverse[..., None] if slope is None else slope * inverse[..., None]


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


def _target_logit(rows: Rows, how: How) -> jax.Array:
    """z of each row's class, -inf where the row has none here."""
    logits, target = rows.logits, rows.target
    # Gathered from the logits as given: from a cast XLA would write the cast out once more.
    if not how.shard.partitioned:
        t = jnp.take_along_axis(logits, jnp.maximum(target, 0)[..., None], axis=-1)
    else:
        is_target = _columns(logits) == target[..., None]
        t = jnp.sum(jnp.where(is_target, logits, jnp.zeros((), logits.dtype)), axis=-1, keepdims=True)
    z, _ = _read(rows._replace(logits=t, num_classes=None), how)
    return jnp.where(target >= 0, z[..., 0], -jnp.inf)


def gradient(rows: Rows, terms: RowTerms, coefficients: Coefficients, how: How) -> jax.Array:
    """Gradient of the logits: one elementwise pass, which XLA fuses and runs on all cores, with no temporaries."""
    logits, target = rows.logits, rows.target
    z, slope = _read(rows._replace(logits=zero_if_ignored(logits, target)), how)
    gradient = exp_gradient(z - finite(terms.m)[..., None], coefficients)
    gradient = gradient + jnp.where(_columns(z) == target[..., None], coefficients.target[..., None], 0)
    if slope is not None:
        gradient = gradient * slope
    return zero_if_ignored(gradient, target).astype(logits.dtype)


def exp_gradient(x: jax.Array, coefficients: Coefficients) -> jax.Array:
    """exp(x) * (scale + slope * x) - uniform; see `row_terms.Coefficients`."""
    # exp(z - m) times 1 / s rather than exp(z - lse): at logits of 1e4 the lse has lost the digits that count.
    gradient = jnp.exp(x) * coefficients.scale[..., None]
    if coefficients.slope is not None:
        gradient = gradient + weighted_exp(x) * coefficients.slope[..., None]
    if coefficients.uniform is not None:
        gradient = gradient - coefficients.uniform[..., None]
    return gradient


def weighted_exp(x: jax.Array) -> jax.Array:
    """exp(x) * x, 0 at -inf."""
    # The inner one keeps the infinity out of derivatives as well.
    return jnp.exp(x) * jnp.where(x == -jnp.inf, 0, x)


def _columns(rows: jax.Array) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, rows.shape, rows.ndim - 1)
