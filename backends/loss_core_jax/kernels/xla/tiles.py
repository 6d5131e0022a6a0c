"""One chunk of linear rows: its terms and gradients, the vocabulary taken in tiles.

A tile of the weight at a time is cast, multiplied and added to, so no product makes a temporary of `[V, H]`.
"""

# C = tokens of a chunk, V = vocabulary, N = tiles of the vocabulary, B = vocabulary of a tile, H = hidden,
# K = targets of a row

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from loss_core.row_terms import EMPTY_ROW, Coefficients, RowTerms, combine
from loss_core_jax.kernels import How, LinearGradients, Wanted
from loss_core_jax.kernels.xla.chunks import (
    behind_barrier,
    finite,
    put_rows,
    take_rows,
    without_ignored,
    zero_if_ignored,
    zeros_for_loop,
)
from loss_core_jax.kernels.xla.rows import exp_gradient, not_above, weighted_exp, with_columns
from loss_core_jax.kernels.xla.sizes import Plan


class Chunk(NamedTuple):
    """Rows of one chunk.

    Attributes:
        hidden_CH: zeros in ignored rows.
        weight_VH: the whole weight.
        target_C: as in `LinearRows`.
        num_classes, inverse_C, bias_V, columns_CK: as in `LinearRows`.
    """

    hidden_CH: jax.Array
    weight_VH: jax.Array
    target_C: jax.Array
    num_classes: jax.Array | None
    inverse_C: jax.Array | None
    bias_V: jax.Array | None
    columns_CK: jax.Array | None


class Tile(NamedTuple):
    """A piece of the vocabulary of one weight.

    The last tile is moved back so that it ends with the vocabulary; the columns it repeats are left out of
    every sum.
    """

    start: jax.Array
    weight_BH: jax.Array  # in the dtype of the hidden states, in which products are made
    class_1B: jax.Array  # class of each column, -1 where repeated or padding


def tile_at(chunk: Chunk, index: jax.Array, plan: Plan) -> Tile:
    """The tile of an index."""
    start = jnp.minimum(index * plan.tile, chunk.weight_VH.shape[0] - plan.tile)
    class_1B = (start + jnp.arange(plan.tile, dtype=np.int32))[None]
    is_new = class_1B >= index * plan.tile
    if chunk.num_classes is not None:
        is_new = is_new & (class_1B < chunk.num_classes)
    weight_BH = take_rows(chunk.weight_VH, start, plan.tile).astype(chunk.hidden_CH.dtype)
    return Tile(start, weight_BH, jnp.where(is_new, class_1B, -1))


def tile_indices(chunk: Chunk, plan: Plan) -> jax.Array:
    """Those of all tiles, int32."""
    return jnp.arange(-(-chunk.weight_VH.shape[0] // plan.tile), dtype=np.int32)


def tile_logits(chunk: Chunk, tile: Tile, how: How, plan: Plan) -> jax.Array:
    """[C, B] logits after softcap and temperature, -inf in repeated columns and in padding."""
    z_CB = _product(chunk.hidden_CH, tile.weight_BH, 1, 1, plan)
    if chunk.bias_V is not None:
        z_CB = z_CB + take_rows(chunk.bias_V, tile.start, plan.tile).astype(plan.dtype)
    if how.softcap:
        z_CB = how.softcap * jnp.tanh(z_CB / how.softcap)
    if chunk.inverse_C is not None:
        z_CB = z_CB * chunk.inverse_C[:, None]
    return jnp.where(tile.class_1B < 0, -jnp.inf, z_CB)


def _target_logits(z_CB: jax.Array, tile: Tile, target_C: jax.Array, *, gather: bool) -> jax.Array:
    """[C] logit of each row's target, -inf where the tile does not own it."""
    if not gather:
        return jnp.max(jnp.where(tile.class_1B == target_C[:, None], z_CB, -jnp.inf), axis=1)
    return _gathered_logits(z_CB, tile, target_C[:, None])[:, 0]


def _gathered_logits(z_CB: jax.Array, tile: Tile, column_CK: jax.Array) -> jax.Array:
    """[C, K] logits of targets, -inf where the tile does not own them."""
    # A column that the tile repeats holds -inf.
    owned_CK = (column_CK >= tile.start) & (column_CK < tile.start + z_CB.shape[1])
    place_CK = jnp.where(owned_CK, column_CK - tile.start, 0)
    t_CK = jnp.take_along_axis(z_CB, place_CK, axis=1, mode="promise_in_bounds")
    return jnp.where(owned_CK, t_CK, -jnp.inf)


def _targets_of(z_CB: jax.Array, tile: Tile, chunk: Chunk, how: How) -> tuple[jax.Array, jax.Array]:
    """Logits of each row's targets, [C] or [C, K], and the tile's logits without those of K targets."""
    if chunk.columns_CK is None:
        return _target_logits(z_CB, tile, chunk.target_C, gather=not how.shard.partitioned), z_CB
    if how.shard.partitioned:
        of_each = [_target_logits(z_CB, tile, column_C, gather=False) for column_C in chunk.columns_CK.T]
        return jnp.stack(of_each, axis=1), _with_targets(z_CB, -jnp.inf, tile, chunk, how)
    return _gathered_logits(z_CB, tile, chunk.columns_CK), _with_targets(z_CB, -jnp.inf, tile, chunk, how)


def _with_targets(rows_CB: jax.Array, values: jax.Array | float, tile: Tile, chunk: Chunk, how: How) -> jax.Array:
    """A tile with other values at the columns of the targets.

    Args:
        values: [C] or [C, K], or one number.
    """
    if chunk.columns_CK is None:
        return jnp.where(tile.class_1B == chunk.target_C[:, None], jnp.reshape(values, (-1, 1)), rows_CB)
    place_CK = chunk.columns_CK - tile.start
    place_CK = jnp.where((chunk.columns_CK >= 0) & (place_CK < rows_CB.shape[1]), place_CK, -1)
    return with_columns(rows_CB, place_CK, values, how)


def _product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int, plan: Plan) -> jax.Array:
    """Sum of products over one axis of each, accumulated in the dtype of the arithmetic."""
    if a.dtype != b.dtype or str(a.dtype) in plan.sizes.widened:
        a, b = a.astype(plan.dtype), b.astype(plan.dtype)
    return lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=plan.dtype
    )


def chunk_terms(chunk: Chunk, how: How, plan: Plan, *, keep: bool) -> tuple[RowTerms, jax.Array | None]:
    """Terms of each row, and the logits [N, C, B] where they are to be kept."""

    def body(terms: RowTerms, index: jax.Array) -> tuple[RowTerms, jax.Array | None]:
        tile = tile_at(chunk, index, plan)
        whole_CB = tile_logits(chunk, tile, how, plan)
        t_C, z_CB = _targets_of(whole_CB, tile, chunk, how)
        # As for rows: nothing depends on the maximum, so it is held constant.
        m_C = lax.stop_gradient(jnp.max(z_CB, axis=1))
        x_CB = z_CB - finite(m_C)[:, None]
        s_C = jnp.sum(jnp.exp(x_CB), axis=1)
        z_sum_C = jnp.sum(jnp.where(tile.class_1B < 0, 0, z_CB), axis=1) if how.sums.z_sum else None
        e_C = jnp.sum(weighted_exp(x_CB), axis=1) if how.sums.e else None
        return combine(jnp, terms, RowTerms(m_C, s_C, t_C, z_sum_C, e_C)), whole_CB if keep else None

    sources = (chunk.hidden_CH, chunk.weight_VH, chunk.target_C)
    zero_C = zeros_for_loop(chunk.target_C.shape, plan.dtype, *sources)
    wanted = (True, True, True, *how.sums)
    empty = RowTerms(*(zero_C + x if is_wanted else None for x, is_wanted in zip(EMPTY_ROW, wanted, strict=True)))
    if chunk.columns_CK is not None:
        empty = empty._replace(t=zeros_for_loop(chunk.columns_CK.shape, plan.dtype, *sources) + EMPTY_ROW.t)
    terms, tiles_NCB = lax.scan(body, empty, tile_indices(chunk, plan))
    return without_ignored(terms, chunk.target_C), tiles_NCB


def chunk_gradients(
    chunk: Chunk,
    terms: RowTerms,
    coefficients: Coefficients,
    tiles_NCB: jax.Array | None,
    dhead: tuple[jax.Array | None, jax.Array | None],
    how: How,
    plan: Plan,
    wanted: Wanted,
) -> LinearGradients:
    """Gradient of the chunk's hidden states, and the running sums of weight's and bias's with this chunk added.

    Args:
        tiles_NCB: the logits, where `chunk_terms` has kept them.
        dhead: the running sums; None where they are not wanted.
    """

    def body(sums: LinearGradients, index_and_tile: Any) -> tuple[LinearGradients, None]:
        index, z_CB = index_and_tile
        tile = tile_at(chunk, index, plan)
        z_CB = tile_logits(chunk, tile, how, plan) if z_CB is None else z_CB
        x_CB = z_CB - finite(terms.m)[:, None]
        dlogits_CB = exp_gradient(x_CB if chunk.columns_CK is None else not_above(x_CB), coefficients)
        dlogits_CB = _with_targets(dlogits_CB, coefficients.target, tile, chunk, how)
        if chunk.inverse_C is not None:
            dlogits_CB = dlogits_CB * chunk.inverse_C[:, None]
            z_CB = z_CB / chunk.inverse_C[:, None]
        if how.softcap:
            capped = jnp.where(tile.class_1B < 0, 0, z_CB / how.softcap)
            dlogits_CB = dlogits_CB * (1 - capped * capped)
        dlogits_CB = zero_if_ignored(jnp.where(tile.class_1B < 0, 0, dlogits_CB), chunk.target_C)
        return with_products(sums, dlogits_CB, chunk, tile, how, plan), None

    sums = zeros_of_chunk(chunk, coefficients, dhead, plan, wanted)
    sums, _ = lax.scan(body, sums, (tile_indices(chunk, plan), tiles_NCB))
    return without_ignored_hidden(sums, chunk)


def zeros_of_chunk(
    chunk: Chunk, of_rows: Any, dhead: tuple[jax.Array | None, jax.Array | None], plan: Plan, wanted: Wanted
) -> LinearGradients:
    """The running sums at the first tile of a chunk.

    Args:
        of_rows: tree of arrays over the rows that the gradients are made of.
        dhead: as of `chunk_gradients`.
    """
    sources = (chunk.hidden_CH, chunk.weight_VH, chunk.target_C, *jax.tree.leaves(of_rows))
    zeros_CH = zeros_for_loop(chunk.hidden_CH.shape, plan.dtype, *sources) if wanted.hidden else None
    return LinearGradients(zeros_CH, *dhead)


def with_products(
    sums: LinearGradients, dlogits_CB: jax.Array, chunk: Chunk, tile: Tile, how: How, plan: Plan
) -> LinearGradients:
    """The running sums with what the gradient by the logits of a tile adds."""
    dhidden_CH, dweight_VH, dbias_V = sums
    if dhidden_CH is not None:
        dhidden_CH = dhidden_CH + _product(dlogits_CB, tile.weight_BH, 1, 0, plan)
    if dweight_VH is not None:
        part_BH = _product(_transposed(dlogits_CB, how, plan), chunk.hidden_CH, 1, 0, plan)
        dweight_VH = put_rows(dweight_VH, take_rows(dweight_VH, tile.start, plan.tile) + part_BH, tile.start)
    if dbias_V is not None:
        dbias_B = take_rows(dbias_V, tile.start, plan.tile) + jnp.sum(dlogits_CB, axis=0)
        dbias_V = put_rows(dbias_V, dbias_B, tile.start)
    return LinearGradients(dhidden_CH, dweight_VH, dbias_V)


def without_ignored_hidden(sums: LinearGradients, chunk: Chunk) -> LinearGradients:
    """The sums, with 0 for the hidden states of ignored rows: an inf in the weight times a gradient of 0 is NaN."""
    return sums._replace(hidden=None if sums.hidden is None else zero_if_ignored(sums.hidden, chunk.target_C))


def _transposed(array: jax.Array, how: How, plan: Plan) -> jax.Array:
    written = plan.sizes.is_cpu and not how.shard.partitioned
    return behind_barrier(array.T)[0] if written else array.T
