"""Fused linear cross entropy of `torch:triton`: the vendor's matrix products around the kernels of rows.

For each chunk of tokens: logits (product 1, float32) and the kernel over them, which gives terms and E, the gradient by
the products (softcap's slope included); then grad_h = E @ W (product 2) and grad_w += E.T @ h (product 3), accumulated
in float32. Where the products want 16-bit operands, E has a buffer of its own, and logits exist for a part of the chunk
at a time: product 3 wants many tokens, logits are twice as large. Else E is written over them.
"""

# T = tokens, C = tokens of a chunk, B = those of them whose logits exist at a time, H = hidden,
# V = vocabulary (of this rank)

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from loss_core.row_terms import Coefficients, Objective, RowTerms, Sums
from loss_core_torch import compat
from loss_core_torch.kernels import Into, Linear, LinearGrads, Rows, Wanted
from loss_core_torch.kernels.gpu import kernels, rows, sizes
from loss_core_torch.kernels.gpu.launch import Launcher
from loss_core_torch.kernels.gpu.products import multiply
from loss_core_torch.kernels.terms import joined_terms
from loss_core_torch.tracing import compute_dtype

# The largest coefficient has this exponent, or one more; see `_Chunks.exponent`.
_FLOAT16_EXPONENT = 15


def terms(launcher: Launcher, linear: Linear, sums: Sums, keep_logits: bool) -> tuple[RowTerms, Tensor]:
    """See `KernelSet.linear_terms`."""
    chunks = _Chunks(launcher, linear, Wanted(keep_logits, keep_logits), together=keep_logits)
    logits = chunks.new_logits()
    found = []
    with compat.full_float32_products():
        for at in chunks:
            z_BV = logits[: at.stop - at.start]
            chunks.make_logits(at, z_BV)
            found.append(rows.terms(launcher, chunks.rows(z_BV, at), sums))
    fits = keep_logits and len(logits) == len(linear.h_TH)
    return joined_terms(found), logits if fits else logits.new_empty(0)


def grads(
    launcher: Launcher, linear: Linear, terms: RowTerms, coefficients: Coefficients, want: Wanted, logits: Tensor
) -> LinearGrads:
    """See `KernelSet.linear_grads`. Coefficients of 0 give a gradient of 0, whatever the row holds."""
    kept = logits.numel() > 0
    chunks = _Chunks(launcher, linear, want, together=kept)
    exponent = chunks.exponent(*coefficients)
    coefficients = Coefficients(*(_times_power(c_T, exponent) for c_T in coefficients))
    keep_T = rows.with_effect(coefficients)
    found = _Grads(chunks, want)
    logits = logits if kept else chunks.new_logits()
    e = chunks.new_grad(logits)
    with compat.full_float32_products():
        for chunk in chunks:
            e_CV = e[: chunk.stop - chunk.start]
            for at, e_BV in chunks.parts(chunk, e_CV):
                z_BV = logits[: len(e_BV)]
                if not kept:
                    chunks.make_logits(at, z_BV)
                block = chunks.rows(z_BV, at)._replace(keep_T=keep_T[at])
                terms_B = RowTerms(terms.m[at], terms.s[at], terms.t[at])
                coefficients_B = Coefficients(*(None if x_T is None else x_T[at] for x_T in coefficients))
                rows.grad(launcher, block, terms_B, coefficients_B, Into(e_BV))
            found.add(chunk, e_CV)
    return found.without(exponent)


def terms_and_grads(
    launcher: Launcher, linear: Linear, coef_T: Tensor, objective: Objective, want: Wanted
) -> tuple[RowTerms, LinearGrads]:
    """See `KernelSet.linear_terms_and_grads`. A coefficient of 0 gives a gradient of 0, whatever the row holds."""
    chunks = _Chunks(launcher, linear, want)
    exponent = chunks.exponent(coef_T, room=math.ceil(math.log2(1.0 + 2.0**15 * objective.z_loss)))
    coef_T = coef_T if exponent is None else torch.ldexp(coef_T, exponent)
    found, found_terms = _Grads(chunks, want), []
    logits = chunks.new_logits()
    e = chunks.new_grad(logits)
    with compat.full_float32_products():
        for chunk in chunks:
            e_CV = e[: chunk.stop - chunk.start]
            for at, e_BV in chunks.parts(chunk, e_CV):
                z_BV = logits[: len(e_BV)]
                chunks.make_logits(at, z_BV)
                terms_B, _ = rows.terms_and_grad(launcher, chunks.rows(z_BV, at), coef_T[at], objective, e_BV)
                found_terms.append(terms_B)
            found.add(chunk, e_CV)
    return joined_terms(found_terms), found.without(exponent)


def scaled(launcher: Launcher, grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """See `KernelSet.scaled`. In one visit of memory: mul_ and a cast take two and a half."""
    if dtype == grad.dtype or not grad.numel():
        return grad.mul_(factor).to(dtype)
    out = torch.empty_like(grad, dtype=dtype)
    size = sizes.ELEMENTWISE
    launcher.start(
        kernels.scaled_kernel, (-(-grad.numel() // size.block_v),), out, grad, factor, grad.numel(), size=size,
        BLOCK=size.block_v,
    )  # fmt: skip
    return out


class _Chunks:
    """The tokens chunk by chunk, and operands as the products take them.

    Args:
        want: which gradients will be made.
        together: the logits of a whole chunk will be held.
    """

    def __init__(self, launcher: Launcher, linear: Linear, want: Wanted, together: bool = False) -> None:
        self.linear = linear
        self.dtype = compute_dtype(linear.h_TH.dtype)
        self.operand = launcher.operand_dtype(linear.product_dtype, linear.h_TH.device)
        self.w_VH = linear.w_VH.to(linear.product_dtype).to(self.operand)
        self.num_tokens, self.vocab = len(linear.h_TH), len(self.w_VH)
        grad_bytes = self.operand.itemsize if any(want) else 0
        rounded = want.weight and linear.w_VH.dtype != self.dtype
        rounded_bytes = linear.w_VH.numel() * linear.w_VH.itemsize if rounded else 0
        self.tokens, self.logits_tokens = launcher.chunk_tokens(
            self.num_tokens, self.vocab, self.dtype.itemsize, grad_bytes, rounded_bytes, together
        )

    def __iter__(self) -> Iterator[slice]:
        """Tokens of each chunk; a single empty one if there are none."""
        return _slices(0, self.num_tokens, self.tokens)

    def parts(self, chunk: slice, e_CV: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Tokens of a chunk whose logits exist at a time, and where their gradient goes."""
        for at in _slices(chunk.start, chunk.stop, self.logits_tokens):
            yield at, e_CV[at.start - chunk.start : at.stop - chunk.start]

    def hidden(self, at: slice) -> Tensor:
        """Hidden states of a chunk."""
        return self.linear.h_TH[at].to(self.linear.product_dtype).to(self.operand)

    def make_logits(self, at: slice, z_BV: Tensor) -> None:
        """h @ W.T + b of a chunk."""
        multiply(self.hidden(at), self.w_VH.t(), z_BV)
        if self.linear.bias_V is not None:
            z_BV += self.linear.bias_V.to(z_BV.dtype)

    def rows(self, z_BV: Tensor, at: slice) -> Rows:
        """Logits of a chunk, and what is known of them."""
        labels_T, inverse_T = self.linear.labels_T, self.linear.inverse_temperature_T
        inverse_B = None if inverse_T is None else inverse_T[at]
        return Rows(z_BV, labels_T[at], None, self.linear.vocab_start, self.linear.softcap, inverse_B)

    def new_logits(self) -> Tensor:
        """Memory for logits."""
        return torch.empty((self.logits_tokens, self.vocab), dtype=self.dtype, device=self.linear.h_TH.device)

    def new_grad(self, logits: Tensor) -> Tensor:
        """Memory for the gradient by the logits of a chunk: theirs, where the dtype is the same."""
        if self.operand == self.dtype:
            return logits
        return logits.new_empty((self.tokens, self.vocab), dtype=self.operand)

    def exponent(self, *factors: Tensor | None, room: int = 0) -> Tensor | None:
        """n of the power 2^n by which to multiply coefficients so that the operands can hold the gradient.

        A mean over 8192 tokens would put every probability below 2e-4 beneath what float16 can hold. The largest
        factor becomes at least 2^14 (float16 ends at 2^16): then a probability of 2^-28 is still a normal number.

        Args:
            factors: [T] each; of the exponentials, of a row's loss.
            room: binary digits by which the gradient may be larger than they are: with a z-loss l those of
                1 + 2 l 2^14, so that a log-sum-exp of 2^14 does not reach beyond the end either.
        """
        if self.operand != torch.float16 or self.num_tokens == 0:
            return None
        # A NaN is the mark of one token; it must not reach the others.
        largest = [factor_T.nan_to_num(nan=0.0).abs().amax() for factor_T in factors if factor_T is not None]
        _, exponent = torch.frexp(torch.stack(largest).amax())
        return _FLOAT16_EXPONENT - room - exponent.clamp(-100, 100)


class _Grads:
    """The gradients by hidden states, weight and bias, as sums over chunks; empty where they are not wanted."""

    def __init__(self, chunks: _Chunks, want: Wanted) -> None:
        self._chunks, self._want = chunks, want
        like: dict[str, Any] = {"dtype": chunks.dtype, "device": chunks.linear.h_TH.device}
        # Every row and every entry is written below, unless there are none to multiply.
        new = torch.empty if chunks.num_tokens and chunks.vocab else torch.zeros
        self._grads = LinearGrads(
            new(chunks.linear.h_TH.shape if want.hidden else (0,), **like),
            new(chunks.linear.w_VH.shape if want.weight else (0,), **like),
            torch.zeros(chunks.vocab if want.bias else 0, **like),
        )

    def add(self, chunk: slice, e_CV: Tensor) -> None:
        """Add the products of a chunk."""
        if e_CV.numel() == 0:
            return
        by_h_TH, by_w_VH, by_b_V = self._grads
        if self._want.hidden:
            multiply(e_CV, self._chunks.w_VH, by_h_TH[chunk])
        if self._want.weight:
            multiply(e_CV.t(), self._chunks.hidden(chunk), by_w_VH, add=chunk.start > 0)
        if self._want.bias:
            by_b_V += e_CV.sum(0, dtype=by_b_V.dtype)

    def without(self, exponent: Tensor | None) -> LinearGrads:
        """The sums, without the power of two of the coefficients; in place."""
        if exponent is None:
            return self._grads
        factor = torch.ldexp(torch.ones_like(exponent, dtype=self._chunks.dtype), -exponent)
        return LinearGrads(*(grad.mul_(factor) for grad in self._grads))


def _times_power(x_T: Tensor | None, exponent: Tensor | None) -> Tensor | None:
    return x_T if x_T is None or exponent is None else torch.ldexp(x_T, exponent)


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """Of at most `step`; a single empty one if there is nothing."""
    for at in range(start, max(stop, start + 1), max(step, 1)):
        yield slice(at, min(at + step, stop))
