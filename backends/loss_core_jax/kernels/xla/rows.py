"""Terms and gradient of one distribution per row: of logits in memory, and of linear rows.

Of logits in memory the terms are made by chunks of rows, and the gradient in one pass.
"""

# T = tokens, C = tokens of a chunk, V = vocabulary, B = vocabulary of a tile, K = targets of a row

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from loss_core.row_terms import EMPTY_ROW, IGNORED_ROW, Coefficients, Objective, RowTerms, combine
from loss_core_jax.inputs import IGNORED, arithmetic_dtype
from loss_core_jax.kernels import How, LinearGradients, LinearRows, Rows, Wanted
from loss_core_jax.kernels.xla.chunks import Arrays, Sizes, finite, map_chunks, rows_within, zero_if_ignored
from loss_core_jax.kernels.xla.linear import sweep
from loss_core_jax.kernels.xla.tiles import Chunk, Gradient, Tile, by_product, fold, zeros


def terms(how: How, sizes: Sizes, rows: Rows) -> RowTerms:
    """Terms of each row; two passes over the logits."""
    logits, target, num_classes, inverse, columns = rows
    dtype, vocab = arithmetic_dtype(logits), logits.shape[-1]
    # Without a cast, a softcap or an entropy XLA sums exp(z - m) straight from the logits: no temporaries, no chunks.
    plain = logits.dtype == dtype and not how.softcap and not how.sums.e and columns is None
    if plain or how.shard.partitioned:
        return _terms(rows, how, _is_class(rows))

    def of_chunk(logits_CV: jax.Array, target_C: jax.Array, *rest: jax.Array) -> RowTerms:
        optional = iter(rest)
        inverse_C, columns_CK = (None if x is None else next(optional) for x in (inverse, columns))
        of_these = Rows(logits_CV, target_C, num_classes, inverse_C, columns_CK)
        return _terms(of_these, how, _is_class(of_these))

    of_rows = [x.reshape(-1, *x.shape[target.ndim :]) for x in (inverse, columns) if x is not None]
    found = map_chunks(
        of_chunk,
        (logits.reshape(-1, vocab), target.reshape(-1), *of_rows),
        rows_within(sizes.row_bytes, vocab * dtype.itemsize, at_least=16),
    )
    return RowTerms(*(None if x is None else x.reshape(*target.shape, *x.shape[1:]) for x in found))


def _terms(rows: Rows, how: How, is_class: jax.Array | None) -> RowTerms:
    """Terms of rows, all at once; other columns than classes, None for none, hold -inf."""
    target = rows.target
    z, _ = _read(rows, how, is_class)
    if rows.columns is not None:
        z = _with_columns(z, rows.columns, -jnp.inf, how)
    # The loss does not depend on m, so it may be held constant: second derivatives get no 0 / 0 from ties.
    m = lax.stop_gradient(jnp.max(z, axis=-1))
    s = _sum_exp(z, finite(m), target)
    z_sum = _z_sum(z, target, is_class) if how.sums.z_sum else None
    e = jnp.sum(_weighted_exp(zero_if_ignored(z, target) - finite(m)[..., None]), axis=-1) if how.sums.e else None
    return _without_ignored(RowTerms(m, s, _at_targets(rows, how)[0], z_sum, e), target)


def _without_ignored(terms: RowTerms, target: jax.Array) -> RowTerms:
    """The terms, with those of ignored rows replaced."""
    ignored = target == IGNORED
    return RowTerms(
        *(
            None if x is None else jnp.where(ignored if x.ndim == ignored.ndim else ignored[..., None], other, x)
            for x, other in zip(terms, IGNORED_ROW, strict=True)
        )
    )


def _is_class(rows: Rows) -> jax.Array | None:
    return None if rows.num_classes is None else _columns(rows.logits) < rows.num_classes


def _read(rows: Rows, how: How, is_class: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """z of the logits; and its slope by the logits, where that is not 1 everywhere."""
    z, slope, inverse = rows.logits.astype(arithmetic_dtype(rows.logits)), None, rows.inverse_temperature
    if how.softcap:
        tanh = jnp.tanh(z / how.softcap)
        z, slope = how.softcap * tanh, 1 - tanh * tanh
        if is_class is not None:
            # Padding is -inf, of which the softcap would make a number.
            z = jnp.where(is_class, z, -jnp.inf)
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


def _z_sum(z: jax.Array, target: jax.Array, is_class: jax.Array | None) -> jax.Array:
    z = zero_if_ignored(z, target)
    return jnp.sum(z if is_class is None else jnp.where(is_class, z, 0), axis=-1)


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
    z, slope = _read(rows._replace(logits=t), how, None)
    z = jnp.where(columns >= 0, z, -jnp.inf)
    return z[..., 0] if is_one else z, slope


def gradient(rows: Rows, terms: RowTerms, coefficients: Coefficients, how: How) -> jax.Array:
    """Gradient of the logits: one elementwise pass, which XLA fuses and runs on all cores, with no temporaries."""
    logits, target = rows.logits, rows.target
    z, slope = _read(rows._replace(logits=zero_if_ignored(logits, target)), how, _is_class(rows))
    x = z - finite(terms.m)[..., None]
    if rows.columns is None:
        gradient = _exp_gradient(x, coefficients)
        gradient = jnp.where(_columns(z) == target[..., None], coefficients.target[..., None], gradient)
        return zero_if_ignored(gradient if slope is None else gradient * slope, target).astype(logits.dtype)
    gradient = _exp_gradient(_not_above(x), coefficients)
    gradient = zero_if_ignored(gradient if slope is None else gradient * slope, target).astype(logits.dtype)
    _, slope = _at_targets(rows, how)
    by_targets = coefficients.target if slope is None else coefficients.target * slope
    return _with_columns(gradient, rows.columns, zero_if_ignored(by_targets, target).astype(logits.dtype), how)


def linear_terms(how: How, sizes: Sizes, rows: LinearRows) -> RowTerms:
    """Terms of each row."""

    def of_chunk(chunk: Chunk, _: Any) -> tuple[RowTerms, None]:
        return _chunk_terms(chunk)[0], None

    found: RowTerms = sweep([rows], (), of_chunk, how, sizes)[0]
    return found


def linear_gradients(
    how: How, sizes: Sizes, rows: LinearRows, terms: RowTerms, coefficients: Coefficients
) -> LinearGradients:
    """Gradients of all rows, given their terms and coefficients."""

    def of_chunk(chunk: Chunk, given: Any) -> tuple[None, Gradient]:
        return None, _chunk_gradient(chunk, *given)

    return sweep([rows], (terms, coefficients), of_chunk, how, sizes, [Wanted()])[1][0]


def linear_terms_and_gradients(
    how: How, objective: Objective, wanted: Wanted, sizes: Sizes, rows: LinearRows, upstream: jax.Array
) -> tuple[RowTerms, LinearGradients]:
    """Terms, and gradients of upstream * the objective's one value, of all rows."""

    def of_chunk(chunk: Chunk, upstream_C: Any) -> tuple[RowTerms, Gradient]:
        terms, kept = _chunk_terms(chunk, keep=True)
        return terms, _chunk_gradient(chunk, terms, objective.coefficients(jnp, terms, [upstream_C]), kept)

    terms, (gradients,) = sweep([rows], upstream, of_chunk, how, sizes, [wanted])
    return terms, gradients


def _chunk_terms(chunk: Chunk, *, keep: bool = False) -> tuple[RowTerms, Arrays | None]:
    """Terms of each row, and the logits where they are to be kept."""

    def of_tile(tile: Tile) -> RowTerms:
        return _terms(_rows_of(tile), _of_tile(chunk), tile.is_class_1B)

    (source,), sums = chunk.sources, chunk.how.sums
    targets, zero_C = source.target if source.columns is None else source.columns, zeros(chunk, source.target.shape)
    empty = RowTerms(
        m=zero_C + EMPTY_ROW.m,
        s=zero_C,
        t=zeros(chunk, targets.shape) + EMPTY_ROW.t,
        z_sum=zero_C if sums.z_sum else None,
        e=zero_C if sums.e else None,
    )
    return fold(chunk, of_tile, functools.partial(combine, jnp), empty, keep=keep)


def _chunk_gradient(chunk: Chunk, terms: RowTerms, coefficients: Coefficients, kept: Arrays | None = None) -> Gradient:
    def of_tile(tile: Tile) -> list[jax.Array]:
        return [by_product(gradient(_rows_of(tile), terms, coefficients, _of_tile(chunk)), tile, chunk)]

    return Gradient(of_tile, kept)


def _rows_of(tile: Tile) -> Rows:
    return Rows(tile.logits[0], tile.target_C, columns=tile.columns_CK)


def _of_tile(chunk: Chunk) -> How:
    """That of the rows of a tile, whose logits have been through the softcap."""
    return chunk.how._replace(softcap=0.0)


def _with_columns(rows: jax.Array, columns: jax.Array, values: jax.Array | float, how: How) -> jax.Array:
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


def _not_above(x: jax.Array) -> jax.Array:
    """z - m, where m is that of the other columns, with 0 for targets above: their exp might overflow."""
    # Not a minimum, whose derivative at 0 is 1/2.
    return jnp.where(x > 0, 0, x)


def _exp_gradient(x: jax.Array, coefficients: Coefficients) -> jax.Array:
    """exp(x) * (scale + slope * x) - uniform; see `row_terms.Coefficients`."""
    # exp(z - m) times 1 / s rather than exp(z - lse): at logits of 1e4 the lse has lost the digits that count.
    gradient = jnp.exp(x) * coefficients.scale[..., None]
    if coefficients.slope is not None:
        gradient = gradient + _weighted_exp(x) * coefficients.slope[..., None]
    if coefficients.uniform is not None:
        gradient = gradient - coefficients.uniform[..., None]
    return gradient


def _weighted_exp(x: jax.Array) -> jax.Array:
    """exp(x) * x, 0 at -inf."""
    # The inner one keeps the infinity out of derivatives as well.
    return jnp.exp(x) * jnp.where(x == -jnp.inf, 0, x)


def _columns(rows: jax.Array) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, rows.shape, rows.ndim - 1)
