"""A head of a model: the logits h @ W.T + b of some tokens and classes, and the way back of their gradient.

Three matrix products for each block of logits: the logits themselves, and with their gradient E

    grad_h += E @ W          grad_W += E.T @ h          grad_b += the sum of E over tokens
"""

# T = tokens, B = some of them, V = vocabulary (of this rank), C = some classes of it, H = hidden

from __future__ import annotations

from collections.abc import Iterator
from copy import copy

import torch
from torch import Tensor

from loss_core_torch.kernels import HeadOperands, HeadSizes, KernelSet, LinearGrads, Wanted
from loss_core_torch.tracing import compute_dtype

# Classes of a tile come in multiples of so many, to fill the tiles of matrix products.
TILE_MULTIPLE = 1024


class Head:
    """Hidden states and weight as the products of a kernel set take them.

    Args:
        operand: dtype in which they enter products; None: the set chooses.

    Attributes:
        dtype: of the arithmetic, and of logits.
        num_tokens, vocab: T and V.
        weight_dtype, bias_dtype: as they were given.
    """

    def __init__(self, kernels: KernelSet, given: HeadOperands, operand: torch.dtype | None = None) -> None:
        h_TH, self._w_VH, self._product_dtype, self._bias_V = given
        self.dtype, self.device = compute_dtype(h_TH.dtype), h_TH.device
        self.operand = operand or kernels.operand_dtype(self._product_dtype, self.device)
        self.products = kernels.products(self.operand, self.device)
        self.num_tokens, self.vocab = len(h_TH), len(self._w_VH)
        self.weight_dtype = self._w_VH.dtype
        self.bias_dtype = self.dtype if self._bias_V is None else self._bias_V.dtype
        self._columns = self.products.columns or max(self.vocab, 1)
        self.h_TH = self._operand(h_TH)
        self._converted: Tensor | None = None

    def of_classes(self, tile: slice) -> Head:
        """The same hidden states, and these rows of the weight."""
        if tile.start == 0 and tile.stop == self.vocab:
            return self
        found = copy(self)
        found._w_VH, found._bias_V = self._w_VH[tile], None if self._bias_V is None else self._bias_V[tile]
        found.vocab = len(found._w_VH)
        found._converted = None
        return found

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Classes of each product, and the weight's rows."""
        if self.vocab <= self._columns:
            # Converted once, when it is first used.
            self._converted = self._operand(self._w_VH) if self._converted is None else self._converted
            yield slice(0, self.vocab), self._converted
            return
        for tile in slices(0, self.vocab, self._columns):
            yield tile, self._operand(self._w_VH[tile])

    def make_logits(self, at: slice, z_BC: Tensor) -> None:
        """The logits of some tokens, in the dtype of the arithmetic."""
        h_BH = self.h_TH[at]
        for tile, w_CH in self.tiles():
            if z_BC.numel():
                self.products.into(z_BC[:, tile], h_BH, w_CH.t())
        if self._bias_V is not None:
            z_BC += self._bias_V.to(self.dtype)

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory; zeros where no product would write it, since there are no tokens or no classes."""
        make = torch.empty if self.num_tokens and self.vocab else torch.zeros
        return make(shape, dtype=dtype or self.dtype, device=self.device)

    def sizes(self, rounded_bytes: int = 0) -> HeadSizes:
        """What blocks of this head are chosen by."""
        beside_bytes = 0 if self.operand == self.dtype else self.operand.itemsize
        shape = self.num_tokens, self.vocab, self.h_TH.shape[1]
        return HeadSizes(*shape, self.dtype.itemsize, beside_bytes, rounded_bytes, self.device)

    def _operand(self, x: Tensor) -> Tensor:
        return x.to(self._product_dtype).to(self.operand)


class HeadGrads:
    """Gradients of a head, to which each block of the logits' gradient adds.

    Args:
        want: which of them are made.
        rounded: those of weight and bias come in the dtypes of these.
        at_once: each class has its gradient in one block of all tokens, so that no sum of blocks is kept.
        factor: of all gradients, a scalar, or None.
    """

    def __init__(
        self,
        kernels: KernelSet,
        head: Head,
        want: Wanted,
        *,
        rounded: bool = False,
        at_once: bool = False,
        factor: Tensor | None = None,
    ) -> None:
        self._kernels, self._head, self._want, self._factor = kernels, head, want, factor
        self._weight_dtype = head.weight_dtype if rounded else head.dtype
        self._bias_dtype = head.bias_dtype if rounded else head.dtype
        self._is_final = rounded and at_once
        hidden = head.h_TH.shape[1]
        self._by_h_TH = head.new(*((head.num_tokens, hidden) if want.hidden else (0,)))
        self._by_w_VH = head.new(
            *((head.vocab, hidden) if want.weight else (0,)), dtype=self._weight_dtype if self._is_final else head.dtype
        )
        self._by_b_V = head.new(head.vocab if want.bias else 0).zero_()

    def add(self, of_tile: Head, tile: slice, at: slice, e_BC: Tensor) -> None:
        """What a block adds.

        Args:
            of_tile: the head of these classes.
            tile, at: classes and tokens of the block.
            e_BC: the gradient by its logits, as an operand of products.
        """
        if not e_BC.numel():
            return
        products, h_BH = of_tile.products, of_tile.h_TH[at]
        turned = products.turned(h_BH) if self._want.weight else h_BH
        for part, w_CH in of_tile.tiles():
            of_part_BC, classes = e_BC[:, part], slice(tile.start + part.start, tile.start + part.stop)
            if self._want.hidden:
                multiply = products.add if classes.start else products.into
                multiply(self._by_h_TH[at], of_part_BC, w_CH)
            if self._want.weight:
                self._add_to_weight(self._by_w_VH[classes], of_part_BC, h_BH, turned, at)
        if self._want.bias:
            self._by_b_V[tile] += e_BC.sum(0, dtype=self._head.dtype)

    def _add_to_weight(self, out_CH: Tensor, e_BC: Tensor, h_BH: Tensor, turned: Tensor, at: slice) -> None:
        head = self._head
        first, last = at.start == 0, at.stop == head.num_tokens
        if not self._is_final or (self._factor is None and out_CH.dtype in (head.operand, head.dtype)):
            head.products.accumulate(out_CH, e_BC, h_BH, turned, first, last)
            return
        # float16 can't hold the sum before it has its factor; and some products have one dtype for all.
        wide_CH = head.new(*out_CH.shape)
        head.products.accumulate(wide_CH, e_BC, h_BH, turned, first, last)
        out_CH.copy_(wide_CH if self._factor is None else self._kernels.scaled(wide_CH, self._factor, out_CH.dtype))

    def whole(self) -> LinearGrads:
        """After the last block; empty where they are not wanted."""
        by_w_VH = self._by_w_VH
        if self._factor is not None:
            self._by_h_TH.mul_(self._factor)
            self._by_b_V.mul_(self._factor)
            by_w_VH = by_w_VH if self._is_final else by_w_VH.mul_(self._factor)
        return LinearGrads(self._by_h_TH, by_w_VH.to(self._weight_dtype), self._by_b_V.to(self._bias_dtype))


def slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """Of at most `step`; a single empty one if there is nothing."""
    for at in range(start, max(stop, start + 1), max(step, 1)):
        yield slice(at, min(at + step, stop))
