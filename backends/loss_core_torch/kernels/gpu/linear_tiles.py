"""Terms of a fused loss of `torch:triton`, and gradients where the terms are known: tiles of the vocabulary.

All tokens meet a tile of the vocabulary before the next one begins. So the gradient of its rows of the weight is whole
after one product: it is written in the weight's own dtype, and no float32 tensor of the weight's size exists. What is
added up over tiles is the gradient of the hidden states, which is small.

For each tile: logits of some tokens at a time (product 1, float32); E, the gradient by the products, of all tokens;
grad_h += E @ W (product 2); grad_w = E.T @ h (product 3).
"""

# T = tokens, B = those of them whose logits exist at a time, H = hidden, V = vocabulary (of this rank),
# C = columns of a tile

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loss_core.row_terms import Coefficients, RowTerms, Sums, combine
from loss_core_torch import precision
from loss_core_torch.kernels import Linear, LinearGrads, Wanted
from loss_core_torch.kernels.gpu import sizes
from loss_core_torch.kernels.gpu.launch import Launcher
from loss_core_torch.kernels.gpu.linear import write_scaled
from loss_core_torch.kernels.gpu.operands import Operands, Part, slices
from loss_core_torch.kernels.gpu.products import multiply
from loss_core_torch.kernels.gpu.rows import RowKernels, with_effect
from loss_core_torch.kernels.terms import joined_terms


class TiledLinearKernels(RowKernels):
    """The methods of a `KernelSet` that make terms of a fused loss, and gradients where the terms are known."""

    def linear_terms(self, linear: Linear, sums: Sums, keep_logits: bool) -> tuple[RowTerms, Tensor]:
        """See `KernelSet.linear_terms`."""
        operands = Operands(self._launcher, linear)
        columns, tokens = _sizes(self._launcher, operands, keep_logits)
        buffer, found = operands.new(tokens * columns), None
        parts = [operands.part(at) for at in slices(0, operands.num_tokens, tokens)]
        with precision.full_float32_products():
            for tile in slices(0, operands.vocab, columns):
                w_CH, of_parts = operands.weight(tile), []
                for part in parts:
                    block = operands.make_logits(_matrix(buffer, part.at, tile), part, w_CH, tile)
                    of_parts.append(self.row_terms(block, sums))
                of_tile = joined_terms(of_parts)
                found = of_tile if found is None else combine(torch, found, of_tile)
        assert found is not None
        whole = keep_logits and (tokens, columns) == (operands.num_tokens, operands.vocab)
        return found, buffer if whole else buffer.new_empty(0)

    def linear_grads(
        self, linear: Linear, terms: RowTerms, coefficients: Coefficients, want: Wanted, logits: Tensor
    ) -> LinearGrads:
        """See `KernelSet.linear_grads`. Coefficients of 0 give a gradient of 0, whatever the row holds."""
        operands, kept = Operands(self._launcher, linear), logits.numel() > 0
        columns, tokens = (operands.vocab, operands.num_tokens) if kept else _sizes(self._launcher, operands, False)
        exponent = operands.exponent(*coefficients)
        coefficients = Coefficients(*(_times_power(c_T, exponent) for c_T in coefficients))
        found = _Grads(self._launcher, operands, want, exponent)
        over_logits = operands.operand == operands.dtype
        buffer = logits if kept else operands.new((operands.num_tokens if over_logits else tokens) * columns)
        e = buffer if over_logits else operands.new(operands.num_tokens * columns, dtype=operands.operand)
        every = slice(0, operands.num_tokens)
        parts = [_known(operands, at, terms, coefficients) for at in slices(0, operands.num_tokens, tokens)]
        with precision.full_float32_products(), precision.float32_sums():
            for tile in slices(0, operands.vocab, columns):
                w_CH, e_TC = operands.weight(tile), _matrix(e, every, tile)
                for part, terms_B, coefficients_B, keep_B in parts:
                    e_BC = e_TC[part.at]
                    z_BC = e_BC if over_logits else _matrix(buffer, part.at, tile)
                    block = operands.rows(z_BC, part, tile) if kept else operands.make_logits(z_BC, part, w_CH, tile)
                    self.row_grad(block._replace(keep_T=keep_B), terms_B, coefficients_B, out=e_BC)
                if e_TC.numel():
                    found.add(tile, e_TC, w_CH)
        return found.whole()


class _Known(NamedTuple):
    """What is known of some tokens before a tile comes to them."""

    part: Part
    terms: RowTerms
    coefficients: Coefficients
    keep: Tensor


def _known(operands: Operands, at: slice, terms: RowTerms, coefficients: Coefficients) -> _Known:
    of_part = coefficients.of_rows(at)
    terms_B = RowTerms(terms.m[at], terms.s[at], terms.t[at])
    return _Known(operands.part(at), terms_B, of_part, with_effect(of_part))


class _Grads:
    """The gradients by hidden states, weight and bias; empty where they are not wanted."""

    def __init__(self, launcher: Launcher, operands: Operands, want: Wanted, exponent: Tensor | None) -> None:
        self._launcher, self._operands, self._want = launcher, operands, want
        self._factor = None if exponent is None else operands.undone(exponent)
        linear = operands.linear
        self._by_h_TH = operands.new(*(linear.h_TH.shape if want.hidden else (0,)))
        self._by_w_VH = operands.new(*(linear.w_VH.shape if want.weight else (0,)), dtype=linear.w_VH.dtype)
        bias_dtype = None if linear.bias_V is None else linear.bias_V.dtype
        self._by_b_V = operands.new(operands.vocab if want.bias else 0, dtype=bias_dtype)

    def add(self, tile: slice, e_TC: Tensor, w_CH: Tensor) -> None:
        """The products of a tile."""
        if self._want.hidden:
            multiply(e_TC, w_CH, self._by_h_TH, add=tile.start > 0)
        if self._want.weight:
            self._weight(e_TC, self._by_w_VH[tile])
        if self._want.bias:
            by_b_C = e_TC.sum(0, dtype=self._operands.dtype)
            self._by_b_V[tile] = by_b_C if self._factor is None else by_b_C * self._factor

    def _weight(self, e_TC: Tensor, out_CH: Tensor) -> None:
        operands, h_TH = self._operands, self._operands.hidden()
        if self._factor is None and out_CH.dtype in (operands.operand, operands.dtype):
            multiply(e_TC.t(), h_TH, out_CH)
            return
        # float16 can't hold the sum before the power of two is taken off; and some products have one dtype for all.
        wide_CH = operands.new(*out_CH.shape)
        multiply(e_TC.t(), h_TH, wide_CH)
        factor = wide_CH.new_ones(()) if self._factor is None else self._factor
        write_scaled(self._launcher, out_CH, wide_CH, factor)

    def whole(self) -> LinearGrads:
        """After the last tile."""
        by_h_TH = self._by_h_TH if self._factor is None else self._by_h_TH.mul_(self._factor)
        return LinearGrads(by_h_TH, self._by_w_VH, self._by_b_V)


def _sizes(launcher: Launcher, operands: Operands, together: bool) -> tuple[int, int]:
    """(columns of a tile, tokens whose logits exist at a time)."""
    linear, num_tokens, vocab = operands.linear, operands.num_tokens, operands.vocab
    block = linear.block(num_tokens)
    columns, tokens = launcher.tiles(
        num_tokens, vocab, operands.dtype.itemsize, operands.operand.itemsize, together and block == num_tokens
    )
    if block < num_tokens:
        # The gradient of all tokens takes as many entries of a tile as the block's rows have in the whole vocabulary.
        columns = sizes.tile_columns(columns, block * vocab // num_tokens)
    return columns, linear.block(tokens)


def _matrix(buffer: Tensor, at: slice, tile: slice) -> Tensor:
    """[B, C] side by side at the start of a buffer."""
    shape = at.stop - at.start, tile.stop - tile.start
    return buffer[: shape[0] * shape[1]].view(shape)


def _times_power(x_T: Tensor | None, exponent: Tensor | None) -> Tensor | None:
    return x_T if x_T is None or exponent is None else torch.ldexp(x_T, exponent)
