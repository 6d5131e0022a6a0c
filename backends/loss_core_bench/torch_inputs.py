"""The inputs of a call on a torch device: whole tensors, or some columns of one that is never made whole."""

# T = tokens, V = vocabulary

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
    """The whole tensor, repeated on the device; indices as they are."""
    block = torch.from_numpy(tile.block)
    block = block.to(device=device, dtype=dtype if block.is_floating_point() else block.dtype)
    size = int(np.prod(tile.shape))
    return block.repeat(-(-size // len(block)))[:size].view(tile.shape)


def place_columns(tile: Tiled, start: int, stop: int, dtype: torch.dtype, device: str) -> Tensor:
    """Some columns of the whole tensor, which is made a few rows at a time."""
    tokens, vocab = tile.shape
    block = torch.from_numpy(tile.block).to(device=device, dtype=dtype)
    part = torch.empty(tokens, stop - start, dtype=dtype, device=device)
    step = max(len(block) // vocab, 1)
    for first in range(0, tokens, step):
        size = min(step, tokens - first) * vocab
        numbers = block.roll(-first * vocab % len(block)).repeat(-(-size // len(block)))[:size]
        part[first : first + step] = numbers.view(-1, vocab)[:, start:stop]
    return part
