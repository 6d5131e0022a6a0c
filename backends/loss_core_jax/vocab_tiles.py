"""One chunk of the fused linear loss: its row states and gradients, the vocabulary taken in tiles.

A tile of the weight at a time is cast, multiplied and added to, so no product makes a temporary of `[V, H]`.
"""

# C = tokens of a chunk, V = vocabulary, N = tiles of the vocabulary, B = vocabulary of a tile, H = hidden

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from loss_core.row_stats import RowState, combine
from loss_core_jax.checks import IGNORED
from loss_core_jax.chunked import behind_barrier, put_rows, rows_within, take_rows, zeros_for_loop
from loss_core_jax.cross_entropy import arithmetic_dtype, counted_or_zero, nan_if_invalid

# Logits of one chunk, and classes of a tile. An accelerator needs larger products to be busy, and has the room.
_BUDGET_BYTES, _BUDGET_BYTES_ELSEWHERE = {"cpu": 64 << 20}, 256 << 20
_TILE, _TILE_ELSEWHERE = {"cpu": 2048}, 16384
# Each chunk reads the weight twice, and reads and writes its gradient: below 128 rows that takes longer than the
# products; with 512 rows it is a tenth. Of 3/8 H rows the logits take 3/8 of the room that this gradient takes.
# More than 512 gain nothing on a CPU, and whole chunks are what is left out where labels are ignored.
_MIN_CHUNK, _GOOD_CHUNK = 128, 512


class Plan(NamedTuple):
    """How one call is cut up."""

    chunk: int
    tile: int
    softcap: float
    dtype: Any  # of the arithmetic
    partitioned: bool = False  # XLA may have spread a tile over devices: no gather from it, it would be moved


class Gradients(NamedTuple):
    """Sums over chunks, in the dtype of the arithmetic; None where nobody asked."""

    hidden_TH: jax.Array | None
    weight_VH: jax.Array | None


def plan_for(num_rows: int, weight_VH: jax.Array, softcap: float) -> Plan:
    """Sizes of chunks and tiles for a problem."""
    vocab, hidden = weight_VH.shape
    dtype = arithmetic_dtype(weight_VH)
    platform = jax.default_backend()
    budget = _BUDGET_BYTES.get(platform, _BUDGET_BYTES_ELSEWHERE)
    chunk = rows_within(budget, vocab * dtype.itemsize, at_least=max(_MIN_CHUNK, min(_GOOD_CHUNK, hidden * 3 // 8)))
    if platform == "cpu":
        chunk = min(chunk, _GOOD_CHUNK)
    return Plan(max(min(chunk, num_rows), 1), min(_TILE.get(platform, _TILE_ELSEWHERE), vocab), softcap, dtype)


class _Tile(NamedTuple):
    """A piece of the vocabulary.

    The last tile is moved back so that it ends with the vocabulary; the columns it repeats are left out of
    every sum.
    """

    start: jax.Array
    weight_BH: jax.Array
    class_B: jax.Array  # class of each column, -1 where repeated or padding


def _tile(weight_VH: jax.Array, index: jax.Array, plan: Plan, num_classes: jax.Array | None) -> _Tile:
    start = jnp.minimum(index * plan.tile, weight_VH.shape[0] - plan.tile)
    class_B = start + jnp.arange(plan.tile, dtype=np.int32)
    counted_B = class_B >= index * plan.tile
    if num_classes is not None:
        counted_B = counted_B & (class_B < num_classes)
    return _Tile(start, take_rows(weight_VH, start, plan.tile), jnp.where(counted_B, class_B, -1))


def _tile_indices(weight_VH: jax.Array, plan: Plan) -> jax.Array:
    return jnp.arange(-(-weight_VH.shape[0] // plan.tile), dtype=np.int32)


def _tile_logits(hidden_CH: jax.Array, tile: _Tile, plan: Plan) -> jax.Array:
    """[C, B] logits after the softcap, -inf in repeated columns and in padding."""
    z_CB = _product(hidden_CH, tile.weight_BH, 1, 1, plan)
    if plan.softcap:
        z_CB = plan.softcap * jnp.tanh(z_CB / plan.softcap)
    return jnp.where(tile.class_B < 0, -jnp.inf, z_CB)


def _target_logits(z_CB: jax.Array, tile: _Tile, target_C: jax.Array, first: jax.Array, plan: Plan) -> jax.Array:
    """[C] logit of each row's target, -inf where the tile does not own it."""
    if plan.partitioned:
        return jnp.max(jnp.where(tile.class_B == target_C[:, None], z_CB, -jnp.inf), axis=1)
    owned_C = (target_C >= first) & (target_C < tile.start + z_CB.shape[1])
    column_C = jnp.where(owned_C, target_C - tile.start, 0)
    t_C = jnp.take_along_axis(z_CB, column_C[:, None], axis=1, mode="promise_in_bounds")[:, 0]
    return jnp.where(owned_C, t_C, -jnp.inf)


def _transposed(array: jax.Array, plan: Plan) -> jax.Array:
    """The transpose."""
    # Written out on a CPU: there a product over the rows of its left operand takes 1.5 times as long.
    written = jax.default_backend() == "cpu" and not plan.partitioned
    return behind_barrier(array.T)[0] if written else array.T


def _product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int, plan: Plan) -> jax.Array:
    """Sum of products over one axis of each, accumulated in the dtype of the arithmetic."""
    # Mixed operands need one dtype, and a CPU without units for 16 bits is faster in float32: no value changes.
    if a.dtype != b.dtype or (jax.default_backend() == "cpu" and not _multiplied_by_the_cpu(a.dtype)):
        a, b = a.astype(plan.dtype), b.astype(plan.dtype)
    return lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=plan.dtype
    )


@functools.cache
def _multiplied_by_the_cpu(dtype: Any) -> bool:
    """Whether this processor has units for products of that dtype with float32 sums: of bfloat16, on some.

    XLA takes them; measured, with avx512_bf16: 0.50 TFLOP/s, where products of float32 run at 0.25.
    """
    listed = Path("/proc/cpuinfo")
    if dtype != jnp.bfloat16 or not listed.is_file():
        return False
    # The first lines are those of the first core.
    names = listed.read_text().partition("\n\n")[0].split()
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(names)


def fold_tiles(
    hidden_CH: jax.Array,
    weight_VH: jax.Array,
    target_C: jax.Array,
    plan: Plan,
    *,
    keep: bool,
    num_classes: jax.Array | None = None,
) -> tuple[RowState, jax.Array | None]:
    """State of each row over the whole vocabulary, and the logits [N, C, B] when they are to be kept.

    Args:
        num_classes: rows of the weight from this one on are padding; None when there is none.
    """
    hidden_CH = counted_or_zero(hidden_CH, target_C).astype(hidden_CH.dtype)

    def body(state: RowState, index: jax.Array) -> tuple[RowState, jax.Array | None]:
        tile = _tile(weight_VH, index, plan, num_classes)
        z_CB = _tile_logits(hidden_CH, tile, plan)
        m_C = lax.stop_gradient(jnp.max(z_CB, axis=1))
        # -inf minus -inf is NaN: a tile of -inf alone must stay the identity.
        s_C = jnp.sum(jnp.exp(z_CB - jnp.where(m_C == -jnp.inf, 0, m_C)[:, None]), axis=1)
        t_C = _target_logits(z_CB, tile, target_C, index * plan.tile, plan)
        return combine(jnp, state, RowState(m_C, s_C, t_C)), z_CB if keep else None

    zero_C = zeros_for_loop(target_C.shape, plan.dtype, hidden_CH, weight_VH, target_C)
    state, tiles_NCB = lax.scan(
        body, RowState(zero_C - jnp.inf, zero_C, zero_C - jnp.inf), _tile_indices(weight_VH, plan)
    )
    # No tile owns the class -1, so an ignored row has t = -inf: make it finite, its loss is replaced later.
    return state._replace(t=jnp.where(target_C == IGNORED, 0, state.t)), tiles_NCB


def chunk_gradients(
    hidden_CH: jax.Array,
    weight_VH: jax.Array,
    target_C: jax.Array,
    scale_C: jax.Array,
    is_new_C: jax.Array,
    state_C: RowState,
    tiles_NCB: jax.Array | None,
    dweight_VH: jax.Array | None,
    plan: Plan,
    want_hidden: bool,
    num_classes: jax.Array | None = None,
) -> tuple[jax.Array | None, jax.Array | None]:
    """Gradient of the chunk's hidden states, and the running sum of the weight's with this chunk added."""
    counted_CH = counted_or_zero(hidden_CH, target_C).astype(hidden_CH.dtype)
    # Rows that the previous chunk has had already add nothing to the weight.
    new_CH = jnp.where(is_new_C[:, None], counted_CH, 0).astype(hidden_CH.dtype)
    scale_C = nan_if_invalid(scale_C, target_C)
    factor_C = scale_C / state_C.s
    ignored_C1 = (target_C == IGNORED)[:, None]

    def body(sums: Gradients, index_and_tile: Any) -> tuple[Gradients, None]:
        index, z_CB = index_and_tile
        tile = _tile(weight_VH, index, plan, num_classes)
        z_CB = _tile_logits(counted_CH, tile, plan) if z_CB is None else z_CB
        onehot_CB = tile.class_B == target_C[:, None]
        dlogits_CB = jnp.exp(z_CB - state_C.m[:, None]) * factor_C[:, None] - jnp.where(onehot_CB, scale_C[:, None], 0)
        if plan.softcap:
            capped = jnp.where(tile.class_B < 0, 0, z_CB / plan.softcap)
            dlogits_CB = dlogits_CB * (1 - capped * capped)
        dlogits_CB = jnp.where(ignored_C1 | (tile.class_B < 0), 0, dlogits_CB)
        dhidden_CH, dweight_VH = sums
        if dhidden_CH is not None:
            dhidden_CH = dhidden_CH + _product(dlogits_CB, tile.weight_BH, 1, 0, plan)
        if dweight_VH is not None:
            part_BH = take_rows(dweight_VH, tile.start, plan.tile) + _product(
                _transposed(dlogits_CB, plan), new_CH, 1, 0, plan
            )
            dweight_VH = put_rows(dweight_VH, part_BH, tile.start)
        return Gradients(dhidden_CH, dweight_VH), None

    zeros_CH = (
        zeros_for_loop(hidden_CH.shape, plan.dtype, hidden_CH, weight_VH, target_C, scale_C) if want_hidden else None
    )
    (dhidden_CH, dweight_VH), _ = lax.scan(
        body, Gradients(zeros_CH, dweight_VH), (_tile_indices(weight_VH, plan), tiles_NCB)
    )
    # An inf in the weight times a gradient of 0 is NaN; an ignored row gets 0 all the same.
    dhidden_CH = None if dhidden_CH is None else jnp.where(ignored_C1, 0, dhidden_CH)
    return dhidden_CH, dweight_VH
