"""Sizes of the blocks of `torch:eager`, and why."""

# V = vocabulary (of this rank), H = hidden

from __future__ import annotations

from typing import NamedTuple

import torch


class Sizes(NamedTuple):
    """How large blocks are, on a CPU and elsewhere.

    Attributes:
        elements_cpu, elements: logits of a block of rows.
        logits_bytes_cpu, logits_bytes: of a block of the fused loss, whose logits are all that it holds.
        min_tokens, max_tokens: of a block of the fused loss.
        tile_columns_cpu: classes of a vocabulary tile of the fused loss; elsewhere it is the whole vocabulary.
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

    def block_rows(self, num_cols: int, device: torch.device) -> int:
        """Rows whose logits fit a block; at least 1."""
        elements = self.elements_cpu if device.type == "cpu" else self.elements
        return max(1, elements // max(num_cols, 1))

    def linear_bytes(self, hidden: int, device: torch.device) -> int:
        """Bytes that the logits of a block of the fused loss may take."""
        if device.type != "cpu":
            return self.logits_bytes
        return min(self.logits_bytes_cpu * max(hidden, 512) // 512, self.logits_bytes)

    def linear_tokens(self, vocab: int, hidden: int, device: torch.device, itemsize: int) -> int:
        """Tokens of a block of the fused loss, a multiple of 32 where they fit."""
        fitting = self.linear_bytes(hidden, device) // max(vocab * itemsize, 1)
        return max(self.min_tokens, min(self.max_tokens, fitting // 32 * 32))

    def tile_columns(self, vocab: int, device: torch.device) -> int:
        """Classes of a vocabulary tile, at least 1."""
        return max(min(self.tile_columns_cpu, vocab) if device.type == "cpu" else vocab, 1)


SIZES = Sizes()
