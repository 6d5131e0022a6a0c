"""Sizes of chunks and tiles by the platform that a program is compiled for, and loops over chunks of rows."""

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

# The number of classes in a tile is a multiple of this: 16 float32 logits fill a cache line.
_TILE_MULTIPLE = 16


class Sizes(NamedTuple):
    """Sizes for one platform. Hashable.

    Attributes:
        logits_bytes: maximum size of the logits of one chunk of linear rows.
        chunk: minimum and maximum number of linear rows of a chunk. Each chunk reads the weight twice, and reads and
            writes its gradient: below 128 rows that takes longer than the products; with 512 rows it is a tenth.
        tile: maximum number of classes of a tile of linear rows.
        row_bytes: maximum size of a temporary of logits that need a cast.
        pair_bytes: maximum size of each of the three temporaries of pairs of logits.
        is_cpu: whether for XLA:CPU: then chunks of ignored rows are skipped (on an accelerator the host would wait for
            each predicate), and transposed operands are written out (a product over the rows of its left operand takes
            1.5 times as long there).
        widened: 16-bit dtypes whose products are computed in float32, with the same values: the processor has no
            instructions for them.
    """

    logits_bytes: int
    chunk: tuple[int, int]
    tile: int
    row_bytes: int = 0
    pair_bytes: int = 0
    is_cpu: bool = False
    widened: tuple[str, ...] = ()


class Plan(NamedTuple):
    """Sizes of one call: num_chunks chunks of `chunk` rows, tiles of `tile` classes; and the arithmetic's dtype."""

    num_chunks: int
    chunk: int
    tile: int
    dtype: Any
    sizes: Sizes


def widened_on_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """16-bit dtypes without matrix instructions on this processor: float16, and bfloat16 if cpuinfo lists none.

    Measured with avx512_bf16: 0.50 TFLOP/s, where products of float32 run at 0.25.
    """
    # The first paragraph describes the first core.
    flags = cpuinfo.read_text().partition("\n\n")[0].split() if cpuinfo.is_file() else []
    return ("float16",) if {"avx512_bf16", "amx_bf16"} & set(flags) else ("bfloat16", "float16")


# Before a sum, XLA:CPU writes out a cast of the logits, z - m of the sums of exp(z - m) and exp(z - m) (z - m), and the
# summands of pairs. Chunks bound these temporaries and keep them in cache: with 1 MiB for each core pairs were a fifth
# faster than with 4.
_NUM_CORES = os.cpu_count() or 1
CPU = Sizes(64 << 20, (128, 512), 2048, 8 << 20, _NUM_CORES << 20, is_cpu=True, widened=widened_on_cpu())
# An accelerator needs larger products to be busy, and has the memory. A chunk launches a few kernels one by one: over
# bfloat16 logits 8,192 x 128,256 a loop over 8 MiB took 7.6 ms on an H200, 512 times 10 us and the remainder.
ACCELERATOR = Sizes(256 << 20, (128, 1 << 30), 16384, 256 << 20, 256 << 20)


def plan_for(
    num_rows: int, weight_VH: jax.Array, dtype: Any, sizes: Sizes, *, partitioned: bool, block_rows: int = 0
) -> Plan:
    """The plan of a call with at least one row.

    Args:
        partitioned: XLA partitions each chunk over the devices of its automatic axes, and the vocabulary is one tile,
            since a slice of it would be communicated.
        block_rows: maximum number of rows of a chunk; 0: the sizes alone decide.
    """
    vocab, hidden = weight_VH.shape
    min_rows, max_rows = sizes.chunk
    # The logits of 3/8 H rows take 3/8 of the memory of the weight's gradient: worth it up to 512 rows.
    min_rows = max(min_rows, min(512, hidden * 3 // 8, max_rows))
    chunk = min(max(sizes.logits_bytes // (vocab * dtype.itemsize), min_rows), max_rows)
    if partitioned:
        chunk *= _num_devices()
    chunk = min(chunk, block_rows or chunk)
    num_chunks = -(-num_rows // chunk)
    num_tiles = 1 if partitioned else -(-vocab // sizes.tile)
    tile = vocab if num_tiles == 1 else _round_up(-(-vocab // num_tiles), _TILE_MULTIPLE)
    return Plan(num_chunks, -(-num_rows // num_chunks), min(tile, vocab), dtype, sizes)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _num_devices() -> int:
    """Number of devices of the axes that are not manual, over which XLA partitions."""
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
    # Not jax.default_backend(): arrays may be on another platform, which is unknown under jit.
    on_cpu, elsewhere = (functools.partial(kernel, *static, sizes) for sizes in (cpu, accelerator))
    if cpu == accelerator:
        return on_cpu(*arrays)
    return lax.platform_dependent(*arrays, cpu=on_cpu, default=elsewhere)


def rows_within(budget_bytes: int, bytes_per_row: int, *, at_least: int) -> int:
    """The largest power of two of rows that fits the budget, and at least `at_least`."""
    rows = max(budget_bytes // max(bytes_per_row, 1), 1)
    return max(1 << (rows.bit_length() - 1), at_least)


def map_chunks(fn: Callable[..., Tree], inputs: Arrays, chunk: int) -> Tree:
    """`fn(*inputs)` by chunks of the first axis; fn maps `[C, ...]` arrays to a tree of `[C, ...]` arrays.

    The last chunk starts early enough to be full. Overlapping chunks, unlike padding, need no copy of the inputs; rows
    in two chunks are computed twice, with the same values.
    """
    num_rows = inputs[0].shape[0]
    if chunk >= num_rows:
        return fn(*inputs)

    def body(outputs: Tree, start: jax.Array) -> tuple[Tree, None]:
        pieces = fn(*(slice_rows(x, start, chunk) for x in inputs))
        return jax.tree.map(lambda out, piece: update_rows(out, piece, start), outputs, pieces), None

    shapes = jax.eval_shape(lambda *xs: fn(*(x[:chunk] for x in xs)), *inputs)
    zeros = jax.tree.map(lambda s: zeros_for_loop((num_rows, *s.shape[1:]), s.dtype, *inputs), shapes)
    starts = np.minimum(np.arange(0, num_rows, chunk), num_rows - chunk).astype(np.int32)
    outputs, _ = lax.scan(body, zeros, jnp.asarray(starts))
    return outputs


def slice_rows(array: jax.Array, start: jax.Array, num: int) -> jax.Array:
    """`array[start : start + num]`."""
    # XLA would hoist a cast of bfloat16 rows to float32 above the slice and out of the loop: a float32 copy of all
    # rows. After the barrier the array depends on `start`.
    array, start = barrier(array, start)
    if num == array.shape[0]:
        return array  # to slice a sharded array, XLA would gather it
    return lax.dynamic_slice_in_dim(array, start, num, axis=0)


def update_rows(array: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    """`array` with its rows from `start` on replaced; XLA updates it in place within a loop."""
    if rows.shape == array.shape:
        return rows
    return lax.dynamic_update_slice_in_dim(array, rows, start, axis=0)


def barrier(*arrays: jax.Array) -> Arrays:
    """The arrays after an optimization barrier: XLA moves no code across it, and computes their uses separately."""
    result: Arrays = lax.optimization_barrier(arrays)
    return result


def zeros_for_loop(shape: tuple[int, ...], dtype: Any, *inputs: jax.Array) -> jax.Array:
    """Zeros as the initial carry of a loop over the inputs: they vary over the same mesh axes."""
    return compat.vary(jnp.zeros(shape, dtype), compat.varying_axes(*inputs))


def zero_where_ignored(rows: jax.Array, target: jax.Array) -> jax.Array:
    """The rows [..., V], 0 in ignored rows, so that an inf or NaN in these does not propagate."""
    return jnp.where(target[..., None] == IGNORED, 0, rows)


def finite_max(m: jax.Array) -> jax.Array:
    """The maxima, 0 for a row of -inf: -inf - (-inf) is NaN, and an empty shard must be the identity of `combine`."""
    return jnp.where(m == -jnp.inf, 0, m)
