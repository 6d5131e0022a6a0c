"""Terms and gradients of a fused loss of `torch:triton` in one visit: three products, chunks of tokens.

For each chunk: logits (product 1, float32) and the kernel over them, which gives terms and E, the gradient by the
products (softcap's slope included); then grad_h = E @ W (product 2) and grad_w += E.T @ h (product 3), accumulated in
float32. Where the products want 16-bit operands, E has a buffer of its own, and logits exist for a part of the chunk at
a time: product 3 wants many tokens, logits are twice as large. Else E is written over them.
"""

# T = tokens, C = tokens of a chunk, B = those of them whose logits exist at a time, H = hidden,
# V = vocabulary (of this rank)

from __future__ import annotations

import torch
from torch import Tensor

from loss_core.row_terms import Objective, RowTerms
from loss_core_torch import precision
from loss_core_torch.kernels import Linear, LinearGrads, Wanted
from loss_core_torch.kernels.gpu import kernels, sizes
from loss_core_torch.kernels.gpu.launch import Launcher
from loss_core_torch.kernels.gpu.operands import Operands, slices
from loss_core_torch.kernels.gpu.products import multiply
from loss_core_torch.kernels.gpu.rows import RowKernels
from loss_core_torch.kernels.terms import joined_terms


class LinearKernels(RowKernels):
    """The methods of a `KernelSet` that make a fused loss and its gradients in one visit."""

    def linear_terms_and_grads(
        self, linear: Linear, coef_T: Tensor, objective: Objective, want: Wanted
    ) -> tuple[RowTerms, LinearGrads]:
        """See `KernelSet.linear_terms_and_grads`. A coefficient of 0 gives a gradient of 0, whatever the row holds."""
        operands = Operands(self._launcher, linear)
        exponent = operands.exponent(coef_T, room=objective.headroom)
        coef_T = coef_T if exponent is None else torch.ldexp(coef_T, exponent)
        chunk_tokens, logits_tokens = _sizes(self._launcher, operands, want)
        logits = operands.new(logits_tokens, operands.vocab)
        e = logits
        if operands.operand != operands.dtype:
            e = operands.new(chunk_tokens, operands.vocab, dtype=operands.operand)
        w_VH, found, found_terms = operands.weight(), _new_grads(operands, want), []
        with precision.full_float32_products():
            for chunk in slices(0, operands.num_tokens, chunk_tokens):
                e_CV = e[: chunk.stop - chunk.start]
                for at in slices(chunk.start, chunk.stop, logits_tokens):
                    z_BV = logits[: at.stop - at.start]
                    block = operands.make_logits(z_BV, operands.part(at), w_VH)
                    e_BV = e_CV[at.start - chunk.start : at.stop - chunk.start]
                    terms_B, *_ = self.row_terms_and_grad(block, coef_T[at], objective.of_rows(at), e_BV)
                    found_terms.append(terms_B)
                if e_CV.numel():
                    _add(found, want, operands, chunk, e_CV, w_VH)
        if exponent is not None:
            found = LinearGrads(*(grad.mul_(operands.undone(exponent)) for grad in found))
        return joined_terms(found_terms), found

    def scaled(self, grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """See `KernelSet.scaled`. In one visit of memory: mul_ and a cast take two and a half."""
        if dtype == grad.dtype or not grad.numel():
            return grad.mul_(factor).to(dtype)
        out = torch.empty_like(grad, dtype=dtype)
        write_scaled(self._launcher, out, grad, factor)
        return out


def write_scaled(launcher: Launcher, out: Tensor, x: Tensor, factor: Tensor) -> None:
    """out = x * factor, rounded once; both contiguous, factor a scalar."""
    size = sizes.ELEMENTWISE
    launcher.start(
        kernels.scaled_kernel, (-(-x.numel() // size.block_v),), out, x, factor, x.numel(), size=size,
        BLOCK=size.block_v,
    )  # fmt: skip


def _sizes(launcher: Launcher, operands: Operands, want: Wanted) -> tuple[int, int]:
    """(tokens of a chunk, those of them whose logits exist at a time)."""
    linear, w_VH = operands.linear, operands.linear.w_VH
    rounded = want.weight and w_VH.dtype != operands.dtype
    rounded_bytes = w_VH.numel() * w_VH.itemsize if rounded else 0
    chunk_tokens, logits_tokens = launcher.chunk_tokens(
        operands.num_tokens, operands.vocab, operands.dtype.itemsize, operands.operand.itemsize, rounded_bytes
    )
    return linear.block(chunk_tokens), linear.block(logits_tokens)


def _new_grads(operands: Operands, want: Wanted) -> LinearGrads:
    """Memory for the gradients, as sums over chunks; empty where they are not wanted."""
    h_TH, w_VH = operands.linear.h_TH, operands.linear.w_VH
    return LinearGrads(
        operands.new(*(h_TH.shape if want.hidden else (0,))),
        operands.new(*(w_VH.shape if want.weight else (0,))),
        operands.new(operands.vocab if want.bias else 0).zero_(),
    )


def _add(grads: LinearGrads, want: Wanted, operands: Operands, chunk: slice, e_CV: Tensor, w_VH: Tensor) -> None:
    """Add the products of a chunk."""
    by_h_TH, by_w_VH, by_b_V = grads
    if want.hidden:
        multiply(e_CV, w_VH, by_h_TH[chunk])
    if want.weight:
        multiply(e_CV.t(), operands.hidden(chunk), by_w_VH, add=chunk.start > 0)
    if want.bias:
        by_b_V += e_CV.sum(0, dtype=by_b_V.dtype)
