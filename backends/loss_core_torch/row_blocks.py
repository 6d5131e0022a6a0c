"""What the eager losses over logits share: cutting [..., V] tensors into blocks of rows, and exponentials of a block.

A block is small enough to stay in cache (on a CPU) and its buffers are used again for the next one, so that no
[T, V] temporary exists, in any dtype.
"""

# T = tokens, B = rows of a block, V = vocabulary (of this rank)

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from loss_core_torch import values

# Elements of a block. CPU: 4 MiB of float32, which the L2 caches of a few cores hold; a quarter of it costs 10 %
# more time in calls, four times as much 15 % in cache misses. Elsewhere: few, large launches.
_BLOCK_ELEMENTS_CPU = 1 << 20
_BLOCK_ELEMENTS = 1 << 26

_LOG2_E = math.log2(math.e)

# A whole number of vectors, for any machine and a few threads.
_ALIGNMENT = 256

# Up to this size of a row's maximum, its product with log2(e) is rounded by less than 1/8.
_MODERATE = 2.0**20


def block_rows(num_cols: int, device: torch.device) -> int:
    """Rows whose logits fit the block buffer; at least 1."""
    elements = _BLOCK_ELEMENTS_CPU if device.type == "cpu" else _BLOCK_ELEMENTS
    return max(1, elements // max(num_cols, 1))


def row_blocks(rows: int, *tensors: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Cut [..., V] tensors of one shape into 2-D views of at most `rows` rows, all at the same places. Never copies.

    Yields:
        The place of a block among the T rows, and the block of each tensor.
    """
    shape = tensors[0].shape
    if tensors[0].numel() == 0:
        return
    if len(shape) <= 2 or all(x.is_contiguous() for x in tensors):
        pieces = [tuple(x.reshape(-1, shape[-1]) for x in tensors)]
    else:
        # A slice such as logits[:, :-1] is no matrix, but each of its sequences is.
        pieces = [tuple(x[index] for x in tensors) for index in itertools.product(*map(range, shape[:-2]))]
    start = 0
    for piece in pieces:
        length = piece[0].shape[0]
        for first in range(0, length, rows):
            last = min(first + rows, length)
            yield slice(start + first, start + last), tuple(x[first:last] for x in piece)
        start += length


def counted_places(keep_T: Tensor, *tensors: Tensor) -> Tensor | None:
    """Places [N] int64 of the rows that count, where it pays to gather them; None to take all rows as they lie.

    Args:
        keep_T: bool.
        tensors: [..., V], which are to be gathered from.
    """
    shape = tensors[0].shape
    # Of a slice such as logits[:, :-1] there is no matrix to gather from.
    matrices = len(shape) == 2 or all(x.is_contiguous() for x in tensors)
    if not (matrices and shape[-1] and values.may_read(keep_T)):
        return None
    places_N = keep_T.nonzero()[:, 0]
    return places_N if places_N.numel() < keep_T.numel() else None


class Gathered:
    """Blocks of rows at given places, copied into buffers that the next block uses again."""

    def __init__(self, rows: int, places_N: Tensor, *tensors: Tensor) -> None:
        self._rows, self._places_N = rows, places_N
        self._matrices = [x.reshape(-1, x.shape[-1]) for x in tensors]
        self._buffers = [x.new_empty(min(rows, places_N.numel()) * x.shape[-1]) for x in tensors]

    def __iter__(self) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """Yields the places of a block, and the block of each tensor."""
        for at in self._places_N.split(self._rows) if self._places_N.numel() else ():
            blocks = []
            for x_TV, buffer in zip(self._matrices, self._buffers, strict=True):
                block_BV = buffer[: at.numel() * x_TV.shape[-1]].view(at.numel(), -1)
                blocks.append(torch.index_select(x_TV, 0, at, out=block_BV))
            yield at, tuple(blocks)


def some_ignored(keep: Tensor) -> bool:
    """Whether rows of a block may need clearing."""
    return not (values.may_read(keep) and bool(keep.all()))


class Buffer:
    """Room for the largest block, handed out in the shape of the present one."""

    def __init__(self, rows: int, like: Tensor, dtype: torch.dtype) -> None:
        size = -(-rows * like.shape[-1] // _ALIGNMENT) * _ALIGNMENT
        self._flat = torch.empty(size, dtype=dtype, device=like.device)

    def take(self, block_BV: Tensor) -> Tensor:
        return self._flat[: block_BV.numel()].view(block_BV.shape)

    def exp2(self, y_BV: Tensor) -> Tensor:
        """2^y in the place of y, which is what `take` gave."""
        # PyTorch's kernel rounds the last elements, those that fill no vector, in another way. They are made to lie
        # behind the block: a row's result must not depend on the block that it is in.
        self._flat[: -(-y_BV.numel() // _ALIGNMENT) * _ALIGNMENT].exp2_()
        return y_BV


def log2_exp(z_BV: Tensor, factor: float, m_B: Tensor, out_BV: Tensor) -> Tensor | None:
    """Binary logarithms y of exp(factor z - m), each row up to a number of its own.

    In base 2 because exp2 runs at the speed of memory in PyTorch's CPU kernels, exp at a third of it.

    Args:
        z_BV: in the dtype of the arithmetic; may be out_BV.
        m_B: largest value of factor z in each row.
        out_BV: receives y.
    Returns:
        The row's number n, with exp(factor z - m) = 2^(y - n); None where it is 0.
    """
    # NaN and infinities fail the comparison.
    if values.may_read(m_B) and float(torch.linalg.vector_norm(m_B, torch.inf)) < _MODERATE:
        # One fused multiply-add, rounded once. What rounding moves `shift` by is the same for the whole row: it
        # is the number that is returned.
        shift_B = m_B * -_LOG2_E
        torch.add(shift_B[:, None], z_BV, alpha=factor * _LOG2_E, out=out_BV)
        return torch.add(shift_B, m_B, alpha=_LOG2_E)
    if factor != 1.0:
        z_BV = torch.mul(z_BV, factor, out=out_BV)
    # -inf minus -inf is NaN: a row without any finite logit must give 0.
    safe_B1 = torch.where(m_B == -torch.inf, 0.0, m_B)[:, None]
    torch.sub(z_BV, safe_B1, out=out_BV).mul_(_LOG2_E)
    return None


def without(number_B: Tensor | None, powers_B: Tensor) -> Tensor:
    """powers / 2^n, for the number n of `log2_exp`."""
    return powers_B if number_B is None else powers_B / number_B.exp2()


def widened(block_BV: Tensor, buffer_BV: Tensor) -> Tensor:
    """The block in the buffer's dtype: itself, or a copy in the buffer."""
    return block_BV if block_BV.dtype == buffer_BV.dtype else buffer_BV.copy_(block_BV)
