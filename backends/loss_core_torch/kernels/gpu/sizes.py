"""Sizes of each Triton launch, chosen by shape and dtype alone; the offline compilation asks here as well."""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

from dataclasses import dataclass

import torch

from loss_core_torch.kernels import Blocks, HeadSizes
from loss_core_torch.kernels.heads import TILE_MULTIPLE

# A load or store of one thread.
VECTOR_BYTES = 16


@dataclass(frozen=True)
class LaunchParameters:
    """How one kernel is launched.

    Attributes:
        block_v: columns that a program takes at a time, a power of 2 and a multiple of vector.
        vector: columns side by side that a thread takes, a power of 2.
        num_warps: of 32 threads.
        num_stages: of Triton's compiler.
        piece_v: columns of a row that one program has, a multiple of vector; 0 for all.
    """

    block_v: int
    vector: int
    num_warps: int
    num_stages: int = 1
    piece_v: int = 0

    def pieces(self, vocab: int) -> int:
        """Programs of a row."""
        return max(-(-vocab // self.piece_v), 1) if self.piece_v else 1


# (block_v, num_warps) of a kind of kernel, by bytes of a logit. What decides is how many loads are under way (vectors
# of a thread, times threads that fit) against how many rows are: the second read of a row finds it in the L2 cache only
# if the rows in flight fit there. On an H200 (BENCHMARKS.md) 16 warps were better than 8, and 32 with one row a
# multiprocessor worse. Registers must not spill (`make kernels`).
_KINDS = {
    "terms": {2: (8192, 8), 4: (4096, 8), 8: (2048, 8)},
    "capped_terms": {2: (8192, 8), 4: (4096, 8), 8: (1024, 8)},
    # Each target is compared with all columns of its block.
    "others_terms": {2: (2048, 8), 4: (2048, 8), 8: (1024, 8)},
    "grad": {2: (4096, 8), 4: (2048, 8), 8: (512, 8)},
    "row": {2: (8192, 16), 4: (8192, 16), 8: (512, 8)},
    "full_row": {2: (8192, 16), 4: (4096, 16), 8: (512, 8)},
    "pair_terms": {2: (4096, 8), 4: (4096, 8), 8: (1024, 8)},
    "pair_mixture": {2: (4096, 8), 4: (2048, 8), 8: (1024, 8)},
    "pair_grad": {2: (4096, 8), 4: (2048, 8), 8: (512, 8)},
    "pair_row": {2: (8192, 16), 4: (4096, 16), 8: (512, 8)},
}

# Rows of more bytes are shared by several programs: (block_v, num_warps, piece_v). The pieces that are under way on a
# multiprocessor then fit into its L1 cache, where the second read finds them, and threads are few enough for what each
# does once a piece not to count. All programs of a row must find room on a chip at the same time, which limits their
# number; and AMD's chips have not been tried.
_LONG_ROW = 64 << 10
_MOST_PIECES = 64 if torch.version.hip is None else 1
_LONG_ROWS = {
    "row": {2: (4096, 2, 8192), 4: (4096, 4, 4096)},
    "full_row": {2: (4096, 4, 8192), 4: (4096, 8, 8192)},
    "pair_row": {2: (4096, 4, 8192), 4: (2048, 8, 4096)},
}


# Of a kernel over elements that are not rows.
ELEMENTWISE = LaunchParameters(4096, 8, 8)


def launch_parameters(vocab: int, dtype: torch.dtype, kind: str, stored: torch.dtype | None = None) -> LaunchParameters:
    """Sizes of a launch over rows of logits. The number of rows plays no role, so that no result depends on it.

    Args:
        vocab: columns of the logits.
        dtype: of the logits that are read.
        kind: what the kernel makes: "terms", "grad", "row" (both); with a softcap "capped_terms", without the columns
            of K targets "others_terms"; with a softcap or the sum of all logits "full_row"; "pair_terms",
            "pair_mixture", "pair_grad" or "pair_row".
        stored: dtype of the gradient, if another.
    """
    (block_v, num_warps), piece_v = _KINDS[kind][dtype.itemsize], 0
    shared = _LONG_ROWS.get(kind, {}).get(dtype.itemsize)
    if shared and vocab * dtype.itemsize > _LONG_ROW and vocab <= _MOST_PIECES * shared[2]:
        block_v, num_warps, piece_v = shared
    # The narrower of the two dtypes has whole vectors, else values would go from thread to thread.
    vector = VECTOR_BYTES // min(dtype.itemsize, (stored or dtype).itemsize)
    # A small vocabulary is one block, of no more warps than have something to do.
    block_v = min(block_v, max(_power_of_2_from(vocab), vector))
    while num_warps > 1 and block_v < num_warps * 32 * vector:
        num_warps //= 2
    return LaunchParameters(block_v, vector, num_warps, piece_v=piece_v)


def warps_on(size: LaunchParameters, amd: bool) -> int:
    """Warps of a launch: those of AMD's chips have 64 threads."""
    return max(size.num_warps // 2, 1) if amd else size.num_warps


# Logits of the fused loss exist for so many tokens at a time, in the dtype of the arithmetic: enough to fill the tiles
# of a matrix product.
_LOGITS_TOKENS = 512

# Bytes of logits and of their gradient, at least. Each chunk reads and writes the whole float32 gradient of the weight
# once: for 152k x 4096 that is 5 GB, which an H200 moves in 1.2 ms, while the product of 1024 tokens takes 1.9 ms. So a
# chunk wants to be large. Time of all products and kernels for 8192 tokens there, by tokens of a chunk, with logits of
# 512 of them: 1536 52.2 ms, 2048 51.2, 3072 50.5, 4096 48.7, 8192 47.9; logits of 256 tokens cost 1.7 ms more.
_CHUNK_BYTES = 1 << 30

# Rows of a chunk come in multiples of the tiles of matrix products.
_CHUNK_MULTIPLE = 128


def chunks(of: HeadSizes) -> Blocks:
    """Blocks of whole rows. Memory to which the gradient of the weight is rounded later costs nothing before."""
    if not of.beside_bytes:
        tokens = _even(of.num_tokens, _CHUNK_BYTES // max(of.vocab * of.logit_bytes, 1))
        return Blocks(tokens, tokens, of.vocab)
    budget = max(_CHUNK_BYTES, of.rounded_bytes)
    most = _even(of.num_tokens, budget // 2 // max(of.vocab * of.logit_bytes, 1))
    logits_tokens = min(_LOGITS_TOKENS, most)
    rest = budget - logits_tokens * of.vocab * of.logit_bytes
    tokens = _even(of.num_tokens, rest // max(of.vocab * of.beside_bytes, 1))
    return Blocks(tokens, min(logits_tokens, tokens), of.vocab)


# Where the terms of rows are known, or are all that is wanted: bytes of the logits' gradient for a tile of the
# vocabulary and all tokens, and of the logits that exist at a time. The gradient of the hidden states is read and
# written once a tile, so tiles want to be wide. Logits of 32 MiB would stay in the L2 cache, but leave the host 0.1 ms
# for each product and kernel: for 4096 x 131072 x 4096 on an H100, whose host needed 0.4 (a virtual machine), that took
# 49 ms, these sizes 31. The kernels alone take 25.5 ms, four bare products of these shapes 25.9.
_TILE_BYTES = 256 << 20
_TILE_LOGITS_BYTES = 128 << 20


def tiles(of: HeadSizes, together: bool = False) -> Blocks:
    """Blocks of all tokens and a tile of the vocabulary, or of all classes if these are to exist at a time and fit."""
    bytes_of_both = of.num_tokens * of.vocab * (of.logit_bytes + of.beside_bytes)
    if together and bytes_of_both <= _CHUNK_BYTES:
        return Blocks(of.num_tokens, of.num_tokens, of.vocab)
    columns = _TILE_BYTES // max(of.num_tokens * (of.beside_bytes or of.logit_bytes), 1)
    columns = min(max(columns // TILE_MULTIPLE, 1) * TILE_MULTIPLE, of.vocab)
    if not of.beside_bytes:
        return Blocks(of.num_tokens, of.num_tokens, columns)
    logits_tokens = _even(of.num_tokens, _TILE_LOGITS_BYTES // max(columns * of.logit_bytes, 1))
    return Blocks(of.num_tokens, logits_tokens, columns)


def _even(num_tokens: int, most: int) -> int:
    """Tokens of a chunk: at most so many, in as few chunks as possible of about equal size."""
    most = max(most // _CHUNK_MULTIPLE * _CHUNK_MULTIPLE, _CHUNK_MULTIPLE)
    chunks = max(-(-num_tokens // most), 1)
    even = -(-num_tokens // chunks)
    return min(most, -(-even // _CHUNK_MULTIPLE) * _CHUNK_MULTIPLE, num_tokens)


def _power_of_2_from(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
