"""Blocks of rows of [..., V] tensors.

On a CPU a block is small enough to stay in cache, and no [T, V] temporary exists, in any dtype.
"""

# T = tokens, B = rows of a block, V = vocabulary (of this rank)

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from loss_core_torch.tracing import is_readable

# Elements: a multiple of any CPU's vector length, and of that times a few threads.
_ALIGNMENT = 256


class Block(NamedTuple):
    """Indices of a block of rows.

    Attributes:
        rows: slice or indices [B] int64 into the T rows.
        leading: index into the leading dimensions of a [..., V] tensor that has no [T, V] view: integers and one slice;
            None if it has one.
    """

    rows: slice | Tensor
    leading: tuple[int | slice, ...] | None

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start if isinstance(self.rows, slice) else self.rows.numel()

    def read(self, x: Tensor) -> Tensor:
        """The block [B, V] of a [..., V] tensor: a view if the strides allow it and its rows are not gathered."""
        if self.leading is not None:
            return x[self.leading].reshape(-1, x.shape[-1])
        x_TV = x.view(-1, x.shape[-1])
        return x_TV[self.rows] if isinstance(self.rows, slice) else x_TV.index_select(0, self.rows)

    def write(self, x: Tensor, block_BV: Tensor) -> None:
        """Write the block into a [..., V] tensor."""
        if self.leading is not None:
            part = x[self.leading]
            part.copy_(block_BV.view(part.shape))
        elif isinstance(self.rows, slice):
            x.view(-1, x.shape[-1])[self.rows] = block_BV
        else:
            x.view(-1, x.shape[-1]).index_copy_(0, self.rows, block_BV.to(x.dtype))

    def view(self, x: Tensor) -> Tensor | None:
        """The block of a [..., V] tensor as a [B, V] view; None if there is no such view."""
        if isinstance(self.rows, Tensor):
            return None
        return view_2d(x if self.leading is None else x[self.leading], self.rows if self.leading is None else None)


def view_2d(x: Tensor, rows: slice | None = None) -> Tensor | None:
    """x [..., V], or some of its rows, as a [T, V] view; None if the strides of x allow no such view."""
    try:
        x_TV = x.view(-1, x.shape[-1])
    except RuntimeError:
        return None
    return x_TV if rows is None else x_TV[rows]


def blocks(max_rows: int, keep_T: Tensor | None, *tensors: Tensor) -> Iterator[Block]:
    """Blocks of at most `max_rows` rows of [..., V] tensors of one shape.

    Ignored rows are skipped if the tensors have [T, V] views and keep_T may be read without a sync; otherwise the
    blocks hold them. Measured at 1,024 x 32,000 with 3 of 4 rows ignored, on two cores: skipping takes 0.65 of the time
    of zeroing for cross entropy, 0.32 for distillation.
    """
    shape = tensors[0].shape
    if tensors[0].numel() == 0:
        return
    if all(view_2d(x) is not None for x in tensors):
        if keep_T is not None and is_readable(keep_T):
            indices_N = keep_T.nonzero()[:, 0]
            yield from (Block(indices_B, None) for indices_B in indices_N.split(max_rows) if indices_B.numel())
        else:
            total = shape[:-1].numel()
            starts = range(0, total, max_rows)
            yield from (Block(slice(first, min(first + max_rows, total)), None) for first in starts)
        return
    # Slice the outermost leading dimension whose inner rows fit a block; index those before it.
    lead = shape[:-1]
    dim = next(d for d in range(len(lead)) if lead[d + 1 :].numel() <= max_rows)
    inner, start = lead[dim + 1 :].numel(), 0
    step = max_rows // inner
    for outer in itertools.product(*map(range, lead[:dim])):
        for first in range(0, lead[dim], step):
            last = min(first + step, lead[dim])
            num_rows = (last - first) * inner
            yield Block(slice(start, start + num_rows), (*outer, slice(first, last)))
            start += num_rows


class Buffer:
    """Memory for the largest block, reused by all blocks of a call."""

    def __init__(self, max_rows: int, like: Tensor, dtype: torch.dtype) -> None:
        size = -(-max_rows * like.shape[-1] // _ALIGNMENT) * _ALIGNMENT
        self._flat = torch.empty(size, dtype=dtype, device=like.device)

    def view_as(self, block_BV: Tensor) -> Tensor:
        """The buffer in the shape of a block."""
        return self._flat[: block_BV.numel()].view(block_BV.shape)

    def upcast(self, block_BV: Tensor) -> Tensor:
        """The block in the dtype of the buffer: itself, or a copy in the buffer."""
        return block_BV if block_BV.dtype == self._flat.dtype else self.view_as(block_BV).copy_(block_BV)

    def writable(self, block_BV: Tensor) -> Tensor:
        """The block in the buffer: itself if it is there, or a copy."""
        return block_BV if block_BV.data_ptr() == self._flat.data_ptr() else self.view_as(block_BV).copy_(block_BV)

    def exp2_(self, y_BV: Tensor) -> Tensor:
        """2^y in place, for y from `view_as`."""
        # PyTorch's kernel rounds the last elements, fewer than a vector, differently. Extending the range to a multiple
        # of the vector length puts them after the block: results of a row must not depend on its block.
        self._flat[: -(-y_BV.numel() // _ALIGNMENT) * _ALIGNMENT].exp2_()
        return y_BV


def zero_ignored(out: Tensor, keep_T: Tensor | None) -> None:
    """Zero the ignored rows of out, if `blocks` skips them."""
    out_TV = view_2d(out) if out.numel() else None
    if keep_T is not None and out_TV is not None and is_readable(keep_T):
        out_TV.index_fill_(0, (~keep_T).nonzero()[:, 0], 0.0)
