"""One chunk of linear rows, of which the logits are made tile by tile of the vocabulary.

A tile is to the kernels of rows and of pairs what a shard of the vocabulary is: numbers fold, and gradients are made
from those of the whole rows. It is cast, multiplied and added to by itself, so that no product makes a temporary of
`[V, H]`.
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
from loss_core_jax.kernels import How, LinearGradients, LinearRows
from loss_core_jax.kernels.xla.chunks import (
    Arrays,
    Plan,
    behind_barrier,
    put_rows,
    take_rows,
    zero_if_ignored,
    zeros_for_loop,
)


class Chunk(NamedTuple):
    """Some rows of each source: hidden states [C, H], zeros where ignored, beside the whole weight."""

    sources: tuple[LinearRows, ...]
    how: How
    plan: Plan

    @property
    def target(self) -> jax.Array:
        return self.sources[0].target


class Tile(NamedTuple):
    """A piece of the vocabulary of a chunk.

    The last tile is moved back so that it ends with the vocabulary; the columns that it repeats are left out of every
    sum.

    Attributes:
        start: its first column.
        is_class_1B: false in repeated columns and in padding.
        target_C, columns_CK: as in `Rows`, within the tile.
        weights: [B, H] of each source in the dtype of the hidden states, in which products are made.
        logits: [C, B] of each source after softcap and temperature, -inf where there is no class.
    """

    start: jax.Array
    is_class_1B: jax.Array
    target_C: jax.Array
    columns_CK: jax.Array | None
    weights: Arrays
    logits: Arrays


class Gradient(NamedTuple):
    """How the gradient of a chunk is made.

    Attributes:
        by_products: the gradient by the products of each source, [C, B], from a tile.
        kept: the logits of all tiles, as `fold` gives them; None to make them again.
    """

    by_products: Callable[[Tile], Sequence[jax.Array]]
    kept: Arrays | None = None


def fold(
    chunk: Chunk,
    of_tile: Callable[[Tile], Any],
    add: Callable[[Any, Any], Any],
    empty: Any,
    *,
    kept: Arrays | None = None,
    keep: bool = False,
) -> tuple[Any, Arrays | None]:
    """Numbers of the chunk's rows, folded over the tiles; and the logits of each source, [N, C, B], to be kept.

    Args:
        empty: those of no columns.
        kept: the logits, where an earlier call has kept them.
    """

    def body(numbers: Any, index_and_kept: Any) -> tuple[Any, Arrays | None]:
        tile = _tile_at(chunk, *index_and_kept)
        return add(numbers, of_tile(tile)), tile.logits if keep else None

    found: tuple[Any, Arrays | None] = lax.scan(body, empty, (_indices(chunk), kept))
    return found


def zeros(chunk: Chunk, shape: tuple[int, ...]) -> jax.Array:
    """Zeros to fold over the tiles from."""
    return zeros_for_loop(shape, chunk.plan.dtype, *jax.tree.leaves(chunk.sources))


def by_product(dz_CB: jax.Array, tile: Tile, chunk: Chunk) -> jax.Array:
    """The gradient by the products of the one source of rows, from that by its logits."""
    (source,), (z_CB,), softcap = chunk.sources, tile.logits, chunk.how.softcap
    if source.inverse_temperature is not None:
        dz_CB = dz_CB * source.inverse_temperature[:, None]
        z_CB = z_CB / source.inverse_temperature[:, None]
    if softcap:
        capped_CB = jnp.where(tile.is_class_1B, z_CB / softcap, 0)
        dz_CB = dz_CB * (1 - capped_CB * capped_CB)
    return dz_CB


def add_gradients(chunk: Chunk, gradient: Gradient, dheads: Any, wanted: Any) -> tuple[LinearGradients, ...]:
    """Gradients of the chunk's hidden states, and the running sums of weights' and biases' with this chunk added."""

    def body(sums: Any, index_and_kept: Any) -> tuple[Any, None]:
        tile = _tile_at(chunk, *index_and_kept)
        # A repeated column may have a gradient: what is uniform over the columns.
        every = (jnp.where(tile.is_class_1B, x, 0) for x in gradient.by_products(tile))
        by_products = (zero_if_ignored(x, chunk.target) for x in every)
        parts = zip(sums, by_products, chunk.sources, tile.weights, strict=True)
        return tuple(_with_products(*part, tile.start, chunk) for part in parts), None

    zeros_CH = (
        zeros(chunk, x.hidden.shape) if own.hidden else None for x, own in zip(chunk.sources, wanted, strict=True)
    )
    sums = tuple(LinearGradients(x, *dhead) for x, dhead in zip(zeros_CH, dheads, strict=True))
    sums, _ = lax.scan(body, sums, (_indices(chunk), gradient.kept))

    def without_ignored(x: LinearGradients) -> LinearGradients:
        # An inf in the weight times a gradient of 0 is NaN.
        return x._replace(hidden=None if x.hidden is None else zero_if_ignored(x.hidden, chunk.target))

    return tuple(map(without_ignored, sums))


def _with_products(
    sums: LinearGradients, dlogits_CB: jax.Array, rows: LinearRows, weight_BH: jax.Array, start: jax.Array, chunk: Chunk
) -> LinearGradients:
    """The running sums with what a tile adds."""
    (dhidden_CH, dweight_VH, dbias_V), plan = sums, chunk.plan
    if dhidden_CH is not None:
        dhidden_CH = dhidden_CH + _product(dlogits_CB, weight_BH, 1, 0, plan)
    if dweight_VH is not None:
        written_out = plan.sizes.is_cpu and not chunk.how.shard.partitioned
        dlogits_BC = behind_barrier(dlogits_CB.T)[0] if written_out else dlogits_CB.T
        part_BH = _product(dlogits_BC, rows.hidden, 1, 0, plan)
        dweight_VH = put_rows(dweight_VH, take_rows(dweight_VH, start, plan.tile) + part_BH, start)
    if dbias_V is not None:
        dbias_B = take_rows(dbias_V, start, plan.tile) + jnp.sum(dlogits_CB, axis=0)
        dbias_V = put_rows(dbias_V, dbias_B, start)
    return LinearGradients(dhidden_CH, dweight_VH, dbias_V)


def _tile_at(chunk: Chunk, index: jax.Array, kept: Arrays | None) -> Tile:
    """The tile of an index; its logits are made unless they were kept."""
    first, plan = chunk.sources[0], chunk.plan
    new, start = index * plan.tile, jnp.minimum(index * plan.tile, first.weight_VH.shape[0] - plan.tile)
    column_1B = (start + jnp.arange(plan.tile, dtype=np.int32))[None]
    is_class_1B = column_1B >= new
    if first.num_classes is not None:
        is_class_1B = is_class_1B & (column_1B < first.num_classes)
    weights = tuple(take_rows(x.weight_VH, start, plan.tile).astype(x.hidden.dtype) for x in chunk.sources)
    if kept is None:
        parts = zip(chunk.sources, weights, strict=True)
        kept = tuple(jnp.where(is_class_1B, _logits(x, w, start, chunk), -jnp.inf) for x, w in parts)
    target_C, columns_CK = jax.tree.map(
        lambda x: local_columns(x, new, start + plan.tile, start), (first.target, first.columns)
    )
    return Tile(start, is_class_1B, target_C, columns_CK, weights, kept)


def _logits(rows: LinearRows, weight_BH: jax.Array, start: jax.Array, chunk: Chunk) -> jax.Array:
    """[C, B] logits after softcap and temperature."""
    plan, softcap = chunk.plan, chunk.how.softcap
    z_CB = _product(rows.hidden, weight_BH, 1, 1, plan)
    if rows.bias_V is not None:
        z_CB = z_CB + take_rows(rows.bias_V, start, plan.tile).astype(plan.dtype)
    if softcap:
        z_CB = softcap * jnp.tanh(z_CB / softcap)
    return z_CB if rows.inverse_temperature is None else z_CB * rows.inverse_temperature[:, None]


def _product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int, plan: Plan) -> jax.Array:
    """Sum of products over one axis of each, accumulated in the dtype of the arithmetic."""
    if a.dtype != b.dtype or str(a.dtype) in plan.sizes.widened:
        a, b = a.astype(plan.dtype), b.astype(plan.dtype)
    return lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=plan.dtype
    )


def _indices(chunk: Chunk) -> jax.Array:
    """Those of all tiles, int32."""
    return jnp.arange(-(-chunk.sources[0].weight_VH.shape[0] // chunk.plan.tile), dtype=np.int32)
