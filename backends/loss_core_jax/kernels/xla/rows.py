"""Terms and gradient of one distribution per row, from logits in memory or from linear rows.

From logits in memory, the terms are computed by chunks of rows, and the gradient in one pass.
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
from loss_core_jax.kernels import LinearGradients, LinearRows, RowOptions, Rows, Wanted
from loss_core_jax.kernels.xla.chunks import Arrays, Sizes, finite_max, map_chunks, rows_within, zero_where_ignored
from loss_core_jax.kernels.xla.linear import scan_chunks
from loss_core_jax.kernels.xla.tiles import Chunk, ChunkGradient, Tile, fold_tiles, product_gradient, zeros


def terms(options: RowOptions, sizes: Sizes, rows: Rows) -> RowTerms:
    """Terms of each row; two passes over the logits."""
    logits, target, num_classes, inverse, columns = rows
    dtype, vocab = arithmetic_dtype(logits), logits.shape[-1]
    # Without a cast, a softcap or an entropy XLA fuses exp(z - m) into its sum: no temporaries, so no chunks.
    is_fused = logits.dtype == dtype and not options.softcap and not options.sums.e and columns is None
    if is_fused or options.shard.partitioned:
        return _terms(rows, options, _is_class(rows))

    def chunk_terms(logits_CV: jax.Array, target_C: jax.Array, *rest: jax.Array) -> RowTerms:
        optional = iter(rest)
        inverse_C, columns_CK = (None if x is None else next(optional) for x in (inverse, columns))
        rows_C = Rows(logits_CV, target_C, num_classes, inverse_C, columns_CK)
        return _terms(rows_C, options, _is_class(rows_C))

    rest = [x.reshape(-1, *x.shape[target.ndim :]) for x in (inverse, columns) if x is not None]
    result = map_chunks(
        chunk_terms,
        (logits.reshape(-1, vocab), target.reshape(-1), *rest),
        rows_within(sizes.row_bytes, vocab * dtype.itemsize, at_least=16),
    )
    return RowTerms(*(None if x is None else x.reshape(*target.shape, *x.shape[1:]) for x in result))


def _terms(rows: Rows, options: RowOptions, is_class: jax.Array | None) -> RowTerms:
    """Terms of rows, all at once; logits are -inf where `is_class` is False; None: all columns are classes."""
    target = rows.target
    z, _ = _z_and_slope(rows, options, is_class)
    if rows.columns is not None:
        z = _set_columns(z, rows.columns, -jnp.inf, options)
    # The loss does not depend on m: as a constant, it causes no 0 / 0 from ties in second derivatives.
    m = lax.stop_gradient(jnp.max(z, axis=-1))
    s = _sum_exp(z, finite_max(m), target)
    z_sum = _z_sum(z, target, is_class) if options.sums.z_sum else None
    e = None
    if options.sums.e:
        e = jnp.sum(_weighted_exp(zero_where_ignored(z, target) - finite_max(m)[..., None]), axis=-1)
    return _replace_ignored(RowTerms(m, s, _target_z_and_slope(rows, options)[0], z_sum, e), target)


def _replace_ignored(terms: RowTerms, target: jax.Array) -> RowTerms:
    """The terms, those of ignored rows replaced by `IGNORED_ROW`."""
    ignored = target == IGNORED
    return RowTerms(
        *(
            None if x is None else jnp.where(ignored if x.ndim == ignored.ndim else ignored[..., None], constant, x)
            for x, constant in zip(terms, IGNORED_ROW, strict=True)
        )
    )


def _is_class(rows: Rows) -> jax.Array | None:
    return None if rows.num_classes is None else _column_indices(rows.logits) < rows.num_classes


def _z_and_slope(rows: Rows, options: RowOptions, is_class: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """z of the logits, and its slope dz / dlogits; None where that is 1 everywhere."""
    z, slope, inverse = rows.logits.astype(arithmetic_dtype(rows.logits)), None, rows.inverse_temperature
    if options.softcap:
        tanh = jnp.tanh(z / options.softcap)
        z, slope = options.softcap * tanh, 1 - tanh * tanh
        if is_class is not None:
            # The softcap of padding, -inf, would be finite.
            z = jnp.where(is_class, z, -jnp.inf)
    if inverse is None:
        return z, slope
    return z * inverse[..., None], inverse[..., None] if slope is None else slope * inverse[..., None]


@jax.custom_jvp
def _sum_exp(z: jax.Array, m: jax.Array, target: jax.Array) -> jax.Array:
    """Sum of exp(z - m) over the last axis; m is held constant."""
    # Ignored rows are not zeroed here: XLA would write out a copy of all rows before the sum.
    return jnp.sum(jnp.exp(z - m[..., None]), axis=-1)


@_sum_exp.defjvp
def _sum_exp_jvp(primals: tuple[jax.Array, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    z, m, target = primals
    # For second derivatives: without the zeros a NaN in an ignored row would be multiplied by a cotangent of 0.
    exp = jnp.exp(zero_where_ignored(z, target) - jnp.where(target == IGNORED, 0, m)[..., None])
    return _sum_exp(z, m, target), jnp.sum(exp * zero_where_ignored(tangents[0], target), axis=-1)


def _z_sum(z: jax.Array, target: jax.Array, is_class: jax.Array | None) -> jax.Array:
    z = zero_where_ignored(z, target)
    return jnp.sum(z if is_class is None else jnp.where(is_class, z, 0), axis=-1)


def _target_z_and_slope(rows: Rows, options: RowOptions) -> tuple[jax.Array, jax.Array | None]:
    """z [...] or [..., K] of each row's targets, -inf for negative columns; and its slope, as in `_z_and_slope`."""
    logits, has_one = rows.logits, rows.columns is None
    columns = rows.target[..., None] if rows.columns is None else rows.columns
    # Gathered before the cast: otherwise XLA would write out a cast of all logits.
    if not options.shard.partitioned:
        t = jnp.take_along_axis(logits, jnp.maximum(columns, 0), axis=-1)
    else:
        zero, index = jnp.zeros((), logits.dtype), _column_indices(logits)
        hits = (index == columns[..., k : k + 1] for k in range(columns.shape[-1]))
        t = jnp.stack([jnp.sum(jnp.where(hit, logits, zero), axis=-1) for hit in hits], axis=-1)
    z, slope = _z_and_slope(rows._replace(logits=t), options, None)
    z = jnp.where(columns >= 0, z, -jnp.inf)
    return z[..., 0] if has_one else z, slope


def gradient(rows: Rows, terms: RowTerms, coefficients: Coefficients, options: RowOptions) -> jax.Array:
    """Gradient of the logits: one elementwise pass, which XLA fuses and runs on all cores, with no temporaries."""
    logits, target = rows.logits, rows.target
    z, slope = _z_and_slope(rows._replace(logits=zero_where_ignored(logits, target)), options, _is_class(rows))
    x = z - finite_max(terms.m)[..., None]
    if rows.columns is None:
        gradient = _exp_gradient(x, coefficients)
        gradient = jnp.where(_column_indices(z) == target[..., None], coefficients.target[..., None], gradient)
        return zero_where_ignored(gradient if slope is None else gradient * slope, target).astype(logits.dtype)
    gradient = _exp_gradient(_zero_if_positive(x), coefficients)
    gradient = zero_where_ignored(gradient if slope is None else gradient * slope, target).astype(logits.dtype)
    _, slope = _target_z_and_slope(rows, options)
    of_targets = coefficients.target if slope is None else coefficients.target * slope
    return _set_columns(gradient, rows.columns, zero_where_ignored(of_targets, target).astype(logits.dtype), options)


def linear_terms(options: RowOptions, sizes: Sizes, rows: LinearRows) -> RowTerms:
    """Terms of each row."""

    def chunk_fn(chunk: Chunk, _: Any) -> tuple[RowTerms, None]:
        return _chunk_terms(chunk)[0], None

    terms: RowTerms = scan_chunks([rows], (), chunk_fn, options, sizes)[0]
    return terms


def linear_gradients(
    options: RowOptions, sizes: Sizes, rows: LinearRows, terms: RowTerms, coefficients: Coefficients
) -> LinearGradients:
    """Gradients of all rows, from their terms and coefficients."""

    def chunk_fn(chunk: Chunk, per_row_C: Any) -> tuple[None, ChunkGradient]:
        return None, _chunk_gradient(chunk, *per_row_C)

    return scan_chunks([rows], (terms, coefficients), chunk_fn, options, sizes, [Wanted()])[1][0]


def linear_terms_and_gradients(
    options: RowOptions, objective: Objective, wanted: Wanted, sizes: Sizes, rows: LinearRows, upstream: jax.Array
) -> tuple[RowTerms, LinearGradients]:
    """Terms, and gradients of upstream * the objective's one value, of all rows."""

    def chunk_fn(chunk: Chunk, upstream_C: Any) -> tuple[RowTerms, ChunkGradient]:
        terms, saved = _chunk_terms(chunk, save=True)
        return terms, _chunk_gradient(chunk, terms, objective.coefficients(jnp, terms, [upstream_C]), saved)

    terms, (gradients,) = scan_chunks([rows], upstream, chunk_fn, options, sizes, [wanted])
    return terms, gradients


def _chunk_terms(chunk: Chunk, *, save: bool = False) -> tuple[RowTerms, Arrays | None]:
    """Terms of each row, and the logits to save, as `fold_tiles` returns them."""

    def tile_fn(tile: Tile) -> RowTerms:
        return _terms(_tile_rows(tile), _tile_options(chunk), tile.is_class_1B)

    (source,), sums = chunk.sources, chunk.options.sums
    targets, zero_C = source.target if source.columns is None else source.columns, zeros(chunk, source.target.shape)
    identity = RowTerms(
        m=zero_C + EMPTY_ROW.m,
        s=zero_C,
        t=zeros(chunk, targets.shape) + EMPTY_ROW.t,
        z_sum=zero_C if sums.z_sum else None,
        e=zero_C if sums.e else None,
    )
    return fold_tiles(chunk, tile_fn, functools.partial(combine, jnp), identity, save=save)


def _chunk_gradient(
    chunk: Chunk, terms: RowTerms, coefficients: Coefficients, saved: Arrays | None = None
) -> ChunkGradient:
    def tile_fn(tile: Tile) -> list[jax.Array]:
        return [product_gradient(gradient(_tile_rows(tile), terms, coefficients, _tile_options(chunk)), tile, chunk)]

    return ChunkGradient(tile_fn, saved)


def _tile_rows(tile: Tile) -> Rows:
    return Rows(tile.logits[0], tile.target_C, columns=tile.columns_CK)


def _tile_options(chunk: Chunk) -> RowOptions:
    """The options for `_tile_rows`: the softcap has been applied to a tile's logits."""
    return chunk.options._replace(softcap=0.0)


def _set_columns(rows: jax.Array, columns: jax.Array, values: jax.Array | float, options: RowOptions) -> jax.Array:
    """The rows [..., V] with the values at K columns of each replaced.

    Args:
        columns: [..., K], negative for a column of another shard, which is skipped.
        values: [..., K], or one number.
    """
    if not options.shard.partitioned:
        inside = jnp.where(columns >= 0, columns, rows.shape[-1])
        return jnp.put_along_axis(rows, inside, values, axis=-1, inplace=False, mode="drop")
    index, values = _column_indices(rows), jnp.broadcast_to(values, columns.shape)
    for k in range(columns.shape[-1]):
        rows = jnp.where(index == columns[..., k : k + 1], values[..., k : k + 1], rows)
    return rows


def _zero_if_positive(x: jax.Array) -> jax.Array:
    """z - m, but 0 where positive: m excludes the targets, so that exp(z - m) of a target might overflow."""
    # Not jnp.minimum, whose derivative at 0 is 1/2.
    return jnp.where(x > 0, 0, x)


def _exp_gradient(x: jax.Array, coefficients: Coefficients) -> jax.Array:
    """exp(x) * (scale + slope * x) - uniform; see `row_terms.Coefficients`."""
    # exp(z - m) times 1 / s rather than exp(z - lse): at logits of 1e4 the lse has lost the low-order digits.
    gradient = jnp.exp(x) * coefficients.scale[..., None]
    if coefficients.slope is not None:
        gradient = gradient + _weighted_exp(x) * coefficients.slope[..., None]
    if coefficients.uniform is not None:
        gradient = gradient - coefficients.uniform[..., None]
    return gradient


def _weighted_exp(x: jax.Array) -> jax.Array:
    """exp(x) * x, 0 at -inf."""
    # The inner `where` keeps the infinity out of derivatives, too.
    return jnp.exp(x) * jnp.where(x == -jnp.inf, 0, x)


def _column_indices(rows: jax.Array) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, rows.shape, rows.ndim - 1)
