"""Fused linear cross entropy over a part of the vocabulary, in plain PyTorch operations: statistics, then gradients.

The gradient of a row needs its sum over the whole vocabulary, which is known only after the ranks have met. Where all
tokens fit the budget of one block, their logits wait for it (three products in all); else they are computed again.
"""

# T = tokens, B = tokens of a block, H = hidden, V = vocabulary of this rank

from __future__ import annotations

import torch
from torch import Tensor

from loss_core_torch import eager_linear
from loss_core_torch.block_logits import BlockLogits, Tiles
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
    """Row state (m, s, t) of softcap(h @ W.T) over this rank's part of the vocabulary.

    Args:
        labels_T: int64, counted over the whole vocabulary.
        keep_T: bool; whether tokens with False take part in products, as zeros: see `eager_linear.tokens_in_products`.
        vocab_start: first class of this part.
        skip_ignored, num_valid: as there.
        keep_logits: whether `linear_cross_entropy_grads` may follow.
    Returns:
        m, s, t: [T] each in the dtype of the arithmetic, the identity of `row_stats.combine` where a token takes part
        in no product; and what `linear_cross_entropy_grads` takes as `logits`, empty where they did not fit.
    """
    dtype, vocab = compute_dtype(h_TH.dtype), w_VH.shape[0]
    m_T = torch.full(keep_T.shape, -torch.inf, dtype=dtype, device=h_TH.device)
    s_T, t_T = torch.zeros_like(m_T), m_T.clone()
    blocks, all_count = _plan(keep_T, w_VH, dtype, skip_ignored, num_valid)
    waits = keep_logits and len(blocks) == 1
    if not blocks or vocab == 0:
        return m_T, s_T, t_T, m_T.new_empty(0)
    buffer = m_T.new_empty(max(map(eager_linear.length, blocks)) * vocab)
    tiles = Tiles(w_VH, product_dtype, dtype)
    for at in blocks:
        h_BH = _hidden(h_TH, keep_T, at, all_count, product_dtype, dtype)
        logits = BlockLogits(buffer, h_BH.shape[0], tiles, softcap)
        m_B = logits.fill(h_BH)
        owned_B, column_B = _column(labels_T[at], keep_T[at], vocab_start, vocab)
        m_T[at] = m_B
        t_T[at] = torch.where(owned_B, logits.at(logits.places(column_B)), -torch.inf)
        s_T[at] = logits.sums(m_B)
    return m_T, s_T, t_T, buffer if waits else buffer.new_empty(0)


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
    """This rank's part of the gradients of sum(coef * loss).

    Args:
        m_T, s_T: row state over the whole vocabulary.
        coef_T: factor of each token's loss in the objective.
        logits: of `linear_cross_entropy_stats`, overwritten; empty to compute them again.
    Returns:
        grad_h, to be summed over the ranks, and grad_w, in the dtype of the arithmetic; one that is not wanted is
        empty.
    """
    want_h, want_w = want_grads
    dtype, vocab = m_T.dtype, w_VH.shape[0]
    grad_h = m_T.new_zeros(h_TH.shape if want_h else (0,))
    grad_w = m_T.new_zeros(w_VH.shape if want_w else (0,))
    blocks, all_count = _plan(keep_T, w_VH, dtype, skip_ignored, num_valid)
    if not blocks or vocab == 0:
        return grad_h, grad_w
    rows = max(map(eager_linear.length, blocks))
    buffer = logits if logits.numel() else m_T.new_empty(rows * vocab)
    tiles = Tiles(w_VH, product_dtype, dtype)
    for number, at in enumerate(blocks):
        h_BH = _hidden(h_TH, keep_T, at, all_count, product_dtype, dtype)
        of_block = BlockLogits(buffer, h_BH.shape[0], tiles, softcap)
        if not logits.numel():
            of_block.fill(h_BH)
        owned_B, column_B = _column(labels_T[at], keep_T[at], vocab_start, vocab)
        _, power_B = of_block.to_gradient(m_T[at], of_block.places(column_B), owned_B, s_T[at])
        factor_B1 = (torch.where(keep_T[at], coef_T[at], 0.0) / power_B)[:, None]
        gh_BH = torch.zeros_like(h_BH) if want_h else None
        last = number == len(blocks) - 1
        of_block.add_gradients(gh_BH, grad_w if want_w else None, h_BH * factor_B1, first=number == 0, last=last)
        if gh_BH is not None:
            grad_h[at] = gh_BH.mul_(factor_B1)
    return grad_h, grad_w


def _plan(
    keep_T: Tensor, w_VH: Tensor, dtype: torch.dtype, skip_ignored: bool | None, num_valid: int | None
) -> tuple[list[slice | Tensor], bool]:
    """Blocks of tokens, one alone where its logits fit the budget, and whether all of these tokens count."""
    device = keep_T.device
    places_N, all_count = eager_linear.tokens_in_products(keep_T, skip_ignored, num_valid)
    num_tokens = keep_T.numel() if places_N is None else places_N.numel()
    vocab, hidden = w_VH.shape
    block = eager_linear.block_tokens(vocab, hidden, device, dtype.itemsize)
    if num_tokens * vocab * dtype.itemsize <= eager_linear.logits_bytes(hidden, device):
        block = max(block, num_tokens)
    return list(eager_linear.token_blocks(keep_T.numel(), places_N, block, block)), all_count


def _hidden(
    h_TH: Tensor,
    keep_T: Tensor,
    at: slice | Tensor,
    all_count: bool,
    product_dtype: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    h_BH = h_TH[at].to(product_dtype).to(dtype)
    # What an ignored token holds must not reach a product, not even times 0.
    return h_BH if all_count else torch.where(keep_T[at][:, None], h_BH, 0.0)


def _column(labels_B: Tensor, keep_B: Tensor, vocab_start: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Which tokens have their label in this part, and the label's column there."""
    local_B = labels_B - vocab_start
    owned_B = keep_B & (local_B >= 0) & (local_B < vocab)
    return owned_B, torch.where(owned_B, local_B, 0)
