"""[..., V] tensors as the matrices that a program takes: at least two rows and columns, columns side by side."""

# T = tokens, B = rows of a block, V = vocabulary (of this rank)

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from loss_core_torch.kernels.eager.row_blocks import Block, blocks, matrix

# Elements of a block of tensors that are no matrices, and are copied: 64 MiB of float32.
COPIED_ELEMENTS = 1 << 24


def matrices(*tensors: Tensor, most: int | None = None) -> Iterator[tuple[Block, tuple[Tensor, ...]]]:
    """Blocks of [..., V] tensors of one shape, as few as possible, and the matrices of each.

    Args:
        most: elements of a block, for a caller that needs memory for each; None: as many as there are.
    """
    shape = tensors[0].shape
    if most is None and not all(matrix(x) is not None and x.stride(-1) == 1 for x in tensors):
        most = COPIED_ELEMENTS
    rows = max(shape[:-1].numel() if most is None else most // max(shape[-1], 1), 1)
    for block in blocks(rows, None, *tensors):
        yield block, tuple(_padded(block.take(x)) for x in tensors)


def write(out: Tensor, block: Block, aliased: bool, program: Callable[[Tensor], None]) -> None:
    """Let a program write a block of a gradient into `out`.

    Args:
        aliased: `out` is what the program reads: it writes beside it first.
    """
    into_BV = block.view(out)
    if into_BV is not None and not aliased and min(into_BV.shape) > 1 and into_BV.stride(-1) == 1:
        program(into_BV)
        return
    rows, vocab = block.length(), out.shape[-1]
    beside_BV = torch.empty((max(rows, 2), max(vocab, 2)), dtype=out.dtype, device=out.device)
    program(beside_BV)
    block.put(out, beside_BV[:rows, :vocab])


def padded_rows(x_B: Tensor) -> Tensor:
    """Values of the rows of a block, with those of a second one for a block of one row."""
    return torch.cat((x_B, x_B)) if x_B.shape[0] == 1 else x_B


def _padded(x_BV: Tensor) -> Tensor:
    """A second row like the first, a second column of no probability: a program is not made for sizes of 1."""
    if x_BV.stride(-1) != 1:
        x_BV = x_BV.contiguous()
    if x_BV.shape[1] == 1:
        x_BV = torch.cat((x_BV, torch.full_like(x_BV, -torch.inf)), 1)
    return torch.cat((x_BV, x_BV)) if x_BV.shape[0] == 1 else x_BV
