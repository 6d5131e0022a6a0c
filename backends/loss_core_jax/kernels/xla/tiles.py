"""Loops over the tiles of the vocabulary of one chunk of linear rows.

A tile is to the kernels of rows and of pairs as a shard of the vocabulary: its terms are combined with those of other
tiles, and its gradient is computed from the terms of full rows. Each tile of the weight is cast and multiplied, and its
gradient added, separately, so that no temporary is `[V, H]`.
"""

# C = tokens of a chunk, V = vocabulary, N = tiles of the vocabulary, B = vocabulary of a tile, H = hidden,
# K = targets of a row

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from loss_core_jax.inputs import local_columns
from loss_core_jax.kernels import LinearGradients, LinearRows, RowOptions
from loss_core_jax.kernels.xla.chunks import (
    Arrays,
    Plan,
    barrier,
    slice_rows,
    update_rows,
    zero_where_ignored,
    zeros_for_loop,
)


class Chunk(NamedTuple):
    """C rows of each source: hidden states [C, H], 0 where ignored, and the full weight."""

    sources: tuple[LinearRows, ...]
    options: RowOptions
    plan: Plan

    @property
    def target(self) -> jax.Array:
        return self.sources[0].target


class Tile(NamedTuple):
    """The logits of a chunk over B consecutive classes.

    The last tile starts early enough to be full; the columns that it repeats are excluded from every sum.

    Attributes:
        start: its first column.
        is_class_1B: False in repeated columns and in padding.
        target_C, columns_CK: as in `Rows`, relative to the tile.
        weights: [B, H] of each source, in the dtype of the hidden states, which is that of the products.
        logits: [C, B] of each source after softcap and temperature, -inf where is_class_1B is False.
    """

    start: jax.Array
    is_class_1B: jax.Array
    target_C: jax.Array
    columns_CK: jax.Array | None
    weights: Arrays
    logits: Arrays


class ChunkGradient(NamedTuple):
    """How to compute the gradient of a chunk.

    Attributes:
        tile_fn: gradient [C, B] of a tile with respect to `hidden @ weight.T` of each source.
        saved: the logits of all tiles, as `fold_tiles` returns them; None to recompute them.
    """

    tile_fn: Callable[[Tile], Sequence[jax.Array]]
    saved: Arrays | None = None


def fold_tiles(
    chunk: Chunk,
    tile_fn: Callable[[Tile], Any],
    combine: Callable[[Any, Any], Any],
    identity: Any,
    *,
    saved: Arrays | None = None,
    save: bool = False,
) -> tuple[Any, Arrays | None]:
    """Results of `tile_fn` combined over the tiles; and with `save` the logits of each source, [N, C, B], else None.

    Args:
        identity: of `combine`.
        saved: the logits that an earlier call returned; None to recompute them.
    """

    def body(total: Any, index_and_saved: Any) -> tuple[Any, Arrays | None]:
        tile = _tile_at(chunk, *index_and_saved)
        return combine(total, tile_fn(tile)), tile.logits if save else None

    result: tuple[Any, Arrays | None] = lax.scan(body, identity, (_tile_indices(chunk), saved))
    return result


def zeros(chunk: Chunk, shape: tuple[int, ...]) -> jax.Array:
    """Zeros in the dtype of the arithmetic, as the initial carry of a loop over the tiles."""
    return zeros_for_loop(shape, chunk.plan.dtype, *jax.tree.leaves(chunk.sources))


def product_gradient(dz_CB: jax.Array, tile: Tile, chunk: Chunk) -> jax.Array:
    """Gradient with respect to `hidden @ weight.T` of the one source, from that with respect to its logits."""
    (source,), (z_CB,), softcap = chunk.sources, tile.logits, chunk.options.softcap
    if source.inverse_temperature is not None:
        dz_CB = dz_CB * source.inverse_temperature[:, None]
        z_CB = z_CB / source.inverse_temperature[:, None]
    if softcap:
        capped_CB = jnp.where(tile.is_class_1B, z_CB / softcap, 0)
        dz_CB = dz_CB * (1 - capped_CB * capped_CB)
    return dz_CB


def add_gradients(chunk: Chunk, gradient: ChunkGradient, dheads: Any, wanted: Any) -> tuple[LinearGradients, ...]:
    """Gradients of the chunk's hidden states, and `dheads`, the sums of the heads' gradients, plus this chunk's."""

    def body(sums: Any, index_and_saved: Any) -> tuple[Any, None]:
        tile = _tile_at(chunk, *index_and_saved)
        # The logit of a repeated column is -inf, but the `uniform` part of its gradient is not 0.
        of_classes = (jnp.where(tile.is_class_1B, x, 0) for x in gradient.tile_fn(tile))
        dproducts = (zero_where_ignored(x, chunk.target) for x in of_classes)
        parts = zip(sums, dproducts, chunk.sources, tile.weights, strict=True)
        return tuple(_add_tile(*part, tile.start, chunk) for part in parts), None

    zeros_CH = (
        zeros(chunk, x.hidden.shape) if needs.hidden else None for x, needs in zip(chunk.sources, wanted, strict=True)
    )
    sums = tuple(LinearGradients(x, *dhead) for x, dhead in zip(zeros_CH, dheads, strict=True))
    sums, _ = lax.scan(body, sums, (_tile_indices(chunk), gradient.saved))

    def without_ignored(x: LinearGradients) -> LinearGradients:
        # Even there: an inf in the weight times a gradient of 0 is NaN.
        return x._replace(hidden=None if x.hidden is None else zero_where_ignored(x.hidden, chunk.target))

    return tuple(map(without_ignored, sums))


def _add_tile(
    sums: LinearGradients, dlogits_CB: jax.Array, rows: LinearRows, weight_BH: jax.Array, start: jax.Array, chunk: Chunk
) -> LinearGradients:
    """The sums plus the products of a tile."""
    (dhidden_CH, dweight_VH, dbias_V), plan = sums, chunk.plan
    if dhidden_CH is not None:
        dhidden_CH = dhidden_CH + _product(dlogits_CB, weight_BH, 1, 0, plan)
    if dweight_VH is not None:
        written_out = plan.sizes.is_cpu and not chunk.options.shard.partitioned
        dlogits_BC = barrier(dlogits_CB.T)[0] if written_out else dlogits_CB.T
        part_BH = _product(dlogits_BC, rows.hidden, 1, 0, plan)
        dweight_VH = update_rows(dweight_VH, slice_rows(dweight_VH, start, plan.tile) + part_BH, start)
    if dbias_V is not None:
        dbias_B = slice_rows(dbias_V, start, plan.tile) + jnp.sum(dlogits_CB, axis=0)
        dbias_V = update_rows(dbias_V, dbias_B, start)
    return LinearGradients(dhidden_CH, dweight_VH, dbias_V)


def _tile_at(chunk: Chunk, index: jax.Array, logits: Arrays | None) -> Tile:
    """The tile with an index, its logits computed unless given."""
    first, plan = chunk.sources[0], chunk.plan
    first_new, start = index * plan.tile, jnp.minimum(index * plan.tile, first.weight_VH.shape[0] - plan.tile)
    column_1B = (start + jnp.arange(plan.tile, dtype=np.int32))[None]
    is_class_1B = column_1B >= first_new
    if first.num_classes is not None:
        is_class_1B = is_class_1B & (column_1B < first.num_classes)
    weights = tuple(slice_rows(x.weight_VH, start, plan.tile).astype(x.hidden.dtype) for x in chunk.sources)
    if logits is None:
        parts = zip(chunk.sources, weights, strict=True)
        logits = tuple(jnp.where(is_class_1B, _logits(x, w, start, chunk), -jnp.inf) for x, w in parts)
    target_C, columns_CK = jax.tree.map(
        lambda x: local_columns(x, first_new, start + plan.tile, start), (first.target, first.columns)
    )
    return Tile(start, is_class_1B, target_C, columns_CK, weights, logits)


def _logits(rows: LinearRows, weight_BH: jax.Array, start: jax.Array, chunk: Chunk) -> jax.Array:
    """[C, B] logits after softcap and temperature."""
    plan, softcap = chunk.plan, chunk.options.softcap
    z_CB = _product(rows.hidden, weight_BH, 1, 1, plan)
    if rows.bias_V is not None:
        z_CB = z_CB + slice_rows(rows.bias_V, start, plan.tile).astype(plan.dtype)
    if softcap:
        z_CB = softcap * jnp.tanh(z_CB / softcap)
    return z_CB if rows.inverse_temperature is None else z_CB * rows.inverse_temperature[:, None]


def _product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int, plan: Plan) -> jax.Array:
    """The contraction of a and b over one axis of each, accumulated in the dtype of the arithmetic."""
    if a.dtype != b.dtype or str(a.dtype) in plan.sizes.widened:
        a, b = a.astype(plan.dtype), b.astype(plan.dtype)
    return lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=plan.dtype
    )


def _tile_indices(chunk: Chunk) -> jax.Array:
    """Indices of all tiles, int32."""
    return jnp.arange(-(-chunk.sources[0].weight_VH.shape[0] // chunk.plan.tile), dtype=np.int32)
