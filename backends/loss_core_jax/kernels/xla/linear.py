"""The driver over linear rows: the logits of one chunk of tokens exist at a time.

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
from loss_core_jax.kernels import How, LinearGradients, LinearRows, Wanted
from loss_core_jax.kernels.xla.chunks import Plan, Sizes, behind_barrier, plan_for, zero_if_ignored, zeros_for_loop
from loss_core_jax.kernels.xla.tiles import Chunk, Gradient, add_gradients

# Of a chunk and its part of other arrays: numbers of its rows, and the gradient, None each.
OfChunk = Callable[[Chunk, Any], tuple[Any, Gradient | None]]


def sweep(
    sources: Sequence[LinearRows], given: Any, of_chunk: OfChunk, how: How, sizes: Sizes, wanted: Sequence[Wanted] = ()
) -> tuple[Any, tuple[LinearGradients, ...]]:
    """Numbers of all rows, and the gradients of each source, in one visit of each chunk.

    Args:
        sources: one for rows and two for pairs, with the same target.
        given: tree of arrays over the rows.
        wanted: of each source; () for no gradients.
    """
    target, whole = sources[0].target, [_whole(x, how) for x in sources]
    plan = _plan(whole, how, sizes)
    skips = sizes.is_cpu and plan.num_chunks > 1 and any(x.skip_ignored for x in wanted)
    order_T = _valid_first(target) if skips else None

    def visit(dheads: Any, piece: tuple[tuple[LinearRows, ...], Any]) -> Any:
        rows, given_C = piece
        chunk = Chunk(tuple(map(_with_head, rows, whole)), how, plan)
        numbers, gradient = of_chunk(chunk, given_C)
        if gradient is None:
            return dheads, (numbers, ())
        found = add_gradients(chunk, gradient, dheads, wanted)
        dheads = tuple((_unsharded_last(x.weight_VH, how), x.bias_V) for x in found)
        return dheads, (numbers, tuple(x.hidden for x in found))

    def body(dheads: Any, piece: Any) -> Any:
        if order_T is None:
            return visit(dheads, piece)
        return lax.cond(jnp.any(piece[0][0].target != IGNORED), visit, _skip(visit), dheads, piece)

    def cut(x: jax.Array, fill: int) -> jax.Array:
        return _split(x.reshape(target.size, *x.shape[target.ndim :]), fill, order_T, how, plan)

    def joined(x: jax.Array) -> jax.Array:
        x = _joined(x, target.size, order_T, how)
        return x.reshape(*target.shape, *x.shape[1:])

    # Rows that are added are ignored: what they have must only be finite.
    rows = jax.tree.map(lambda x: cut(x, IGNORED), tuple(map(_without_head, whole)))
    arrays = jax.tree.leaves((tuple(sources), given))
    dheads = tuple(_zeros_of_head(x, own, plan, arrays) for x, own in zip(sources, wanted, strict=bool(wanted)))
    dheads, found = lax.scan(body, dheads, (rows, jax.tree.map(lambda x: cut(x, 1), given)))
    numbers, dhiddens = jax.tree.map(joined, found)
    return numbers, tuple(LinearGradients(x, *dhead) for x, dhead in zip(dhiddens, dheads, strict=True))


def _skip(visit: Any) -> Any:
    """What `visit` gives for a chunk of ignored rows, without a product: their numbers must only be finite."""

    def skip(dheads: Any, piece: Any) -> Any:
        _, (numbers, dhiddens) = jax.eval_shape(visit, dheads, piece)
        arrays = jax.tree.leaves((dheads, piece))
        numbers, dhiddens = jax.tree.map(lambda x: zeros_for_loop(x.shape, x.dtype, *arrays), (numbers, dhiddens))
        return dheads, (jax.tree.map(lambda x: x + 1, numbers), dhiddens)

    return skip


def _without_head(rows: LinearRows) -> LinearRows:
    """The arrays over the rows alone."""
    arrays: Any = rows
    headless: LinearRows = arrays._replace(weight_VH=None, num_classes=None, bias_V=None)
    return headless


def _with_head(rows: LinearRows, whole: LinearRows) -> LinearRows:
    """A chunk's rows, beside the head of all."""
    # Behind a barrier, as in `take_rows`.
    hidden_CH = zero_if_ignored(behind_barrier(rows.hidden)[0], rows.target)
    return whole._replace(
        hidden=hidden_CH,
        target=rows.target,
        inverse_temperature=rows.inverse_temperature,
        columns=rows.columns,
    )


def _zeros_of_head(rows: LinearRows, wanted: Wanted, plan: Plan, arrays: Sequence[jax.Array]) -> Any:
    """What the gradients of weight and bias are summed up from; None where they are not wanted."""
    dhead = [rows.weight_VH if wanted.weight else None, rows.bias_V if wanted.bias else None]
    return tuple(None if x is None else zeros_for_loop(x.shape, plan.dtype, *arrays) for x in dhead)


def _plan(sources: Sequence[LinearRows], how: How, sizes: Sizes) -> Plan:
    """How the rows are cut up: the logits of all sources share the room for those of one."""
    first, num = sources[0], len(sources)
    dtype = arithmetic_dtype(first.hidden, first.weight_VH)
    sizes = sizes._replace(logits_bytes=sizes.logits_bytes // num)
    partitioned, block_rows = how.shard.partitioned, how.block_rows
    return plan_for(first.target.size, first.weight_VH, dtype, sizes, partitioned=partitioned, block_rows=block_rows)


def _split(rows: jax.Array, fill: int, order_T: jax.Array | None, how: How, plan: Plan) -> jax.Array:
    """[T, ...] in this order as [N, C, ...], with rows of `fill` added."""
    if order_T is not None:
        rows = rows.at[order_T].get(mode="promise_in_bounds", unique_indices=True)
    if missing := -rows.shape[0] % plan.num_chunks:
        rows = jnp.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1), constant_values=fill)
    if how.shard.partitioned:
        # Chunk i holds rows i, N + i, 2N + i, ...: some of every device over which XLA may have spread them.
        return jnp.moveaxis(rows.reshape(-1, plan.num_chunks, *rows.shape[1:]), 1, 0)
    return rows.reshape(plan.num_chunks, -1, *rows.shape[1:])


def _joined(chunks: jax.Array, num_rows: int, order_T: jax.Array | None, how: How) -> jax.Array:
    """Undo `_split`."""
    chunks = jnp.moveaxis(chunks, 0, 1) if how.shard.partitioned else chunks
    rows = chunks.reshape(-1, *chunks.shape[2:])[:num_rows]
    return rows if order_T is None else jnp.zeros_like(rows).at[order_T].set(rows, unique_indices=True)


def _valid_first(target: jax.Array) -> jax.Array:
    """Indices of the rows, [T], the valid ones first: whole chunks of ignored rows are left behind them."""
    return jnp.argsort(target.reshape(-1) == IGNORED, stable=True)


def _whole(rows: LinearRows, how: How) -> LinearRows:
    """The rows, as loops over them want them."""
    return rows._replace(hidden=_unsharded_last(rows.hidden, how), weight_VH=_unsharded_last(rows.weight_VH, how))


def _unsharded_last(array: Any, how: How) -> Any:
    """The array with its last dimension on every device: XLA gathers an FSDP weight, and not its products."""
    if array is None or not how.shard.partitioned:
        return array
    return lax.with_sharding_constraint(array, P(*[P.UNCONSTRAINED] * (array.ndim - 1), None))
