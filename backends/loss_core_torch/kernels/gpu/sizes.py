"""Sizes of each Triton launch, chosen by shape and dtype alone; the offline compilation uses them as well."""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from loss_core_torch.kernels import Blocks, HeadSizes
from loss_core_torch.kernels.heads import TILE_MULTIPLE

# Width of a thread's load or store.
VECTOR_BYTES = 16


@dataclass(frozen=True)
class LaunchParameters:
    """How one kernel is launched.

    Attributes:
        block_v: columns of a block, a power of 2 and a multiple of vector.
        vector: contiguous columns of a thread's load or store, a power of 2 above 1.
        num_warps: warps of 32 threads per program.
        num_stages: pipeline stages of Triton's compiler.
        piece_v: columns per program of a row that several programs share, a multiple of vector; 0: it is not shared.
    """

    block_v: int
    vector: int
    num_warps: int
    num_stages: int = 1
    piece_v: int = 0

    def num_pieces(self, vocab: int) -> int:
        """Programs per row."""
        return max(-(-vocab // self.piece_v), 1) if self.piece_v else 1


# (block_v, num_warps) of a kind of kernel, by bytes of a logit. They trade loads in flight (vectors of a thread, times
# resident threads) against rows in flight: the second read of a row hits the L2 cache only if all rows in flight fit
# there. On an H200 (BENCHMARKS.md) 16 warps were better than 8, and 32 with one row per multiprocessor worse. Registers
# must not spill (`make kernels`).
_SIZES = {
    "terms": {2: (8192, 8), 4: (4096, 8), 8: (2048, 8)},
    "general_terms": {2: (8192, 8), 4: (4096, 8), 8: (1024, 8)},
    # Each target is compared with every column of its block.
    "top_k_terms": {2: (2048, 8), 4: (2048, 8), 8: (1024, 8)},
    "grad": {2: (4096, 8), 4: (2048, 8), 8: (512, 8)},
    "row": {2: (8192, 16), 4: (8192, 16), 8: (512, 8)},
    "general_row": {2: (8192, 16), 4: (4096, 16), 8: (512, 8)},
    "pair_terms": {2: (4096, 8), 4: (4096, 8), 8: (1024, 8)},
    "pair_mixture": {2: (4096, 8), 4: (2048, 8), 8: (1024, 8)},
    "pair_grad": {2: (4096, 8), 4: (2048, 8), 8: (512, 8)},
    "pair_row": {2: (8192, 16), 4: (4096, 16), 8: (512, 8)},
}

# Rows of more bytes are shared by several programs: (block_v, num_warps, piece_v). The pieces in flight on a
# multiprocessor then fit its L1 cache, which the second read hits, and threads are few enough for the work that each
# does once per piece to be negligible. All programs of a row must be resident at the same time, which limits their
# count; and AMD's GPUs have not been tried.
_LONG_ROW_BYTES = 64 << 10
_MAX_PIECES = 64 if torch.version.hip is None else 1
_SHARED_SIZES = {
    "row": {2: (4096, 2, 8192), 4: (4096, 4, 4096)},
    "general_row": {2: (4096, 4, 8192), 4: (4096, 8, 8192)},
    "pair_row": {2: (4096, 4, 8192), 4: (2048, 8, 4096)},
}


# Of the elementwise kernel.
ELEMENTWISE = LaunchParameters(4096, 8, 8)


def launch_parameters(
    vocab: int, dtype: torch.dtype, kind: str, grad_dtype: torch.dtype | None = None
) -> LaunchParameters:
    """Sizes of a launch over rows of logits. They do not depend on the number of rows, so neither do results.

    Args:
        vocab: columns of the logits.
        dtype: dtype of the logits.
        kind: what the kernel computes: "terms", "grad" or "row" (both); with a softcap or the sum for the entropy
            "general_terms", without the columns of K targets "top_k_terms", with a softcap or any further sum
            "general_row"; "pair_terms", "pair_mixture", "pair_grad" or "pair_row".
        grad_dtype: dtype of the gradient; None: that of the logits.
    """
    (block_v, num_warps), piece_v = _SIZES[kind][dtype.itemsize], 0
    shared = _SHARED_SIZES.get(kind, {}).get(dtype.itemsize)
    if shared and vocab * dtype.itemsize > _LONG_ROW_BYTES and vocab <= _MAX_PIECES * shared[2]:
        block_v, num_warps, piece_v = shared
    # A vector of the narrower of the two dtypes: else values would be exchanged between threads.
    vector = VECTOR_BYTES // min(dtype.itemsize, (grad_dtype or dtype).itemsize)
    # A small vocabulary is one block, with no idle warps.
    block_v = min(block_v, max(triton.next_power_of_2(vocab), vector))
    while num_warps > 1 and block_v < num_warps * 32 * vector:
        num_warps //= 2
    return LaunchParameters(block_v, vector, num_warps, piece_v=piece_v)


def warps_on(size: LaunchParameters, amd: bool) -> int:
    """Warps of a launch, where those of AMD's GPUs have 64 threads."""
    return max(size.num_warps // 2, 1) if amd else size.num_warps


# Tokens whose logits exist at a time in a fused loss, in the dtype of the arithmetic: enough to fill the tiles of a
# matrix product.
_LOGITS_TOKENS = 512

# Bytes of logits and of their gradient, at least. Each chunk reads and writes the full float32 gradient of the weight
# once: for 152k x 4096 that is 5 GB, which an H200 moves in 1.2 ms, while the product of 1024 tokens takes 1.9 ms. So
# large chunks are faster. Time of all products and kernels for 8192 tokens there, by tokens of a chunk, with logits of
# 512 of them: 1536 52.2 ms, 2048 51.2, 3072 50.5, 4096 48.7, 8192 47.9; logits of 256 tokens cost 1.7 ms more.
_CHUNK_BYTES = 1 << 30

# Tokens of a chunk are a multiple of this, as the tiles of matrix products are.
_CHUNK_MULTIPLE = 128


def chunks(head: HeadSizes) -> Blocks:
    """Blocks of full rows. They may use as much memory as the rounded gradient of the weight needs after them."""
    if not head.beside_bytes:
        tokens = _balanced(head.num_tokens, _CHUNK_BYTES // max(head.vocab * head.logit_bytes, 1))
        return Blocks(tokens, tokens, head.vocab)
    budget = max(_CHUNK_BYTES, head.rounded_bytes)
    max_tokens = _balanced(head.num_tokens, budget // 2 // max(head.vocab * head.logit_bytes, 1))
    logits_tokens = min(_LOGITS_TOKENS, max_tokens)
    rest = budget - logits_tokens * head.vocab * head.logit_bytes
    tokens = _balanced(head.num_tokens, rest // max(head.vocab * head.beside_bytes, 1))
    return Blocks(tokens, min(logits_tokens, tokens), head.vocab)


# Bytes of the logits' gradient for a tile of the vocabulary and all tokens, and of the logits that exist at a time, if
# the terms of rows are known or are the only result. The gradient of the hidden states is read and written once per
# tile, so wide tiles are faster. Logits of 32 MiB would stay in the L2 cache, but leave the host 0.1 ms per product and
# kernel: for 4096 x 131072 x 4096 on an H100, whose host needed 0.4 (a virtual machine), that took 49 ms, these sizes
# 31. The kernels alone take 25.5 ms, the four matrix products of these shapes alone 25.9.
_TILE_BYTES = 256 << 20
_TILE_LOGITS_BYTES = 128 << 20


def tiles(head: HeadSizes, together: bool = False) -> Blocks:
    """Blocks of all tokens and a tile of the vocabulary, or all classes if `together` is true and they fit."""
    num_bytes = head.num_tokens * head.vocab * (head.logit_bytes + head.beside_bytes)
    if together and num_bytes <= _CHUNK_BYTES:
        return Blocks(head.num_tokens, head.num_tokens, head.vocab)
    columns = _TILE_BYTES // max(head.num_tokens * (head.beside_bytes or head.logit_bytes), 1)
    columns = min(max(columns // TILE_MULTIPLE, 1) * TILE_MULTIPLE, head.vocab)
    if not head.beside_bytes:
        return Blocks(head.num_tokens, head.num_tokens, columns)
    logits_tokens = _balanced(head.num_tokens, _TILE_LOGITS_BYTES // max(columns * head.logit_bytes, 1))
    return Blocks(head.num_tokens, logits_tokens, columns)


def _balanced(num_tokens: int, limit: int) -> int:
    """Tokens of a chunk, at most `limit`, for as few chunks as possible of about equal size."""
    limit = max(limit // _CHUNK_MULTIPLE * _CHUNK_MULTIPLE, _CHUNK_MULTIPLE)
    num_chunks = max(-(-num_tokens // limit), 1)
    equal = -(-num_tokens // num_chunks)
    return min(limit, -(-equal // _CHUNK_MULTIPLE) * _CHUNK_MULTIPLE, num_tokens)
