"""Sizes of each Triton launch, chosen by shape and dtype alone; the offline compilation asks here as well."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Programs that fill a chip: two for each of the 132 multiprocessors of an H100 (148 on B200, 304 units on MI300X).
_FILL_PROGRAMS = 264

# A row is cut into parts of at least this many blocks, else the parts cost more than they bring.
_MIN_BLOCKS = 2


@dataclass(frozen=True)
class LaunchParameters:
    """How one kernel is launched.

    Attributes:
        block_v: columns that a program takes at a time, a power of 2.
        unroll: logits of a lane's share of a block, a power of 2 below block_v.
        num_warps, num_stages: of Triton's compiler.
        split: parts into which a row is cut at most; each is a program of its own.
    """

    block_v: int
    unroll: int
    num_warps: int
    num_stages: int
    split: int


# (block_v, unroll) of a kind of kernel, by bytes of a logit. 32 lanes x 8 warps x 16 bytes are one load of each
# thread; UNROLL such loads are under way at once, and LANES = block_v / unroll is no less than one of them, else the
# lanes of the terms would lie in several warps and the loop would need barriers. Kernels with two inputs, or with a
# softcap, take less: registers must not spill (`make kernels`).
_NUM_WARPS = 8

# The second read of a row finds it in the L2 cache only if the rows in flight fit there: 50 MB on an H100. Programs of
# 8 warps stand four to a multiprocessor, 528 in all: rows of 64 KB fit. Longer ones are given 32 warps, of which one
# or two programs fit: 132 rows of 256 KB (128k columns in 16 bits) are 34 MB.
_LONG_ROW_BYTES = 64 << 10
_LONG_ROW_WARPS = 32
# With a softcap ptxas spills 8 bytes in programs of so many warps, so that they stay at 8.
_LONG_ROW = {"row": {2: (16384, 2), 4: (8192, 2)}}

# A program has at most 1024 threads, and a warp of AMD's chips has 64.
_MAX_WARPS_AMD = 16

_KINDS = {
    "terms": {2: (8192, 4), 4: (4096, 4), 8: (2048, 4)},
    "capped_terms": {2: (8192, 4), 4: (4096, 4), 8: (1024, 4)},
    "grad": {2: (4096, 1), 4: (2048, 1), 8: (512, 1)},
    "row": {2: (8192, 4), 4: (4096, 4), 8: (256, 1)},
    "capped_row": {2: (8192, 4), 4: (4096, 2), 8: (256, 1)},
    "pair_terms": {2: (4096, 2), 4: (4096, 4), 8: (1024, 2)},
    "pair_grad": {2: (2048, 1), 4: (1024, 1), 8: (512, 1)},
    "pair_row": {2: (4096, 2), 4: (2048, 2), 8: (256, 1)},
}

# One visit of a row: it is not cut into parts.
_WHOLE_ROWS = ("row", "capped_row", "pair_row")

# Bytes of the logits of a chunk of the fused loss, and of their gradient. Each chunk reads and writes the whole float32
# gradient of the weight once (5 GB for 152k x 4096: 1.5 ms of an H100, where the products of 1024 tokens take 5), so a
# chunk wants to be large.
_CHUNK_BYTES = 1 << 30

# Rows of a chunk come in multiples of the tiles of matrix products.
_CHUNK_MULTIPLE = 128


def chunk_tokens(
    num_tokens: int, vocab: int, bytes_per_logit: int, budget: int = _CHUNK_BYTES, multiple: int = _CHUNK_MULTIPLE
) -> int:
    """Tokens of a chunk: what the budget in bytes holds, in as few chunks as possible of about equal size."""
    fitting = max(budget // max(vocab * bytes_per_logit, 1) // multiple * multiple, multiple)
    chunks = -(-num_tokens // fitting)
    even = -(-num_tokens // max(chunks, 1))
    return min(fitting, -(-even // multiple) * multiple)


def launch_parameters(num_rows: int, vocab: int, dtype: torch.dtype, kind: str) -> LaunchParameters:
    """Sizes of a launch over rows of logits.

    Args:
        num_rows, vocab: shape of the logits.
        dtype: of the logits that are read.
        kind: what the kernel makes: "terms", "grad", "row" (both), with a softcap "capped_terms" and "capped_row";
            "pair_terms", "pair_grad" or "pair_row".
    """
    (block_v, unroll), num_warps = _KINDS[kind][dtype.itemsize], _NUM_WARPS
    long_row = _LONG_ROW.get(kind, {})
    if vocab * dtype.itemsize > _LONG_ROW_BYTES and dtype.itemsize in long_row:
        (block_v, unroll), num_warps = long_row[dtype.itemsize], _LONG_ROW_WARPS
    # A small vocabulary is one block, of no more warps than have something to do.
    block_v = min(block_v, max(_power_of_2_from(vocab), unroll))
    while num_warps > 1 and block_v < num_warps * 32 * unroll:
        num_warps //= 2
    split = 1
    if kind not in _WHOLE_ROWS:
        blocks = -(-vocab // block_v)
        while num_rows * split < _FILL_PROGRAMS and blocks >= 2 * split * _MIN_BLOCKS:
            split *= 2
    return LaunchParameters(block_v, unroll, num_warps, 1, split)


def warps_on(size: LaunchParameters, amd: bool) -> int:
    """Warps of a launch, as many as the chip allows."""
    return min(size.num_warps, _MAX_WARPS_AMD) if amd else size.num_warps


def fold_parameters(parts: int) -> LaunchParameters:
    """Sizes of the launch that folds the terms of a row's parts; block_v is the number of parts, rounded up."""
    return LaunchParameters(_power_of_2_from(parts), 1, 1, 1, 1)


def _power_of_2_from(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
