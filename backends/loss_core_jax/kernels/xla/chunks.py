"""Loops over chunks of rows, so that temporaries do not grow with the number of tokens; and rows that are ignored."""

# T = tokens, N = chunks, C = tokens of a chunk

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from loss_core.row_terms import IGNORED_ROW, RowTerms
from loss_core_jax import compat
from loss_core_jax.inputs import IGNORED

Arrays = tuple[jax.Array, ...]
Tree = TypeVar("Tree")


def rows_within(budget_bytes: int, bytes_per_row: int, *, at_least: int) -> int:
    """The largest power of two of rows that fits the budget, but at least `at_least`."""
    rows = max(budget_bytes // max(bytes_per_row, 1), 1)
    return max(1 << (rows.bit_length() - 1), at_least)


def map_chunks(fn: Callable[..., Tree], inputs: Arrays, chunk: int) -> Tree:
    """`fn(*inputs)` by chunks of the first axis; fn maps `[C, ...]` arrays to a tree of `[C, ...]` arrays.

    The last chunk is moved back so that it ends with the rows. Overlapping beats padding: no copy of the inputs is
    made, and rows met twice give the same values twice.
    """
    num_rows = inputs[0].shape[0]
    if chunk >= num_rows:
        return fn(*inputs)

    def body(outputs: Tree, start: jax.Array) -> tuple[Tree, None]:
        pieces = fn(*(take_rows(x, start, chunk) for x in inputs))
        return jax.tree.map(lambda out, piece: put_rows(out, piece, start), outputs, pieces), None

    shapes = jax.eval_shape(lambda *xs: fn(*(x[:chunk] for x in xs)), *inputs)
    zeros = jax.tree.map(lambda s: zeros_for_loop((num_rows, *s.shape[1:]), s.dtype, *inputs), shapes)
    starts = np.minimum(np.arange(0, num_rows, chunk), num_rows - chunk).astype(np.int32)
    outputs, _ = lax.scan(body, zeros, jnp.asarray(starts))
    return outputs


def take_rows(array: jax.Array, start: jax.Array, num: int) -> jax.Array:
    """`array[start : start + num]`."""
    # XLA casts bfloat16 rows to float32, and would move the cast before the slice and out of the loop: a float32
    # copy of all rows. Behind the barrier the array seems to change with `start`.
    array, start = behind_barrier(array, start)
    if num == array.shape[0]:
        return array  # XLA would gather a sharded array to slice it
    return lax.dynamic_slice_in_dim(array, start, num, axis=0)


def put_rows(array: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    """`array` with its rows from `start` on replaced; in place within a loop."""
    if rows.shape == array.shape:
        return rows
    return lax.dynamic_update_slice_in_dim(array, rows, start, axis=0)


def behind_barrier(*arrays: jax.Array) -> Arrays:
    """The arrays, as values that XLA neither moves code across nor shares with other code."""
    held: Arrays = lax.optimization_barrier(arrays)
    return held


def split(rows: jax.Array, num_chunks: int, fill: float, *, interleaved: bool = False) -> jax.Array:
    """[T, ...] as [N, C, ...] with rows of `fill` added.

    Args:
        interleaved: chunk i holds rows i, N + i, 2N + i, ..., so that each has rows of every device over which XLA may
            have spread them.
    """
    missing = -rows.shape[0] % num_chunks
    if missing:
        rows = jnp.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1), constant_values=fill)
    if interleaved:
        return jnp.moveaxis(rows.reshape(-1, num_chunks, *rows.shape[1:]), 1, 0)
    return rows.reshape(num_chunks, -1, *rows.shape[1:])


def joined(chunks: jax.Array, num_rows: int, *, interleaved: bool = False) -> jax.Array:
    """Undo `split`."""
    chunks = jnp.moveaxis(chunks, 0, 1) if interleaved else chunks
    return chunks.reshape(-1, *chunks.shape[2:])[:num_rows]


def zeros_for_loop(shape: tuple[int, ...], dtype: Any, *inputs: jax.Array) -> jax.Array:
    """Zeros to carry through a loop over the inputs: they vary over the same mesh axes."""
    return compat.vary(jnp.zeros(shape, dtype), compat.varying_axes(*inputs))


def zero_if_ignored(rows: jax.Array, target: jax.Array) -> jax.Array:
    """The rows [..., V], with zeros in place of ignored ones: their inf or NaN reaches nothing."""
    return jnp.where(target[..., None] == IGNORED, 0, rows)


def finite(m: jax.Array) -> jax.Array:
    """The maxima, 0 for a row of -inf: -inf minus -inf is NaN, and an empty shard must stay the identity."""
    return jnp.where(m == -jnp.inf, 0, m)


def without_ignored(found: RowTerms, target: jax.Array) -> RowTerms:
    """The terms, with those of ignored rows replaced."""
    ignored = target == IGNORED
    return RowTerms(
        *(
            None if x is None else jnp.where(ignored if x.ndim == ignored.ndim else ignored[..., None], other, x)
            for x, other in zip(found, IGNORED_ROW, strict=True)
        )
    )
