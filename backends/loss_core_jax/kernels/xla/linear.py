"""Linear rows, chunk by chunk: only the logits of one chunk exist at a time."""

# T = tokens, N = chunks, C = tokens of a chunk, V = vocabulary, H = hidden

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from loss_core.row_terms import IGNORED_ROW, Coefficients, Objective, RowTerms
from loss_core_jax.inputs import IGNORED, arithmetic_dtype
from loss_core_jax.kernels import How, LinearGradients, LinearRows, Wanted
from loss_core_jax.kernels.xla.chunks import behind_barrier, joined, split, zero_if_ignored, zeros_for_loop
from loss_core_jax.kernels.xla.sizes import Plan, Sizes, plan_for
from loss_core_jax.kernels.xla.tiles import Chunk, chunk_gradients, chunk_terms


def terms(how: How, sizes: Sizes, rows: LinearRows) -> RowTerms:
    """Terms of each row, shape of target."""
    plan, rows = planned(rows, how, sizes)

    def body(_: None, piece: Any) -> tuple[None, RowTerms]:
        return None, chunk_terms(chunk_of(rows, *piece), how, plan, keep=False)[0]

    _, found = lax.scan(body, None, pieces_of(rows, how, plan))
    return _of_rows(found, rows.target, how)


def gradients(how: How, sizes: Sizes, rows: LinearRows, terms: RowTerms, coefficients: Coefficients) -> LinearGradients:
    """Gradients of all rows, given their terms and coefficients."""

    def of_chunk(chunk: Chunk, plan: Plan, given: Any) -> tuple[RowTerms, Coefficients, None]:
        return *given, None

    return _sweep(how, Wanted(), sizes, rows, (terms, coefficients), of_chunk)[1]


def terms_and_gradients(
    how: How, objective: Objective, wanted: Wanted, sizes: Sizes, rows: LinearRows, upstream: jax.Array
) -> tuple[RowTerms, LinearGradients]:
    """Terms, and gradients of upstream * the objective's one value, of all rows."""

    def of_chunk(chunk: Chunk, plan: Plan, upstream_C: Any) -> tuple[RowTerms, Coefficients, jax.Array | None]:
        terms_C, tiles_NCB = chunk_terms(chunk, how, plan, keep=True)
        return terms_C, objective.coefficients(jnp, terms_C, [upstream_C]), tiles_NCB

    return _sweep(how, wanted, sizes, rows, upstream, of_chunk)


def _sweep(
    how: How, wanted: Wanted, sizes: Sizes, rows: LinearRows, given: Any, of_chunk: Callable[..., Any]
) -> tuple[RowTerms, LinearGradients]:
    """Terms and gradients of all rows in one visit of each chunk.

    Args:
        given: tree of arrays over the rows.
        of_chunk: (chunk, plan, its part of `given`) -> terms and coefficients of its rows, and its logits or None.
    """
    plan, rows = planned(rows, how, sizes)
    order_T = _valid_first(rows.target) if wanted.skip_ignored and sizes.is_cpu and plan.num_chunks > 1 else None

    def visit(dhead: Any, piece: Any) -> tuple[Any, tuple[RowTerms, jax.Array | None]]:
        *of_rows, given_C = piece
        chunk = chunk_of(rows, *of_rows)
        terms_C, coefficients_C, tiles_NCB = of_chunk(chunk, plan, given_C)
        found = chunk_gradients(chunk, terms_C, coefficients_C, tiles_NCB, dhead, how, plan, wanted)
        return (unsharded_last(found.weight_VH, how), found.bias_V), (terms_C, found.hidden)

    def body(dhead: Any, piece: Any) -> Any:
        if order_T is None:
            return visit(dhead, piece)
        return lax.cond(jnp.any(piece[1] != IGNORED), visit, _skip(visit), dhead, piece)

    sources = (*_arrays(rows), *jax.tree.leaves(given))
    vocab, with_bias = rows.weight_VH.shape[0], wanted.bias and rows.bias_V is not None
    dhead = (
        zeros_for_loop(rows.weight_VH.shape, plan.dtype, *sources) if wanted.weight else None,
        zeros_for_loop((vocab,), plan.dtype, *sources) if with_bias else None,
    )
    # Rows that are added are ignored: what they have must only be finite.
    pieces = (*pieces_of(rows, how, plan, order_T), split_rows(given, rows.target.ndim, how, plan, order_T, fill=1))
    dhead, (found, dhidden) = lax.scan(body, dhead, pieces)
    if dhidden is not None:
        dhidden = joined_rows(dhidden, rows.target, how, order_T).reshape(rows.hidden.shape)
    return _of_rows(found, rows.target, how, order_T), LinearGradients(dhidden, *dhead)


def _skip(visit: Any) -> Any:
    """What `visit` gives for a chunk of ignored rows, without a product."""

    def skip(dhead: Any, piece: Any) -> Any:
        _, (terms, dhidden) = jax.eval_shape(visit, dhead, piece)
        arrays = jax.tree.leaves((dhead, piece))

        def full(like: Any, value: float = 0.0) -> Any:
            return None if like is None else zeros_for_loop(like.shape, like.dtype, *arrays) + value

        return dhead, (RowTerms(*map(full, terms, IGNORED_ROW)), full(dhidden))

    return skip


def planned(rows: LinearRows, how: How, sizes: Sizes) -> tuple[Plan, LinearRows]:
    """How rows are cut up; and the rows, as loops over them want them."""
    dtype = arithmetic_dtype(rows.hidden, rows.weight_VH)
    partitioned = how.shard.partitioned
    plan = plan_for(rows.target.size, rows.weight_VH, dtype, sizes, partitioned=partitioned, block_rows=how.block_rows)
    whole = functools.partial(unsharded_last, how=how)
    return plan, rows._replace(hidden=whole(rows.hidden), weight_VH=whole(rows.weight_VH))


def _arrays(rows: LinearRows) -> tuple[jax.Array, ...]:
    return rows.hidden, rows.weight_VH, rows.target, *([] if rows.bias_V is None else [rows.bias_V])


def chunk_of(
    rows: LinearRows,
    hidden_CH: jax.Array,
    target_C: jax.Array,
    inverse_C: jax.Array | None,
    columns_CK: jax.Array | None,
) -> Chunk:
    """A chunk, from a piece of what `pieces_of` gives."""
    # Behind a barrier, as in `take_rows`.
    (hidden_CH,) = behind_barrier(hidden_CH)
    return Chunk(
        zero_if_ignored(hidden_CH, target_C), rows.weight_VH, target_C, rows.num_classes, inverse_C, rows.bias_V,
        columns_CK,
    )  # fmt: skip


def pieces_of(rows: LinearRows, how: How, plan: Plan, order_T: jax.Array | None = None) -> tuple[jax.Array, ...]:
    """Hidden states, targets, inverse temperatures and columns, [N, C, ...] each; rows that are added are ignored."""
    of_rows = functools.partial(split_rows, ndim=rows.target.ndim, how=how, plan=plan, order_T=order_T)
    (hidden_NCH,), (target_NC,) = of_rows((rows.hidden,)), of_rows((rows.target,), fill=IGNORED)
    return hidden_NCH, target_NC, of_rows(rows.inverse_temperature, fill=1), of_rows(rows.columns)


def split_rows(arrays: Any, ndim: int, how: How, plan: Plan, order_T: jax.Array | None, *, fill: float = 0) -> Any:
    """Arrays over the rows, whose first `ndim` dimensions are theirs, in chunks, in this order of rows."""

    def one(x: jax.Array) -> jax.Array:
        x = x.reshape(-1, *x.shape[ndim:])
        x = x if order_T is None else x.at[order_T].get(mode="promise_in_bounds", unique_indices=True)
        return split(x, plan.num_chunks, fill, interleaved=how.shard.partitioned)

    return jax.tree.map(one, arrays)


def joined_rows(chunks: jax.Array, target: jax.Array, how: How, order_T: jax.Array | None) -> jax.Array:
    """[N, C, ...] as [T, ...] in the order of the rows."""
    found = joined(chunks, target.size, interleaved=how.shard.partitioned)
    return found if order_T is None else jnp.zeros_like(found).at[order_T].set(found, unique_indices=True)


def _of_rows(terms: RowTerms, target: jax.Array, how: How, order_T: jax.Array | None = None) -> RowTerms:
    """Terms of chunks in the shape of target."""

    def of_rows(x: jax.Array) -> jax.Array:
        x = joined_rows(x, target, how, order_T)
        return x.reshape(*target.shape, *x.shape[1:])

    found: RowTerms = jax.tree.map(of_rows, terms)
    return found


def _valid_first(target: jax.Array) -> jax.Array:
    """Indices of the rows, [T], the valid ones first: whole chunks of ignored rows are left behind them."""
    return jnp.argsort(target.reshape(-1) == IGNORED, stable=True)


def unsharded_last(array: Any, how: How) -> Any:
    """The array with its last dimension on every device: XLA gathers an FSDP weight, and not its products."""
    if array is None or not how.shard.partitioned:
        return array
    return lax.with_sharding_constraint(array, P(*[P.UNCONSTRAINED] * (array.ndim - 1), None))
