"""Inputs of a call on a torch device: full tensors, or a column shard without the full tensor."""

# T = tokens, V = vocabulary, W = classes of a shard

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from loss_core.bench.measure.job import Tiled

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def place(tile: Tiled, dtype: torch.dtype, device: str) -> Tensor:
    """The full tensor, repeated on the device; integers keep their dtype."""
    block = torch.from_numpy(tile.block)
    block = block.to(device=device, dtype=dtype if block.is_floating_point() else block.dtype)
    size = int(np.prod(tile.shape))
    return block.repeat(-(-size // len(block)))[:size].view(tile.shape)


def place_columns(tile: Tiled, start: int, stop: int, dtype: torch.dtype, device: str) -> Tensor:
    """Columns start:stop of the full tensor, of which a few rows are materialized at a time."""
    tokens, vocab = tile.shape
    block = torch.from_numpy(tile.block).to(device=device, dtype=dtype)
    shard_TW = torch.empty(tokens, stop - start, dtype=dtype, device=device)
    step = max(len(block) // vocab, 1)
    for first in range(0, tokens, step):
        size = min(step, tokens - first) * vocab
        rows = block.roll(-first * vocab % len(block)).repeat(-(-size // len(block)))[:size]
        shard_TW[first : first + step] = rows.view(-1, vocab)[:, start:stop]
    return shard_TW
