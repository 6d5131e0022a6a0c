"""Loops over chunks of rows, so that temporaries do not grow with the number of tokens."""

# T = tokens, C = tokens of a chunk

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Arrays = tuple[jax.Array, ...]


def rows_within(budget_bytes: int, bytes_per_row: int, *, at_least: int) -> int:
    """The largest power of two of rows that fits the budget, but at least `at_least`."""
    rows = max(budget_bytes // max(bytes_per_row, 1), 1)
    return max(1 << (rows.bit_length() - 1), at_least)


def chunk_starts(num_rows: int, chunk: int) -> np.ndarray:
    """First row of each chunk. The last chunk is moved back so that it ends with the rows.

    Overlapping beats padding: no copy of the inputs is made. The rows met twice give the same values twice;
    a sum over rows must leave them out the second time, see `fused_linear`.
    """
    return np.minimum(np.arange(0, num_rows, chunk), num_rows - chunk).astype(np.int32)


def map_chunks(fn: Callable[..., Arrays], inputs: Arrays, chunk: int) -> Arrays:
    """`fn(*inputs)` by chunks of the first axis; fn maps `[C, ...]` arrays to a tuple of `[C, ...]` arrays."""
    num_rows = inputs[0].shape[0]
    if chunk >= num_rows:
        return fn(*inputs)

    def body(outputs: Arrays, start: jax.Array) -> tuple[Arrays, None]:
        pieces = fn(*(take_rows(x, start, chunk) for x in inputs))
        return tuple(put_rows(out, piece, start) for out, piece in zip(outputs, pieces, strict=True)), None

    shapes = jax.eval_shape(lambda *xs: fn(*(x[:chunk] for x in xs)), *inputs)
    zeros = tuple(zeros_for_loop((num_rows, *s.shape[1:]), s.dtype, *inputs) for s in shapes)
    outputs, _ = lax.scan(body, zeros, jnp.asarray(chunk_starts(num_rows, chunk)))
    return outputs


def take_rows(array: jax.Array, start: jax.Array, num: int) -> jax.Array:
    """`array[start : start + num]`."""
    # XLA casts bfloat16 rows to float32, and would move the cast before the slice and out of the loop: a float32
    # copy of all rows. Behind the barrier the array seems to change with `start`.
    array, start = behind_barrier(array, start)
    if num == array.shape[0]:
        return array  # XLA would gather a sharded array to slice it
    return lax.dynamic_slice_in_dim(array, start, num, axis=0)


def behind_barrier(*arrays: jax.Array) -> Arrays:
    """The arrays, as values that XLA neither moves code across nor shares with other code."""
    held: Arrays = lax.optimization_barrier(arrays)
    return held


def put_rows(array: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    """`array` with its rows from `start` on replaced; in place within a loop."""
    if rows.shape == array.shape:
        return rows
    return lax.dynamic_update_slice_in_dim(array, rows, start, axis=0)


def counted_first(counted_T: jax.Array, chunk: int) -> jax.Array | None:
    """Places of the rows, [T] int32, those that count first: so that chunks behind them can be left out by a `cond`.

    Returns:
        None where nothing is gained: with a single chunk, or on an accelerator, whose host would have to wait for
        each predicate.
    """
    if chunk >= counted_T.shape[0] or jax.default_backend() != "cpu":
        return None
    return jnp.argsort(~counted_T, stable=True).astype(np.int32)


def take_rows_at(array: jax.Array, places_C: jax.Array) -> jax.Array:
    """`array[places_C]`, for places that differ."""
    # As in `take_rows`.
    array, places_C = behind_barrier(array, places_C)
    rows: jax.Array = array.at[places_C].get(mode="promise_in_bounds", unique_indices=True)
    return rows


def put_rows_at(array: jax.Array, rows: jax.Array, places_C: jax.Array) -> jax.Array:
    """`array` with the rows at these places, which differ, replaced; in place within a loop."""
    new: jax.Array = array.at[places_C].set(rows, mode="promise_in_bounds", unique_indices=True)
    return new


def zeros_for_loop(shape: tuple[int, ...], dtype: Any, *inputs: jax.Array) -> jax.Array:
    """Zeros to carry through a loop over the inputs."""
    return vary(jnp.zeros(shape, dtype), varying_axes(inputs))


def same_varying_axes(*arrays: jax.Array) -> Arrays:
    """The arrays, made to vary over the same mesh axes; outside `shard_map` nothing happens.

    A weight that is replicated over the axis of the data must become varying before a custom derivative sees
    it; JAX then sums its gradient over that axis.
    """
    axes = varying_axes(arrays)
    return tuple(vary(array, axes) for array in arrays)


def varying_axes(arrays: Arrays) -> frozenset[str]:
    """Mesh axes over which any of the arrays varies; empty outside `shard_map`."""
    axes: frozenset[str] = frozenset()
    for array in arrays:
        aval: Any = jax.typeof(array)
        # Until JAX 0.9 the type has `vma`, later `manual_axis_type`.
        axes |= aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying
    return axes


def vary(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """The array, made to vary over these mesh axes, too."""
    missing = tuple(sorted(axes - varying_axes((array,))))
    if not missing:
        return array
    modern: Any = lax
    # JAX 0.8 has pvary only, 0.10 has pcast only.
    varying: jax.Array = (
        modern.pcast(array, missing, to="varying") if hasattr(lax, "pcast") else modern.pvary(array, missing)
    )
    return varying
