"""The head of a model: logits h @ W.T + b of a block of tokens and classes, and the gradients of h, W and b.

Each block takes three matrix products: one for the logits, and two with their gradient E

    grad_h += E @ W          grad_W += E.T @ h          grad_b += E.sum(tokens)
"""

# T = tokens, B = some of them, V = vocabulary (of this rank), C = some classes of it, H = hidden

from __future__ import annotations

from collections.abc import Iterator
from copy import copy

import torch
from torch import Tensor

from loss_core_torch.kernels import HeadOperands, HeadSizes, KernelSet, LinearGrads, Wanted
from loss_core_torch.tracing import compute_dtype

# Tiles hold a multiple of this number of classes, to fill the tiles of matrix products.
TILE_MULTIPLE = 1024


class Head:
    """Hidden states and weight, converted to operands of a kernel set's products.

    Args:
        operand_dtype: dtype of the operands of products; None: the kernel set chooses.

    Attributes:
        dtype: of the arithmetic, and of logits.
        num_tokens, vocab: T and V.
        weight_dtype, bias_dtype: before the conversion.
    """

    def __init__(self, kernels: KernelSet, operands: HeadOperands, operand_dtype: torch.dtype | None = None) -> None:
        h_TH, self._w_VH, self._product_dtype, self._bias_V = operands
        self.dtype, self.device = compute_dtype(h_TH.dtype), h_TH.device
        self.operand_dtype = operand_dtype or kernels.operand_dtype(self._product_dtype, self.device)
        self.products = kernels.products(self.operand_dtype, self.device)
        self.num_tokens, self.vocab = len(h_TH), len(self._w_VH)
        self.weight_dtype = self._w_VH.dtype
        self.bias_dtype = self.dtype if self._bias_V is None else self._bias_V.dtype
        self._max_columns = self.products.columns or max(self.vocab, 1)
        self.h_TH = self._convert(h_TH)
        self._operand_VH: Tensor | None = None

    def slice_classes(self, tile: slice) -> Head:
        """A head with the same hidden states, and these rows of the weight."""
        if tile.start == 0 and tile.stop == self.vocab:
            return self
        head = copy(self)
        head._w_VH, head._bias_V = self._w_VH[tile], None if self._bias_V is None else self._bias_V[tile]
        head.vocab = len(head._w_VH)
        head._operand_VH = None
        return head

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """The classes of each product, with the rows of the weight as an operand."""
        if self.vocab <= self._max_columns:
            # Converted once, at the first use.
            self._operand_VH = self._convert(self._w_VH) if self._operand_VH is None else self._operand_VH
            yield slice(0, self.vocab), self._operand_VH
            return
        for tile in slices(0, self.vocab, self._max_columns):
            yield tile, self._convert(self._w_VH[tile])

    def compute_logits(self, tokens: slice, z_BC: Tensor) -> None:
        """Write the logits of these tokens into z, in the dtype of the arithmetic."""
        h_BH = self.h_TH[tokens]
        for tile, w_CH in self.tiles():
            if z_BC.numel():
                self.products.into(z_BC[:, tile], h_BH, w_CH.t())
        if self._bias_V is not None:
            z_BC += self._bias_V.to(self.dtype)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A new tensor, uninitialized; zeros if there are no tokens or no classes, since no product writes it then."""
        create = torch.empty if self.num_tokens and self.vocab else torch.zeros
        return create(shape, dtype=dtype or self.dtype, device=self.device)

    def sizes(self, rounded_bytes: int = 0) -> HeadSizes:
        """Sizes from which a kernel set chooses blocks of this head."""
        beside_bytes = 0 if self.operand_dtype == self.dtype else self.operand_dtype.itemsize
        shape = self.num_tokens, self.vocab, self.h_TH.shape[1]
        return HeadSizes(*shape, self.dtype.itemsize, beside_bytes, rounded_bytes, self.device)

    def _convert(self, x: Tensor) -> Tensor:
        return x.to(self._product_dtype).to(self.operand_dtype)


class HeadGrads:
    """Gradients of a head, accumulated over blocks of the logits' gradient.

    Args:
        want: which gradients are computed.
        rounded: return the gradients of weight and bias in the dtypes of weight and bias.
        all_tokens: each block holds all tokens, so that rows of the weight's gradient need no accumulation.
        factor: scalar factor of all gradients, or None.
    """

    def __init__(
        self,
        kernels: KernelSet,
        head: Head,
        want: Wanted,
        *,
        rounded: bool = False,
        all_tokens: bool = False,
        factor: Tensor | None = None,
    ) -> None:
        self._kernels, self._head, self._want, self._factor = kernels, head, want, factor
        self._weight_dtype = head.weight_dtype if rounded else head.dtype
        self._bias_dtype = head.bias_dtype if rounded else head.dtype
        self._is_final = rounded and all_tokens
        hidden = head.h_TH.shape[1]
        self._grad_h_TH = head.empty(*((head.num_tokens, hidden) if want.hidden else (0,)))
        self._grad_w_VH = head.empty(
            *((head.vocab, hidden) if want.weight else (0,)), dtype=self._weight_dtype if self._is_final else head.dtype
        )
        self._grad_b_V = head.empty(head.vocab if want.bias else 0).zero_()

    def add(self, tile_head: Head, tile: slice, tokens: slice, e_BC: Tensor) -> None:
        """Add the contribution of one block.

        Args:
            tile_head: the head of the block's classes.
            tile, tokens: classes and tokens of the block.
            e_BC: gradient of its logits, as an operand of products.
        """
        if not e_BC.numel():
            return
        products, h_BH = tile_head.products, tile_head.h_TH[tokens]
        turned = products.turned(h_BH) if self._want.weight else h_BH
        for part, w_CH in tile_head.tiles():
            e_part_BC, classes = e_BC[:, part], slice(tile.start + part.start, tile.start + part.stop)
            if self._want.hidden:
                multiply = products.add if classes.start else products.into
                multiply(self._grad_h_TH[tokens], e_part_BC, w_CH)
            if self._want.weight:
                self._add_to_weight(self._grad_w_VH[classes], e_part_BC, h_BH, turned, tokens)
        if self._want.bias:
            self._grad_b_V[tile] += e_BC.sum(0, dtype=self._head.dtype)

    def _add_to_weight(self, out_CH: Tensor, e_BC: Tensor, h_BH: Tensor, turned: Tensor, tokens: slice) -> None:
        head = self._head
        first, last = tokens.start == 0, tokens.stop == head.num_tokens
        if not self._is_final or (self._factor is None and out_CH.dtype in (head.operand_dtype, head.dtype)):
            head.products.accumulate(out_CH, e_BC, h_BH, turned, first, last)
            return
        # Without its factor the sum may exceed float16; and some products need out in the dtype of their operands.
        wide_CH = head.empty(*out_CH.shape)
        head.products.accumulate(wide_CH, e_BC, h_BH, turned, first, last)
        out_CH.copy_(wide_CH if self._factor is None else self._kernels.scaled(wide_CH, self._factor, out_CH.dtype))

    def result(self) -> LinearGrads:
        """The gradients, after the last block; empty where they are not wanted."""
        grad_w_VH = self._grad_w_VH
        if self._factor is not None:
            self._grad_h_TH.mul_(self._factor)
            self._grad_b_V.mul_(self._factor)
            grad_w_VH = grad_w_VH if self._is_final else grad_w_VH.mul_(self._factor)
        return LinearGrads(self._grad_h_TH, grad_w_VH.to(self._weight_dtype), self._grad_b_V.to(self._bias_dtype))


def slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """Slices of at most `step` from start to stop; a single empty one if there is nothing between them."""
    for first in range(start, max(stop, start + 1), max(step, 1)):
        yield slice(first, min(first + step, stop))
