"""Sizes of the blocks of `torch:eager`, and why."""

# V = vocabulary (of this rank), H = hidden

from __future__ import annotations

from typing import NamedTuple

import torch

from loss_core_torch.kernels import Blocks, HeadSizes


class Sizes(NamedTuple):
    """How large blocks are, on a CPU and elsewhere.

    Attributes:
        elements_cpu, elements: logits of a block of rows.
        logits_bytes_cpu, logits_bytes: of the logits of a block of the fused loss.
        min_tokens, max_tokens: of a block of the fused loss.
        tile_columns_cpu: classes of one product of the fused loss; elsewhere it is all of a block's.
        min_columns: of a block of all tokens.
    """

    # 4 MiB of float32, which the L2 caches of a few cores hold; a quarter of it costs 10 % more time in calls, four
    # times as much 15 % in cache misses. Elsewhere: few, large launches.
    elements_cpu: int = 1 << 20
    elements: int = 1 << 26

    # On a CPU for up to 512 hidden units, and in proportion for more: the weight's gradient, which each block is a pass
    # over, is larger by as much. Elsewhere products want to be large.
    logits_bytes_cpu: int = 48 << 20
    logits_bytes: int = 512 << 20

    # Fewer tokens than this make the products slow (measured: 128 tokens cost as much as 512, 64 a tenth more, 32 twice
    # as much).
    min_tokens: int = 96
    max_tokens: int = 1024

    # A tile of the weight (1536 x 512 float32 = 3 MiB) is read once from memory for two uses.
    tile_columns_cpu: int = 1536
    min_columns: int = 256

    def block_rows(self, num_cols: int, device: torch.device) -> int:
        """Rows whose logits fit a block; at least 1."""
        elements = self.elements_cpu if device.type == "cpu" else self.elements
        return max(1, elements // max(num_cols, 1))

    def chunks(self, of: HeadSizes) -> Blocks:
        """Blocks of whole rows of the fused loss, a multiple of 32 tokens where they fit."""
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
        """Classes of one product; 0: all of them."""
        return self.tile_columns_cpu if device.type == "cpu" else 0

    def _block_bytes(self, of: HeadSizes) -> int:
        """Bytes that the logits of a block of the fused loss may take."""
        if of.device.type != "cpu":
            return self.logits_bytes
        return min(self.logits_bytes_cpu * max(of.hidden, 512) // 512, self.logits_bytes)


SIZES = Sizes()
