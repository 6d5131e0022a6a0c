"""Rows of logits in memory: terms by chunks of rows, the gradient in one pass."""

# T = tokens, C = tokens of a chunk, V = vocabulary, K = targets of a row

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from loss_core.row_terms import Coefficients, RowTerms
from loss_core_jax.inputs import IGNORED, arithmetic_dtype
from loss_core_jax.kernels import How, Rows
from loss_core_jax.kernels.xla.chunks import finite, map_chunks, rows_within, without_ignored, zero_if_ignored
from loss_core_jax.kernels.xla.sizes import Sizes


def terms(how: How, sizes: Sizes, rows: Rows) -> RowTerms:
    """Terms of each row; two passes over the logits."""
    logits, target, num_classes, inverse, columns = rows
    dtype, vocab = arithmetic_dtype(logits), logits.shape[-1]
    # Without a cast, a softcap or an entropy XLA sums exp(z - m) straight from the logits: no temporaries, no chunks.
    plain = logits.dtype == dtype and not how.softcap and not how.sums.e and columns is None
    if plain or how.shard.partitioned:
        return _terms(rows, how)

    def of_chunk(logits_CV: jax.Array, target_C: jax.Array, *rest: jax.Array) -> RowTerms:
        optional = iter(rest)
        inverse_C, columns_CK = (None if x is None else next(optional) for x in (inverse, columns))
        return _terms(Rows(logits_CV, target_C, num_classes, inverse_C, columns_CK), how)

    of_rows = [x.reshape(-1, *x.shape[target.ndim :]) for x in (inverse, columns) if x is not None]
    found = map_chunks(
        of_chunk,
        (logits.reshape(-1, vocab), target.reshape(-1), *of_rows),
        rows_within(sizes.row_bytes, vocab * dtype.itemsize, at_least=16),
    )
    return RowTerms(*(None if x is None else x.reshape(*target.shape, *x.shape[1:]) for x in found))


def _terms(rows: Rows, how: How) -> RowTerms:
    target = rows.target
    z, _ = _read(rows, how)
    if rows.columns is not None:
        z = with_columns(z, rows.columns, -jnp.inf, how)
    # The loss does not depend on m, so it may be held constant: second derivatives get no 0 / 0 from ties.
    m = lax.stop_gradient(jnp.max(z, axis=-1))
    s = _sum_exp(z, finite(m), target)
    z_sum = _z_sum(z, target, rows.num_classes) if how.sums.z_sum else None
    e = jnp.sum(weighted_exp(zero_if_ignored(z, target) - finite(m)[..., None]), axis=-1) if how.sums.e else None
    return without_ignored(RowTerms(m, s, _at_targets(rows, how)[0], z_sum, e), target)


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


def _at_targets(rows: Rows, how: How) -> tuple[jax.Array, jax.Array | None]:
    """z of each row's targets, -inf where it has none here; and its slope as of `_read`. [...] or [..., K]."""
    logits, is_one = rows.logits, rows.columns is None
    columns = rows.target[..., None] if rows.columns is None else rows.columns
    # Gathered from the logits as given: from a cast XLA would write the cast out once more.
    if not how.shard.partitioned:
        t = jnp.take_along_axis(logits, jnp.maximum(columns, 0), axis=-1)
    else:
        zero, place = jnp.zeros((), logits.dtype), _columns(logits)
        hits = (place == columns[..., k : k + 1] for k in range(columns.shape[-1]))
        t = jnp.stack([jnp.sum(jnp.where(hit, logits, zero), axis=-1) for hit in hits], axis=-1)
    z, slope = _read(rows._replace(logits=t, num_classes=None), how)
    z = jnp.where(columns >= 0, z, -jnp.inf)
    return z[..., 0] if is_one else z, slope


def gradient(rows: Rows, terms: RowTerms, coefficients: Coefficients, how: How) -> jax.Array:
    """Gradient of the logits: one elementwise pass, which XLA fuses and runs on all cores, with no temporaries."""
    logits, target = rows.logits, rows.target
    z, slope = _read(rows._replace(logits=zero_if_ignored(logits, target)), how)
    x = z - finite(terms.m)[..., None]
    if rows.columns is None:
        gradient = exp_gradient(x, coefficients)
        gradient = jnp.where(_columns(z) == target[..., None], coefficients.target[..., None], gradient)
        return zero_if_ignored(gradient if slope is None else gradient * slope, target).astype(logits.dtype)
    gradient = exp_gradient(not_above(x), coefficients)
    gradient = zero_if_ignored(gradient if slope is None else gradient * slope, target).astype(logits.dtype)
    _, slope = _at_targets(rows, how)
    by_targets = coefficients.target if slope is None else coefficients.target * slope
    return with_columns(gradient, rows.columns, zero_if_ignored(by_targets, target).astype(logits.dtype), how)


def with_columns(rows: jax.Array, columns: jax.Array, values: jax.Array | float, how: How) -> jax.Array:
    """The rows [..., V] with other values at K columns of each, where it has them here.

    Args:
        columns: [..., K], negative where the row has none.
        values: [..., K], or one number.
    """
    if not how.shard.partitioned:
        inside = jnp.where(columns >= 0, columns, rows.shape[-1])
        return jnp.put_along_axis(rows, inside, values, axis=-1, inplace=False, mode="drop")
    place, values = _columns(rows), jnp.broadcast_to(values, columns.shape)
    for k in range(columns.shape[-1]):
        rows = jnp.where(place == columns[..., k : k + 1], values[..., k : k + 1], rows)
    return rows


def not_above(x: jax.Array) -> jax.Array:
    """z - m, where m is that of the other columns, with 0 for targets above: their exp might overflow."""
    # Not a minimum, whose derivative at 0 is 1/2.
    return jnp.where(x > 0, 0, x)


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
