"""Block sizes of `torch:eager`, and how they were chosen."""

# V = vocabulary (of this rank), H = hidden

from __future__ import annotations

from typing import NamedTuple

import torch

from loss_core_torch.kernels import Blocks, HeadSizes


class Sizes(NamedTuple):
    """Block sizes on a CPU and on other devices.

    Attributes:
        elements_cpu, elements: logits per block of rows.
        logits_bytes_cpu, logits_bytes: bytes of the logits per block of the fused loss.
        min_tokens, max_tokens: tokens per block of the fused loss.
        tile_columns_cpu: classes per product of the fused loss; on other devices, all of a block's.
        min_columns: minimum number of classes per block of all tokens.
    """

    # 4 MiB of float32, which fit the L2 caches of a few cores; a quarter of it costs 10 % more time in calls, four
    # times as much 15 % in cache misses. On other devices: few, large launches.
    elements_cpu: int = 1 << 20
    elements: int = 1 << 26

    # On a CPU for up to 512 hidden units, and in proportion for more, since each block reads and writes the weight's
    # gradient once. On other devices large products are faster.
    logits_bytes_cpu: int = 48 << 20
    logits_bytes: int = 512 << 20

    # With fewer tokens, products are slow (measured time per token: 128 as 512, 64 a tenth more, 32 twice as much).
    min_tokens: int = 96
    max_tokens: int = 1024

    # A tile of the weight (1536 x 512 float32 = 3 MiB) is read from memory once for its two products.
    tile_columns_cpu: int = 1536
    min_columns: int = 256

    def block_rows(self, num_cols: int, device: torch.device) -> int:
        """Rows per block; at least 1."""
        elements = self.elements_cpu if device.type == "cpu" else self.elements
        return max(1, elements // max(num_cols, 1))

    def chunks(self, of: HeadSizes) -> Blocks:
        """Blocks with all classes for the fused loss, of a multiple of 32 tokens."""
        fitting = self._block_bytes(of) // max(of.vocab * of.logit_bytes, 1)
        tokens = max(self.min_tokens, min(self.max_tokens, fitting // 32 * 32))
        return Blocks(tokens, tokens, of.vocab)

    def tiles(self, of: HeadSizes, together: bool) -> Blocks:
        """Blocks of all tokens and a tile of the vocabulary."""
        if together and of.num_tokens * of.vocab * of.logit_bytes <= self._block_bytes(of):
            return Blocks(of.num_tokens, of.num_tokens, of.vocab)
        fitting = max(self._block_bytes(of) // max(of.num_tokens * of.logit_bytes, 1), self.min_columns)
        columns = min(self.product_columns(of.device) or of.vocab, fitting, of.vocab)
        return Blocks(of.num_tokens, min(of.num_tokens, self.max_tokens), max(columns, 1))

    def product_columns(self, device: torch.device) -> int:
        """Maximum number of classes per product; 0: no limit."""
        return self.tile_columns_cpu if device.type == "cpu" else 0

    def _block_bytes(self, of: HeadSizes) -> int:
        """Maximum bytes of the logits of a block of the fused loss."""
        if of.device.type != "cpu":
            return self.logits_bytes
        return min(self.logits_bytes_cpu * max(of.hidden, 512) // 512, self.logits_bytes)


SIZES = Sizes()
