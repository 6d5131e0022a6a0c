"""Fused linear cross entropy of `torch:triton`: the vendor's matrix products around the kernels of rows.

For each chunk of tokens: logits (product 1, float32), the kernel over them, which gives terms and E, the gradient by
the products (softcap's slope included), then grad_h = E @ W (product 2) and grad_w += E.T @ h (product 3), accumulated
in float32. E is written over the logits where the products want float32 operands, and into a buffer of half the size
where they want 16-bit ones.
"""

# T = tokens, B = tokens of a chunk, H = hidden, V = vocabulary (of this rank)

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from loss_core.row_terms import Coefficients, RowTerms, cross_entropy_coefficients
from loss_core_torch import compat
from loss_core_torch.kernels import Into, Linear, Rows, Wanted
from loss_core_torch.kernels.gpu import rows
from loss_core_torch.kernels.gpu.launch import Launcher
from loss_core_torch.kernels.gpu.products import multiply
from loss_core_torch.tracing import compute_dtype


def terms(launcher: Launcher, linear: Linear, keep_logits: bool) -> tuple[RowTerms, Tensor]:
    """See `KernelSet.linear_terms`."""
    chunks = _Chunks(launcher, linear, with_grad=keep_logits)
    logits = chunks.new_logits()
    found = []
    with compat.full_float32_products():
        for at in chunks:
            z_BV = logits[: at.stop - at.start]
            multiply(chunks.hidden(at), chunks.w_VH.t(), z_BV)
            found.append(rows.terms(launcher, chunks.rows(z_BV, at), linear.objective, linear.softcap))
    fits = keep_logits and len(logits) == len(linear.h_TH)
    return _joined(found), logits if fits else logits.new_empty(0)


def grads(
    launcher: Launcher, linear: Linear, terms: RowTerms, upstream_T: Tensor, want: Wanted, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """See `KernelSet.linear_grads`. An upstream gradient of 0 gives a gradient of 0, whatever the row holds."""
    chunks = _Chunks(launcher, linear, with_grad=True)
    upstream_T, unscale = chunks.representable(upstream_T)
    keep_T = rows.with_effect(None, upstream_T)
    coefficients = cross_entropy_coefficients(torch, terms, upstream_T, linear.objective)
    found = _Grads(chunks, want)
    kept = logits.numel() > 0
    logits = logits if kept else chunks.new_logits()
    e = chunks.new_grad(logits)
    with compat.full_float32_products():
        for at in chunks:
            h_BH, z_BV, e_BV = chunks.hidden(at), logits[: at.stop - at.start], e[: at.stop - at.start]
            if not kept:
                multiply(h_BH, chunks.w_VH.t(), z_BV)
            block = chunks.rows(z_BV, at)._replace(keep_T=keep_T[at])
            terms_B = RowTerms(terms.m[at], terms.s[at], terms.t[at])
            coefficients_B = Coefficients(*(None if x_T is None else x_T[at] for x_T in coefficients))
            rows.grad(launcher, block, terms_B, coefficients_B, Into(e_BV), linear.softcap)
            found.add(at, e_BV, h_BH)
    return found.times(unscale)


def terms_and_grads(
    launcher: Launcher, linear: Linear, coef_T: Tensor, want: Wanted
) -> tuple[RowTerms, Tensor, Tensor]:
    """See `KernelSet.linear_terms_and_grads`. A coefficient of 0 gives a gradient of 0, whatever the row holds."""
    chunks = _Chunks(launcher, linear, with_grad=True)
    coef_T, unscale = chunks.representable(coef_T)
    found, found_terms = _Grads(chunks, want), []
    logits = chunks.new_logits()
    e = chunks.new_grad(logits)
    with compat.full_float32_products():
        for at in chunks:
            h_BH, z_BV, e_BV = chunks.hidden(at), logits[: at.stop - at.start], e[: at.stop - at.start]
            multiply(h_BH, chunks.w_VH.t(), z_BV)
            terms_B, _ = rows.terms_and_grad(
                launcher, chunks.rows(z_BV, at), coef_T[at], linear.objective, e_BV, linear.softcap
            )
            found_terms.append(terms_B)
            found.add(at, e_BV, h_BH)
    return _joined(found_terms), *found.times(unscale)


class _Chunks:
    """The tokens chunk by chunk, and operands as the products take them.

    Args:
        with_grad: a gradient by the logits will be held beside them.
    """

    def __init__(self, launcher: Launcher, linear: Linear, with_grad: bool) -> None:
        self.linear = linear
        self.dtype = compute_dtype(linear.h_TH.dtype)
        self.operand = launcher.operand_dtype(linear.product_dtype, linear.h_TH.device)
        self.w_VH = linear.w_VH.to(linear.product_dtype).to(self.operand)
        self.num_tokens, self.vocab = len(linear.h_TH), len(self.w_VH)
        beside = self.operand.itemsize if with_grad and self.operand != self.dtype else 0
        tokens = launcher.chunk_tokens(self.num_tokens, self.vocab, self.dtype.itemsize + beside)
        self.tokens = min(tokens, self.num_tokens)

    def __iter__(self) -> Iterator[slice]:
        """Tokens of each chunk; a single empty one if there are none."""
        for start in range(0, max(self.num_tokens, 1), max(self.tokens, 1)):
            yield slice(start, min(start + self.tokens, self.num_tokens))

    def hidden(self, at: slice) -> Tensor:
        """Hidden states of a chunk."""
        return self.linear.h_TH[at].to(self.linear.product_dtype).to(self.operand)

    def rows(self, z_BV: Tensor, at: slice) -> Rows:
        """Logits of a chunk, and what is known of them."""
        return Rows(z_BV, self.linear.labels_T[at], None, self.linear.vocab_start)

    def new_logits(self) -> Tensor:
        """Memory for the logits of a chunk."""
        return torch.empty((self.tokens, self.vocab), dtype=self.dtype, device=self.linear.h_TH.device)

    def new_grad(self, logits: Tensor) -> Tensor:
        """Memory for the gradient by the logits of a chunk: theirs, where the dtype is the same."""
        return logits if self.operand == self.dtype else torch.empty_like(logits, dtype=self.operand)

    def representable(self, coef_T: Tensor) -> tuple[Tensor, Tensor | None]:
        """Coefficients whose gradient the operands can hold, and the power of two by which to multiply what follows.

        A mean over 8192 tokens would put every probability below 2e-4 beneath what float16 can hold.
        """
        if self.operand != torch.float16 or coef_T.numel() == 0:
            return coef_T, None
        # A NaN is the mark of one token; it must not reach the others.
        _, exponent = torch.frexp(coef_T.nan_to_num(nan=0.0).abs().amax())
        exponent = exponent.clamp(-100, 100)
        one = torch.ones_like(exponent, dtype=coef_T.dtype)
        return torch.ldexp(coef_T, -exponent), torch.ldexp(one, exponent)


class _Grads:
    """The gradients by hidden states and weight, as sums over chunks; empty where they are not wanted."""

    def __init__(self, chunks: _Chunks, want: Wanted) -> None:
        self._chunks, self._want = chunks, want
        shapes = (chunks.linear.h_TH.shape, chunks.linear.w_VH.shape)
        # Every row and every entry is written below, unless there are none to multiply.
        new = torch.empty if chunks.num_tokens and chunks.vocab else torch.zeros
        self._h, self._w = (
            new(shape if wanted else (0,), dtype=chunks.dtype, device=chunks.linear.h_TH.device)
            for shape, wanted in zip(shapes, want, strict=True)
        )

    def add(self, at: slice, e_BV: Tensor, h_BH: Tensor) -> None:
        """Add the products of a chunk."""
        if e_BV.numel() == 0:
            return
        if self._want[0]:
            multiply(e_BV, self._chunks.w_VH, self._h[at])
        if self._want[1]:
            multiply(e_BV.t(), h_BH, self._w, add=at.start > 0)

    def times(self, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sums, multiplied in place."""
        return (self._h, self._w) if factor is None else (self._h.mul_(factor), self._w.mul_(factor))


def _joined(chunks: Sequence[RowTerms]) -> RowTerms:
    """Terms of all tokens."""
    if len(chunks) == 1:
        return chunks[0]
    return RowTerms(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*chunks, strict=True)))
