"""How rows are cut up, by the platform that a program is compiled for; loops over chunks; and rows that are ignored."""

# T = tokens, C = tokens of a chunk, V = vocabulary, B = vocabulary of a tile, H = hidden

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from loss_core_jax import compat
from loss_core_jax.inputs import IGNORED

Arrays = tuple[jax.Array, ...]
Tree = TypeVar("Tree")

# Rows of 16 float32 logits fill a cache line: a tile is a multiple of them.
_ALIGNED = 16


class Sizes(NamedTuple):
    """Sizes for one platform. Hashable.

    Attributes:
        logits_bytes: most bytes of the logits of one chunk of linear rows.
        chunk: least and most linear rows of a chunk. Each chunk reads the weight twice, and reads and writes its
            gradient: below 128 rows that takes longer than the products; with 512 rows it is a tenth.
        tile: most classes of a tile of linear rows.
        row_bytes: most bytes of a temporary of logits that need a cast.
        pair_bytes: most bytes of each of the three temporaries of pairs of logits.
        is_cpu: written for XLA:CPU: chunks of ignored rows are skipped (an accelerator's host would wait for each
            predicate), and transposed operands are written out (a product over the rows of its left operand takes
            1.5 times as long there).
        widened: 16-bit dtypes whose products are made in float32: the processor has no units for them, and no value
            changes.
    """

    logits_bytes: int
    chunk: tuple[int, int]
    tile: int
    row_bytes: int = 0
    pair_bytes: int = 0
    is_cpu: bool = False
    widened: tuple[str, ...] = ()


class Plan(NamedTuple):
    """How one call is cut up: num_chunks chunks of `chunk` rows, tiles of `tile` classes; dtype of the arithmetic."""

    num_chunks: int
    chunk: int
    tile: int
    dtype: Any
    sizes: Sizes


def widened_on_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """16-bit dtypes for which this processor has no units: float16, and bfloat16 unless it says otherwise.

    Measured with avx512_bf16: 0.50 TFLOP/s, where products of float32 run at 0.25.
    """
    # The first lines are those of the first core.
    flags = cpuinfo.read_text().partition("\n\n")[0].split() if cpuinfo.is_file() else []
    return ("float16",) if {"avx512_bf16", "amx_bf16"} & set(flags) else ("bfloat16", "float16")


# XLA for CPU writes a cast of the logits out before it sums over it, z - m before the sums of exp(z - m) and of
# exp(z - m) (z - m), and terms of pairs before their sums. Chunks bound these temporaries and keep them in cache: with
# 1 MiB for each core pairs were a fifth faster than with 4.
_CORES = os.cpu_count() or 1
CPU = Sizes(64 << 20, (128, 512), 2048, 8 << 20, _CORES << 20, is_cpu=True, widened=widened_on_cpu())
# Larger products, to be busy, for which it has the room. Each chunk is a few kernels that are started one by one: over
# bfloat16 logits 8,192 x 128,256 a loop over 8 MiB took 7.6 ms on an H200, 512 times 10 us and what is left.
ACCELERATOR = Sizes(256 << 20, (128, 1 << 30), 16384, 256 << 20, 256 << 20)


def plan_for(
    num_rows: int, weight_VH: jax.Array, dtype: Any, sizes: Sizes, *, partitioned: bool, block_rows: int = 0
) -> Plan:
    """The plan of a call with at least one row.

    Args:
        partitioned: XLA spreads each chunk over the devices of the axes that are its own, and the vocabulary is one
            tile, since slices of it would be moved.
        block_rows: most rows of a chunk; 0: the sizes alone say.
    """
    vocab, hidden = weight_VH.shape
    least, most = sizes.chunk
    # With 3/8 H rows the logits take 3/8 of the room of the weight's gradient: worth it up to 512.
    least = max(least, min(512, hidden * 3 // 8, most))
    chunk = min(max(sizes.logits_bytes // (vocab * dtype.itemsize), least), most)
    if partitioned:
        chunk *= _num_devices()
    chunk = min(chunk, block_rows or chunk)
    num_chunks = -(-num_rows // chunk)
    num_tiles = 1 if partitioned else -(-vocab // sizes.tile)
    tile = vocab if num_tiles == 1 else _round_up(-(-vocab // num_tiles), _ALIGNED)
    return Plan(num_chunks, -(-num_rows // num_chunks), min(tile, vocab), dtype, sizes)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _num_devices() -> int:
    """Devices of the axes that XLA takes care of."""
    mesh = jax.sharding.get_abstract_mesh()
    num_devices = max(mesh.size, 1)
    for axis in mesh.manual_axes:
        num_devices //= mesh.shape[axis]
    return num_devices


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def by_platform(
    kernel: Callable[..., Any], static: tuple[Any, ...], cpu: Sizes, accelerator: Sizes, *arrays: Any
) -> Any:
    """`kernel(*static, sizes, *arrays)` with the sizes of the platform that the program is compiled for."""
    # Not jax.default_backend(): arrays may lie on another platform, and under jit they do not say.
    on_cpu, elsewhere = (functools.partial(kernel, *static, sizes) for sizes in (cpu, accelerator))
    if cpu == accelerator:
        return on_cpu(*arrays)
    return lax.platform_dependent(*arrays, cpu=on_cpu, default=elsewhere)


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


def zeros_for_loop(shape: tuple[int, ...], dtype: Any, *inputs: jax.Array) -> jax.Array:
    """Zeros to carry through a loop over the inputs: they vary over the same mesh axes."""
    return compat.vary(jnp.zeros(shape, dtype), compat.varying_axes(*inputs))


def zero_if_ignored(rows: jax.Array, target: jax.Array) -> jax.Array:
    """The rows [..., V], with zeros in place of ignored ones: their inf or NaN reaches nothing."""
    return jnp.where(target[..., None] == IGNORED, 0, rows)


def finite(m: jax.Array) -> jax.Array:
    """The maxima, 0 for a row of -inf: -inf minus -inf is NaN, and an empty shard must stay the identity."""
    return jnp.where(m == -jnp.inf, 0, m)
