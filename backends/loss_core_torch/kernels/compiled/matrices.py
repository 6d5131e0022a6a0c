"""[..., V] tensors as the matrices that compiled programs accept: at least two rows and columns, columns contiguous."""

# T = tokens, B = rows of a block, V = vocabulary (of this rank)

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from loss_core_torch.kernels.eager.row_blocks import Block, blocks, view_2d

# Elements per block of tensors that have no [T, V] view and are copied: 64 MiB of float32.
MAX_COPIED_ELEMENTS = 1 << 24


def matrices(*tensors: Tensor, max_elements: int | None = None) -> Iterator[tuple[Block, tuple[Tensor, ...]]]:
    """Blocks of [..., V] tensors of one shape, as few as possible, and the matrices of each.

    Args:
        max_elements: limit on the elements per block, if the caller allocates memory for each; None: no limit.
    """
    shape = tensors[0].shape
    if max_elements is None and not all(view_2d(x) is not None and x.stride(-1) == 1 for x in tensors):
        max_elements = MAX_COPIED_ELEMENTS
    max_rows = max(shape[:-1].numel() if max_elements is None else max_elements // max(shape[-1], 1), 1)
    for block in blocks(max_rows, None, *tensors):
        yield block, tuple(_padded(block.read(x)) for x in tensors)


def write(out: Tensor, block: Block, aliased: bool, program: Callable[[Tensor], None]) -> None:
    """Call a program that writes a block of a gradient: into a view of `out`, or into a copy that is then written back.

    Args:
        aliased: `out` is an input of the program, which then writes to a copy.
    """
    view_BV = block.view(out)
    if view_BV is not None and not aliased and min(view_BV.shape) > 1 and view_BV.stride(-1) == 1:
        program(view_BV)
        return
    num_rows, vocab = block.num_rows, out.shape[-1]
    copy_BV = torch.empty((max(num_rows, 2), max(vocab, 2)), dtype=out.dtype, device=out.device)
    program(copy_BV)
    block.write(out, copy_BV[:num_rows, :vocab])


def padded_rows(x_B: Tensor) -> Tensor:
    """Per-row values of a block; those of a single row twice, as in `matrices`."""
    return torch.cat((x_B, x_B)) if x_B.shape[0] == 1 else x_B


def _padded(x_BV: Tensor) -> Tensor:
    """A single row twice, a single column with a second one of -inf: programs do not accept sizes of 1."""
    if x_BV.stride(-1) != 1:
        x_BV = x_BV.contiguous()
    if x_BV.shape[1] == 1:
        x_BV = torch.cat((x_BV, torch.full_like(x_BV, -torch.inf)), 1)
    return torch.cat((x_BV, x_BV)) if x_BV.shape[0] == 1 else x_BV
