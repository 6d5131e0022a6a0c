"""The loop over chunks of linear rows: the logits of one chunk of tokens exist at a time.

Rows have one source of logits (hidden states, weight, bias), pairs have two.
"""

# T = tokens, N = chunks, C = tokens of a chunk, V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from loss_core_jax.inputs import IGNORED, arithmetic_dtype
from loss_core_jax.kernels import LinearGradients, LinearRows, RowOptions, Wanted
from loss_core_jax.kernels.xla.chunks import Plan, Sizes, barrier, plan_for, zero_where_ignored, zeros_for_loop
from loss_core_jax.kernels.xla.tiles import Chunk, ChunkGradient, add_gradients

# (chunk, its part of the arrays per row) -> (outputs per row or None, gradient or None)
ChunkFn = Callable[[Chunk, Any], tuple[Any, ChunkGradient | None]]


def scan_chunks(
    sources: Sequence[LinearRows],
    per_row: Any,
    chunk_fn: ChunkFn,
    options: RowOptions,
    sizes: Sizes,
    wanted: Sequence[Wanted] = (),
) -> tuple[Any, tuple[LinearGradients, ...]]:
    """Outputs of `chunk_fn` for all rows, and the gradients of each source, in one loop over the chunks.

    Args:
        sources: one for rows and two for pairs, with the same target.
        per_row: tree of arrays over the rows, the second argument of `chunk_fn`.
        wanted: of each source; () for no gradients.
    """
    target, sources = sources[0].target, [_with_local_features(x, options) for x in sources]
    plan = _plan(sources, options, sizes)
    skips = sizes.is_cpu and plan.num_chunks > 1 and any(x.skip_ignored for x in wanted)
    # Valid rows first, so that the last chunks have only ignored rows.
    order_T = jnp.argsort(target.reshape(-1) == IGNORED, stable=True) if skips else None

    def run_chunk(dheads: Any, piece: tuple[tuple[LinearRows, ...], Any]) -> Any:
        rows, per_row_C = piece
        chunk = Chunk(tuple(map(_with_head, rows, sources)), options, plan)
        outputs, gradient = chunk_fn(chunk, per_row_C)
        if gradient is None:
            return dheads, (outputs, ())
        gradients = add_gradients(chunk, gradient, dheads, wanted)
        dheads = tuple((_with_local_last_dim(x.weight_VH, options), x.bias_V) for x in gradients)
        return dheads, (outputs, tuple(x.hidden for x in gradients))

    def body(dheads: Any, piece: Any) -> Any:
        if order_T is None:
            return run_chunk(dheads, piece)
        return lax.cond(jnp.any(piece[0][0].target != IGNORED), run_chunk, _skip_chunk(run_chunk), dheads, piece)

    def split(x: jax.Array, fill: int) -> jax.Array:
        return _split(x.reshape(target.size, *x.shape[target.ndim :]), fill, order_T, options, plan)

    def merge(x: jax.Array) -> jax.Array:
        x = _merge(x, target.size, order_T, options)
        return x.reshape(*target.shape, *x.shape[1:])

    # Rows of padding are ignored, so any finite values do.
    rows = jax.tree.map(lambda x: split(x, IGNORED), tuple(map(_without_head, sources)))
    arrays = jax.tree.leaves((tuple(sources), per_row))
    dheads = tuple(_zero_head_gradients(*x, plan, arrays) for x in zip(sources, wanted, strict=bool(wanted)))
    dheads, stacked = lax.scan(body, dheads, (rows, jax.tree.map(lambda x: split(x, 1), per_row)))
    outputs, dhiddens = jax.tree.map(merge, stacked)
    return outputs, tuple(LinearGradients(x, *dhead) for x, dhead in zip(dhiddens, dheads, strict=True))


def _skip_chunk(run_chunk: Any) -> Any:
    """`run_chunk` for a chunk of ignored rows, without a product: their outputs must only be finite."""

    def skip(dheads: Any, piece: Any) -> Any:
        _, (outputs, dhiddens) = jax.eval_shape(run_chunk, dheads, piece)
        arrays = jax.tree.leaves((dheads, piece))
        outputs, dhiddens = jax.tree.map(lambda x: zeros_for_loop(x.shape, x.dtype, *arrays), (outputs, dhiddens))
        return dheads, (jax.tree.map(lambda x: x + 1, outputs), dhiddens)

    return skip


def _without_head(rows: LinearRows) -> LinearRows:
    """The arrays over the rows alone."""
    arrays: Any = rows
    headless: LinearRows = arrays._replace(weight_VH=None, num_classes=None, bias_V=None)
    return headless


def _with_head(rows: LinearRows, source: LinearRows) -> LinearRows:
    """A chunk's rows with the head of their source."""
    # The barrier is for the reason in `slice_rows`.
    hidden_CH = zero_where_ignored(barrier(rows.hidden)[0], rows.target)
    return source._replace(
        hidden=hidden_CH,
        target=rows.target,
        inverse_temperature=rows.inverse_temperature,
        columns=rows.columns,
    )


def _zero_head_gradients(rows: LinearRows, wanted: Wanted, plan: Plan, arrays: Sequence[jax.Array]) -> Any:
    """Initial sums of the gradients of weight and bias; None where not wanted."""
    dhead = [rows.weight_VH if wanted.weight else None, rows.bias_V if wanted.bias else None]
    return tuple(None if x is None else zeros_for_loop(x.shape, plan.dtype, *arrays) for x in dhead)


def _plan(sources: Sequence[LinearRows], options: RowOptions, sizes: Sizes) -> Plan:
    """The plan of the call; the logits of all sources share the memory limit."""
    first, num = sources[0], len(sources)
    dtype = arithmetic_dtype(first.hidden, first.weight_VH)
    sizes = sizes._replace(logits_bytes=sizes.logits_bytes // num)
    partitioned, block_rows = options.shard.partitioned, options.block_rows
    return plan_for(first.target.size, first.weight_VH, dtype, sizes, partitioned=partitioned, block_rows=block_rows)


def _split(rows: jax.Array, fill: int, order_T: jax.Array | None, options: RowOptions, plan: Plan) -> jax.Array:
    """[T, ...] in this order as [N, C, ...], padded with rows of `fill`."""
    if order_T is not None:
        rows = rows.at[order_T].get(mode="promise_in_bounds", unique_indices=True)
    if missing := -rows.shape[0] % plan.num_chunks:
        rows = jnp.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1), constant_values=fill)
    if options.shard.partitioned:
        # Chunk i holds rows i, N + i, 2N + i, ...: some of every device over which XLA may have partitioned them.
        return jnp.moveaxis(rows.reshape(-1, plan.num_chunks, *rows.shape[1:]), 1, 0)
    return rows.reshape(plan.num_chunks, -1, *rows.shape[1:])


def _merge(chunks: jax.Array, num_rows: int, order_T: jax.Array | None, options: RowOptions) -> jax.Array:
    """[N, C, ...] as [T, ...]: the inverse of `_split`."""
    chunks = jnp.moveaxis(chunks, 0, 1) if options.shard.partitioned else chunks
    rows = chunks.reshape(-1, *chunks.shape[2:])[:num_rows]
    return rows if order_T is None else jnp.zeros_like(rows).at[order_T].set(rows, unique_indices=True)


def _with_local_features(rows: LinearRows, options: RowOptions) -> LinearRows:
    """The rows with the hidden dimension of hidden states and weight on every device."""
    hidden, weight_VH = (_with_local_last_dim(x, options) for x in (rows.hidden, rows.weight_VH))
    return rows._replace(hidden=hidden, weight_VH=weight_VH)


def _with_local_last_dim(array: Any, options: RowOptions) -> Any:
    """The array with its last dimension unsharded, so that XLA gathers an FSDP weight and not its products."""
    if array is None or not options.shard.partitioned:
        return array
    return lax.with_sharding_constraint(array, P(*[P.UNCONSTRAINED] * (array.ndim - 1), None))
