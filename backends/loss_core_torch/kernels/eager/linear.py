"""Logits softcap(h @ W.T) that are never held whole, in PyTorch operations; see `KernelSet`.

Three matrix products per block of tokens: its logits, and with their gradient E

    grad_h = E @ W          grad_W += E.T @ h          grad_b += the sum of E over tokens

Memory: the two gradients, and the logits of a block, in whose place comes E.
"""

# T = tokens, B = tokens of a block, H = hidden, V = vocabulary (of this rank), C = columns of a tile

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from loss_core.row_terms import (
    EMPTY_ROW,
    Coefficients,
    Objective,
    RowTerms,
    Sums,
    combine,
)
from loss_core_torch.kernels import Linear, LinearGrads, Wanted
from loss_core_torch.kernels.eager.block_logits import BlockLogits, BlockRows, Tiles
from loss_core_torch.kernels.eager.sizes import Sizes
from loss_core_torch.kernels.terms import filled_terms, joined_terms, kept_coefficients
from loss_core_torch.tracing import compute_dtype


class LinearKernels:
    """The `linear_` methods of a `KernelSet`."""

    sizes: Sizes

    def linear_terms(self, linear: Linear, sums: Sums, keep_logits: bool) -> tuple[RowTerms, Tensor]:
        """Terms of each token; and its logits, where they are to be kept and fit the memory of one block."""
        call = _Call(linear, self.sizes)
        num_tokens = linear.h_TH.shape[0]
        fits = num_tokens * call.vocab * call.dtype.itemsize <= call.bytes and num_tokens == linear.block(num_tokens)
        if not (keep_logits and fits and call.vocab):
            parts = [_terms_by_tile(call, at, sums) for at in call.blocks(call.block)]
            return call.together(parts, sums), call.new(0)
        buffer, found = call.new(num_tokens * call.vocab), []
        for at in call.blocks(max(num_tokens, 1)):
            found.append(call.logits(buffer, at).fill(call.hidden(at), sums))
        return call.together(found, sums), buffer

    def linear_grads(
        self, linear: Linear, terms: RowTerms, coefficients: Coefficients, want: Wanted, logits: Tensor
    ) -> LinearGrads:
        """Gradients from terms and coefficients of each token."""
        call, kept = _Call(linear, self.sizes), logits.numel() > 0
        block = max(linear.h_TH.shape[0], 1) if kept else call.block
        buffer = logits if kept else call.buffer(block)
        found = _Sums(linear, call, want)
        for at in call.blocks(block):
            block_logits, h_BH = call.logits(buffer, at), call.hidden(at)
            if not kept:
                # Their terms are known.
                for _ in block_logits.make(h_BH):
                    pass
            part = RowTerms(*(None if x_T is None else x_T[at] for x_T in terms))
            block_logits.to_gradient(part, coefficients.of_rows(at))
            found.add(at, block_logits, h_BH)
        return found.grads.rounded(linear)

    def linear_terms_and_grads(
        self, linear: Linear, coef_T: Tensor, objective: Objective, want: Wanted
    ) -> tuple[RowTerms, LinearGrads]:
        """Terms, and the gradients of the sum of coef * loss."""
        call = _Call(linear, self.sizes)
        buffer, sums, found = call.buffer(call.block), _Sums(linear, call, want), []
        for at in call.blocks(call.block):
            logits, h_BH = call.logits(buffer, at), call.hidden(at)
            part = logits.fill(h_BH, objective.sums)
            coefficients = objective.of_rows(at).coefficients(torch, part, [coef_T[at]])
            logits.to_gradient(part, kept_coefficients(coefficients, coef_T[at] != 0))
            found.append(part)
            sums.add(at, logits, h_BH)
        return call.together(found, objective.sums), sums.grads


class _Call:
    """Sizes and operands of a call."""

    def __init__(self, linear: Linear, sizes: Sizes) -> None:
        self._linear, self.dtype = linear, compute_dtype(linear.h_TH.dtype)
        self.softcap = linear.softcap
        self.vocab, hidden = linear.w_VH.shape
        device = linear.h_TH.device
        self.bytes = sizes.linear_bytes(hidden, device)
        self.block = linear.block(sizes.linear_tokens(self.vocab, hidden, device, self.dtype.itemsize))
        self.tiles = Tiles(linear.w_VH, linear.product_dtype, sizes, linear.bias_V)

    def blocks(self, block: int) -> Iterator[slice]:
        """Blocks of tokens; none where there is no class."""
        num_tokens = self._linear.h_TH.shape[0] if self.vocab else 0
        for start in range(0, num_tokens, block):
            yield slice(start, min(start + block, num_tokens))

    def new(self, *shape: int) -> Tensor:
        """Memory in the dtype of the arithmetic."""
        return torch.empty(shape, dtype=self.dtype, device=self._linear.h_TH.device)

    def buffer(self, block: int) -> Tensor:
        """Memory of a block's logits."""
        return self.new(min(block, self._linear.h_TH.shape[0]) * self.vocab)

    def hidden(self, at: slice) -> Tensor:
        """Hidden states of a block, as the products take them."""
        return self._linear.h_TH[at].to(self._linear.product_dtype).to(self.dtype)

    def logits(self, buffer: Tensor, at: slice) -> BlockLogits:
        """The logits of a block, not made yet."""
        return BlockLogits(buffer, self.rows(at), self.tiles, self._linear.softcap)

    def rows(self, at: slice, start: int = 0) -> BlockRows:
        """What is known of the rows of a block, for the rows of the weight from `start` on."""
        linear, inverse_T = self._linear, self._linear.inverse_temperature_T
        inverse_B = None if inverse_T is None else inverse_T[at]
        return BlockRows(linear.labels_T[at], linear.vocab_start + start, inverse_B)

    def together(self, parts: list[RowTerms], sums: Sums) -> RowTerms:
        """Terms of all tokens from those of the blocks; of no class where there is no block."""
        if not parts:
            return filled_terms(EMPTY_ROW, sums, self._linear.labels_T, self.dtype)
        return joined_terms(parts)


class _Sums:
    """The gradients, to which each block adds."""

    def __init__(self, linear: Linear, call: _Call, want: Wanted) -> None:
        self._want, self._num_tokens = want, linear.h_TH.shape[0]
        h_TH, w_VH = linear.h_TH, linear.w_VH
        like: dict[str, Any] = {"dtype": call.dtype, "device": h_TH.device}
        # The first block writes every entry of the weight's; without any block zeros are right.
        new_w = torch.empty if h_TH.shape[0] else torch.zeros
        self.grads = LinearGrads(
            torch.zeros(h_TH.shape if want.hidden else (0,), **like),
            new_w(w_VH.shape if want.weight else (0,), **like),
            torch.zeros(w_VH.shape[:1] if want.bias else (0,), **like),
        )

    def add(self, at: slice, logits: BlockLogits, h_BH: Tensor) -> None:
        """What a block adds, whose logits are their gradient."""
        grad_h, grad_w, grad_b = (grad if wanted else None for grad, wanted in zip(self.grads, self._want, strict=True))
        first, last = at.start == 0, at.stop == self._num_tokens
        logits.add_gradients(None if grad_h is None else grad_h[at], grad_w, grad_b, h_BH, first=first, last=last)


def _terms_by_tile(call: _Call, at: slice, sums: Sums) -> RowTerms:
    """Terms of a block of which no more than the logits of one vocabulary tile exist at a time."""
    h_BH, found = call.hidden(at), None
    buffer = call.new(h_BH.shape[0] * call.tiles.columns)
    for tile in call.tiles.slices():
        part = BlockLogits(buffer, call.rows(at, tile.start), call.tiles.only(tile), call.softcap).fill(h_BH, sums)
        found = part if found is None else combine(torch, found, part)
    assert found is not None
    return found
