"""Fused linear cross entropy of `torch:triton` over a part of the vocabulary: statistics, then gradients.

See `eager_linear_parallel` for the functions, `triton_linear` for the products.
"""

# T = tokens, B = tokens of a chunk, H = hidden, V = vocabulary of this rank

from __future__ import annotations

import torch
from torch import Tensor

from loss_core_torch import eager_linear, triton_launch, triton_linear
from loss_core_torch.values import compute_dtype


def linear_cross_entropy_stats(
    h_TH: Tensor,
    w_VH: Tensor,
    labels_T: Tensor,
    keep_T: Tensor,
    vocab_start: int,
    softcap: float,
    product_dtype: torch.dtype,
    skip_ignored: bool | None,
    num_valid: int | None,
    keep_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row state of this rank's part; see `eager_linear_parallel.linear_cross_entropy_stats`."""
    places_N, _ = eager_linear.tokens_in_products(keep_T, skip_ignored, num_valid)
    if places_N is None:
        return _stats(h_TH, w_VH, labels_T, keep_T, vocab_start, softcap, product_dtype, keep_logits)
    # The tokens that take part, as if there were no others.
    some = (x.index_select(0, places_N) for x in (h_TH, labels_T, keep_T))
    h_NH, labels_N, keep_N = some
    *parts, logits = _stats(h_NH, w_VH, labels_N, keep_N, vocab_start, softcap, product_dtype, keep_logits)
    state = triton_launch.empty_state(keep_T.shape, parts[0].dtype, keep_T.device)
    m_T, s_T, t_T = (all_T.index_copy_(0, places_N, part_N) for all_T, part_N in zip(state, parts, strict=True))
    return m_T, s_T, t_T, logits


def _stats(
    h_TH: Tensor,
    w_VH: Tensor,
    labels_T: Tensor,
    keep_T: Tensor,
    vocab_start: int,
    softcap: float,
    product_dtype: torch.dtype,
    keep_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_tokens, vocab = keep_T.numel(), w_VH.shape[0]
    m_T, s_T, t_T = triton_launch.empty_state(keep_T.shape, compute_dtype(h_TH.dtype), h_TH.device)
    logits = m_T.new_empty(0)
    if num_tokens == 0 or vocab == 0:
        return m_T, s_T, t_T, logits
    w_VH, rows = _prepared(h_TH, w_VH, num_tokens, product_dtype)
    logits_buffer = m_T.new_empty((min(rows, num_tokens), vocab))
    for start in range(0, num_tokens, rows):
        at = slice(start, min(start + rows, num_tokens))
        z_BV = logits_buffer[: at.stop - at.start]
        triton_linear._multiply(_hidden(h_TH, keep_T, at, product_dtype, w_VH.dtype), w_VH.t(), z_BV)
        m_T[at], s_T[at], t_T[at] = triton_launch.cross_entropy_stats(z_BV, labels_T[at], vocab_start, softcap)
    return m_T, s_T, t_T, logits_buffer if keep_logits and rows >= num_tokens else logits


def linear_cross_entropy_grads(
    h_TH: Tensor,
    w_VH: Tensor,
    labels_T: Tensor,
    keep_T: Tensor,
    vocab_start: int,
    m_T: Tensor,
    s_T: Tensor,
    coef_T: Tensor,
    softcap: float,
    product_dtype: torch.dtype,
    want_grads: list[bool],
    skip_ignored: bool | None,
    num_valid: int | None,
    logits: Tensor,
) -> tuple[Tensor, Tensor]:
    """This rank's part of the gradients; see `eager_linear_parallel.linear_cross_entropy_grads`."""
    places_N, _ = eager_linear.tokens_in_products(keep_T, skip_ignored, num_valid)
    settings = (softcap, product_dtype, want_grads, logits)
    if places_N is None:
        return _grads(h_TH, w_VH, labels_T, keep_T, vocab_start, m_T, s_T, coef_T, *settings)
    some = (x.index_select(0, places_N) for x in (h_TH, labels_T, keep_T, m_T, s_T, coef_T))
    h_NH, labels_N, keep_N, m_N, s_N, coef_N = some
    grad_NH, grad_w = _grads(h_NH, w_VH, labels_N, keep_N, vocab_start, m_N, s_N, coef_N, *settings)
    if not want_grads[0]:
        return grad_NH, grad_w
    return m_T.new_zeros(h_TH.shape).index_copy_(0, places_N, grad_NH), grad_w


def _grads(
    h_TH: Tensor,
    w_VH: Tensor,
    labels_T: Tensor,
    keep_T: Tensor,
    vocab_start: int,
    m_T: Tensor,
    s_T: Tensor,
    coef_T: Tensor,
    softcap: float,
    product_dtype: torch.dtype,
    want_grads: list[bool],
    logits: Tensor,
) -> tuple[Tensor, Tensor]:
    want_h, want_w = want_grads
    num_tokens, vocab = keep_T.numel(), w_VH.shape[0]
    grad_h = m_T.new_zeros(h_TH.shape if want_h else (0,))
    grad_w = m_T.new_zeros(w_VH.shape if want_w else (0,))
    if num_tokens == 0 or vocab == 0:
        return grad_h, grad_w
    w_VH, rows = _prepared(h_TH, w_VH, num_tokens, product_dtype)
    unscale = None
    if w_VH.dtype == torch.float16:
        coef_T, unscale = triton_linear._near_one(coef_T)
    logits_buffer = logits if logits.numel() else m_T.new_empty((min(rows, num_tokens), vocab))
    own_buffer = w_VH.dtype != m_T.dtype
    grad_buffer = torch.empty_like(logits_buffer, dtype=w_VH.dtype) if own_buffer else logits_buffer
    for start in range(0, num_tokens, rows):
        at = slice(start, min(start + rows, num_tokens))
        h_BH = _hidden(h_TH, keep_T, at, product_dtype, w_VH.dtype)
        z_BV, e_BV = logits_buffer[: h_BH.shape[0]], grad_buffer[: h_BH.shape[0]]
        if not logits.numel():
            triton_linear._multiply(h_BH, w_VH.t(), z_BV)
        triton_launch.write_grad(
            e_BV, z_BV, labels_T[at], vocab_start, keep_T[at], m_T[at], s_T[at], coef_T[at], None, softcap
        )
        if want_h:
            triton_linear._multiply(e_BV, w_VH, grad_h[at])
        if want_w:
            triton_linear._multiply(e_BV.t(), h_BH, grad_w, add=start > 0)
    if unscale is not None:
        grad_h, grad_w = grad_h.mul_(unscale), grad_w.mul_(unscale)
    return grad_h, grad_w


def _prepared(h_TH: Tensor, w_VH: Tensor, num_tokens: int, product_dtype: torch.dtype) -> tuple[Tensor, int]:
    """The weight as the products take it, and the tokens of a chunk."""
    operand, dtype = triton_linear.operand_dtype(product_dtype, h_TH.device), compute_dtype(h_TH.dtype)
    bytes_per_logit = dtype.itemsize + (operand != dtype) * operand.itemsize
    rows = triton_linear.chunk_tokens(num_tokens, w_VH.shape[0], bytes_per_logit)
    return w_VH.to(product_dtype).to(operand), rows


def _hidden(h_TH: Tensor, keep_T: Tensor, at: slice, product_dtype: torch.dtype, operand: torch.dtype) -> Tensor:
    # What an ignored token holds must not reach a product, not even times 0.
    return torch.where(keep_T[at][:, None], h_TH[at].to(product_dtype), 0.0).to(operand)
