"""Linear rows, chunk by chunk: only the logits of one chunk exist at a time."""

# T = tokens, N = chunks, C = tokens of a chunk, V = vocabulary, H = hidden

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from loss_core.row_terms import RowTerms
from loss_core_jax.inputs import IGNORED, arithmetic_dtype
from loss_core_jax.kernels import Linear, LinearGradients, LinearRows, Wanted
from loss_core_jax.kernels.xla.chunks import IGNORED_ROW, behind_barrier, joined, split, zero_if_ignored, zeros_for_loop
from loss_core_jax.kernels.xla.sizes import LinearSizes, Plan, plan_for
from loss_core_jax.kernels.xla.tiles import Chunk, chunk_gradients, chunk_terms


def terms(linear: Linear, sizes: LinearSizes, rows: LinearRows) -> RowTerms:
    """Terms of each row, shape of target."""
    plan, rows = _planned(rows, linear, sizes)

    def body(_: None, piece: Any) -> tuple[None, RowTerms]:
        return None, chunk_terms(_chunk(rows, *piece), linear, plan, keep=False)[0]

    _, found = lax.scan(body, None, _pieces(rows, linear, plan))
    return _of_rows(found, rows.target, linear)


def sweep(
    linear: Linear, wanted: Wanted, sizes: LinearSizes, rows: LinearRows, upstream: jax.Array, terms: RowTerms | None
) -> tuple[RowTerms, LinearGradients]:
    """Terms and gradients of all rows in one visit of each chunk; terms that are given are not made again."""
    plan, rows = _planned(rows, linear, sizes)
    order_T = _valid_first(rows.target) if wanted.skip_ignored and sizes.is_cpu and plan.num_chunks > 1 else None

    def visit(dweight_VH: Any, piece: Any) -> tuple[Any, tuple[RowTerms, jax.Array | None]]:
        hidden_CH, target_C, upstream_C, terms_C = piece
        chunk, tiles_NCB = _chunk(rows, hidden_CH, target_C), None
        if terms_C is None:
            terms_C, tiles_NCB = chunk_terms(chunk, linear, plan, keep=True)
        found = chunk_gradients(chunk, terms_C, upstream_C, tiles_NCB, dweight_VH, linear, plan, wanted)
        return _unsharded_last(found.weight_VH, linear), (terms_C, found.hidden)

    def body(dweight_VH: Any, piece: Any) -> Any:
        if order_T is None:
            return visit(dweight_VH, piece)
        return lax.cond(jnp.any(piece[1] != IGNORED), visit, _skip(visit), dweight_VH, piece)

    dweight_VH = zeros_for_loop(rows.weight_VH.shape, plan.dtype, *_arrays(rows), upstream) if wanted.weight else None
    # Rows that are added are ignored: what they have must only be finite.
    pieces = (*_pieces(rows, linear, plan, order_T), *_split((upstream, terms), linear, plan, order_T, fill=1))
    dweight_VH, (found, dhidden) = lax.scan(body, dweight_VH, pieces)
    if dhidden is not None:
        dhidden = _joined(dhidden, rows.target, linear, order_T).reshape(rows.hidden.shape)
    return _of_rows(found, rows.target, linear, order_T), LinearGradients(dhidden, dweight_VH)


def _skip(visit: Any) -> Any:
    """What `visit` gives for a chunk of ignored rows, without a product."""

    def skip(dweight_VH: Any, piece: Any) -> Any:
        _, (terms, dhidden) = jax.eval_shape(visit, dweight_VH, piece)
        arrays = jax.tree.leaves((dweight_VH, piece))

        def full(like: Any, value: float = 0.0) -> Any:
            return None if like is None else zeros_for_loop(like.shape, like.dtype, *arrays) + value

        return dweight_VH, (RowTerms(*map(full, terms, IGNORED_ROW)), full(dhidden))

    return skip


def _planned(rows: LinearRows, linear: Linear, sizes: LinearSizes) -> tuple[Plan, LinearRows]:
    dtype = arithmetic_dtype(rows.hidden, rows.weight_VH)
    partitioned = linear.shard.partitioned
    plan = plan_for(rows.target.size, rows.weight_VH, dtype, sizes, partitioned=partitioned)
    whole = functools.partial(_unsharded_last, linear=linear)
    return plan, rows._replace(hidden=whole(rows.hidden), weight_VH=whole(rows.weight_VH))


def _arrays(rows: LinearRows) -> tuple[jax.Array, ...]:
    return rows.hidden, rows.weight_VH, rows.target


def _chunk(rows: LinearRows, hidden_CH: jax.Array, target_C: jax.Array) -> Chunk:
    # Behind a barrier, as in `take_rows`.
    (hidden_CH,) = behind_barrier(hidden_CH)
    return Chunk(zero_if_ignored(hidden_CH, target_C), rows.weight_VH, target_C, rows.num_classes)


def _pieces(
    rows: LinearRows, linear: Linear, plan: Plan, order_T: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Hidden states [N, C, H] and targets [N, C]; rows that are added are ignored."""
    hidden_TH = rows.hidden.reshape(-1, rows.hidden.shape[-1])
    (hidden_NCH,) = _split((hidden_TH,), linear, plan, order_T, flat=False)
    (target_NC,) = _split((rows.target,), linear, plan, order_T, fill=IGNORED)
    return hidden_NCH, target_NC


def _split(
    arrays: Any, linear: Linear, plan: Plan, order_T: jax.Array | None, *, fill: float = 0, flat: bool = True
) -> Any:
    """Arrays over the rows in chunks, in this order of rows."""

    def one(x: jax.Array) -> jax.Array:
        x = x.reshape(-1) if flat else x
        x = x if order_T is None else x.at[order_T].get(mode="promise_in_bounds", unique_indices=True)
        return split(x, plan.num_chunks, fill, interleaved=linear.shard.partitioned)

    return jax.tree.map(one, arrays)


def _joined(chunks: jax.Array, target: jax.Array, linear: Linear, order_T: jax.Array | None) -> jax.Array:
    """[N, C, ...] as [T, ...] in the order of the rows."""
    found = joined(chunks, target.size, interleaved=linear.shard.partitioned)
    return found if order_T is None else jnp.zeros_like(found).at[order_T].set(found, unique_indices=True)


def _of_rows(terms: RowTerms, target: jax.Array, linear: Linear, order_T: jax.Array | None = None) -> RowTerms:
    """Terms of chunks in the shape of target."""
    found: RowTerms = jax.tree.map(lambda x: _joined(x, target, linear, order_T).reshape(target.shape), terms)
    return found


def _valid_first(target: jax.Array) -> jax.Array:
    """Indices of the rows, [T], the valid ones first: whole chunks of ignored rows are left behind them."""
    return jnp.argsort(target.reshape(-1) == IGNORED, stable=True)


def _unsharded_last(array: Any, linear: Linear) -> Any:
    """The array with its last dimension on every device: XLA gathers an FSDP weight, and not its products."""
    if array is None or not linear.shard.partitioned:
        return array
    return lax.with_sharding_constraint(array, P(*[P.UNCONSTRAINED] * (array.ndim - 1), None))
