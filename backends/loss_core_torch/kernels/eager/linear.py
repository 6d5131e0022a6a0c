"""Logits softcap(h @ W.T) that are never held whole, in PyTorch operations; see `KernelSet`.

Three matrix products per block of tokens: with the gradient E' of a block's logits, but for a factor of each row,

    grad_h = factor * (E' @ W)          grad_W += E'.T @ (factor * h)

so the division by s and every factor of the loss fall on [B, H] operands, never on [B, V]. Memory: the two gradients,
and the logits of a block.
"""

# T = tokens, B = tokens of a block, H = hidden, V = vocabulary (of this rank), C = columns of a tile

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from loss_core.row_terms import Objective, RowTerms, combine
from loss_core_torch.kernels import Linear, Wanted
from loss_core_torch.kernels.eager.block_logits import BlockLogits, Tiles
from loss_core_torch.kernels.eager.row_blocks import log2_exp, without
from loss_core_torch.kernels.eager.sizes import Sizes
from loss_core_torch.tracing import compute_dtype


class LinearKernels:
    """The `linear_` methods of a `KernelSet`."""

    sizes: Sizes

    def operand_dtype(self, product_dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """That of the arithmetic, on every device."""
        return compute_dtype(product_dtype)

    def linear_terms(self, linear: Linear, keep_logits: bool) -> tuple[RowTerms, Tensor]:
        """Terms of each token; and its logits, where they are to be kept and fit the memory of one block."""
        call, objective = _Call(linear, self.sizes), linear.objective
        fits = linear.h_TH.shape[0] * call.vocab * call.dtype.itemsize <= call.bytes
        if not (keep_logits and fits and call.vocab):
            parts = [_terms_by_tile(call, at, objective) for at in call.blocks(call.block)]
            return call.together(parts, objective), call.new(0)
        buffer, found = call.new(linear.h_TH.shape[0] * call.vocab), []
        for at in call.blocks(max(linear.h_TH.shape[0], 1)):
            logits = call.logits(buffer, at)
            part = logits.fill(call.hidden(at), objective)
            found.append(part._replace(s=logits.sums(part.m)))
        return call.together(found, objective), buffer

    def linear_grads(
        self, linear: Linear, terms: RowTerms, upstream_T: Tensor, want: Wanted, logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients for the upstream gradient of each token's loss."""
        call, objective, kept = _Call(linear, self.sizes), linear.objective, logits.numel() > 0
        block = max(linear.h_TH.shape[0], 1) if kept else call.block
        buffer = logits if kept else call.buffer(block)
        sums = _Sums(linear, call, want)
        for at in call.blocks(block):
            block_logits, h_BH = call.logits(buffer, at), call.hidden(at)
            if not kept:
                block_logits.fill(h_BH, objective)
            part = RowTerms(*(None if x_T is None else x_T[at] for x_T in terms))
            _, divisor_B = block_logits.to_gradient(part, objective, with_sum=False)
            sums.add(at, block_logits, h_BH, upstream_T[at] / divisor_B)
        return sums.grad_h, sums.grad_w

    def linear_terms_and_grads(self, linear: Linear, coef_T: Tensor, want: Wanted) -> tuple[RowTerms, Tensor, Tensor]:
        """Terms, and the gradients of the sum of coef * loss."""
        call, objective = _Call(linear, self.sizes), linear.objective
        buffer, sums, found = call.buffer(call.block), _Sums(linear, call, want), []
        for at in call.blocks(call.block):
            logits, h_BH = call.logits(buffer, at), call.hidden(at)
            part = logits.fill(h_BH, objective)
            if objective.needs_z_sum:
                # The uniform coefficient that goes with it needs s before the gradient.
                part = part._replace(s=logits.sums(part.m))
            s_B, divisor_B = logits.to_gradient(part, objective, with_sum=not objective.needs_z_sum)
            found.append(part._replace(s=s_B))
            sums.add(at, logits, h_BH, coef_T[at] / divisor_B)
        return call.together(found, objective), sums.grad_h, sums.grad_w

    def scaled(self, grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """A gradient times a scalar, in its memory if the dtype is the same."""
        return grad.mul_(factor).to(dtype)


class _Call:
    """Sizes and operands of a call."""

    def __init__(self, linear: Linear, sizes: Sizes) -> None:
        self._linear, self.dtype = linear, compute_dtype(linear.h_TH.dtype)
        self.softcap = linear.softcap
        self.vocab, hidden = linear.w_VH.shape
        device = linear.h_TH.device
        self.bytes = sizes.linear_bytes(hidden, device)
        self.block = sizes.linear_tokens(self.vocab, hidden, device, self.dtype.itemsize)
        self.tiles = Tiles(linear, self.dtype, sizes)
        self.local_T = linear.labels_T - linear.vocab_start

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
        return BlockLogits(buffer, self.local_T[at], self.tiles, self._linear.softcap)

    def together(self, parts: list[RowTerms], objective: Objective) -> RowTerms:
        """Terms of all tokens from those of the blocks; of no class where there is no block."""
        if not parts:
            empty_T = torch.full_like(self.local_T, -torch.inf, dtype=self.dtype)
            z_sum_T = torch.zeros_like(empty_T) if objective.needs_z_sum else None
            return RowTerms(empty_T, torch.zeros_like(empty_T), empty_T.clone(), z_sum_T)
        if len(parts) == 1:
            return parts[0]
        return RowTerms(*(None if x[0] is None else torch.cat(x) for x in zip(*parts, strict=True)))


class _Sums:
    """The two gradients, to which each block adds."""

    def __init__(self, linear: Linear, call: _Call, want: Wanted) -> None:
        self._want, self._num_tokens = want, linear.h_TH.shape[0]
        h_TH, w_VH = linear.h_TH, linear.w_VH
        self.grad_h = torch.zeros(h_TH.shape if want[0] else (0,), dtype=call.dtype, device=h_TH.device)
        self.grad_w = torch.empty(w_VH.shape if want[1] else (0,), dtype=call.dtype, device=h_TH.device)
        # The first block writes every entry; without any block zeros are right.
        if not h_TH.shape[0]:
            self.grad_w.zero_()

    def add(self, at: slice, logits: BlockLogits, h_BH: Tensor, factor_B: Tensor) -> None:
        """What a block adds, whose logits are a gradient but for the factor of each token."""
        want_h, want_w = self._want
        gh_BH = self.grad_h[at] if want_h else None
        first, last = at.start == 0, at.stop == self._num_tokens
        scaled_BH = h_BH * factor_B[:, None]
        logits.add_gradients(gh_BH, self.grad_w if want_w else None, scaled_BH, first=first, last=last)
        if gh_BH is not None:
            gh_BH.mul_(factor_B[:, None])


def _terms_by_tile(call: _Call, at: slice, objective: Objective) -> RowTerms:
    """Terms of a block of which no more than the logits of one vocabulary tile exist at a time."""
    h_BH, local_B, factor = call.hidden(at), call.local_T[at], call.softcap or 1.0
    buffer, found = call.new(h_BH.shape[0] * call.tiles.columns), None
    for tile, w_CH in call.tiles:
        z_BC = buffer[: h_BH.shape[0] * w_CH.shape[0]].view(-1, w_CH.shape[0])
        call.tiles.products.into(z_BC, h_BH, w_CH.t())
        if call.softcap:
            z_BC.div_(call.softcap).tanh_()
        column_B = local_B - tile.start
        owned_B = (column_B >= 0) & (column_B < w_CH.shape[0])
        target_B = z_BC.gather(1, torch.where(owned_B, column_B, 0)[:, None])[:, 0] * factor
        z_sum_B = z_BC.sum(-1) * factor if objective.needs_z_sum else None
        m_B = z_BC.amax(-1) * factor
        number_B = log2_exp(z_BC, factor, m_B, z_BC)
        s_B = without(number_B, z_BC.exp2_().sum(-1))
        part = RowTerms(m_B, s_B, torch.where(owned_B, target_B, -torch.inf), z_sum_B)
        found = part if found is None else combine(torch, found, part)
    assert found is not None
    return found
