"""Cross entropy over logits in plain PyTorch operations, block of rows by block of rows, on any torch device.

Arithmetic is float32, or float64 for float64 logits. The formulas stand in `loss_core.oracle`, the row state in
`loss_core.row_stats`, the blocks in `row_blocks`.
"""

# T = tokens, B = rows of a block, V = vocabulary (of this rank)

from __future__ import annotations

import math

import torch
from torch import Tensor

from loss_core import row_stats
from loss_core_torch import huge_pages
from loss_core_torch.opaque import opaque, untraced
from loss_core_torch.row_blocks import (
    Buffer,
    Gathered,
    block_rows,
    counted_places,
    log2_exp,
    row_blocks,
    some_ignored,
    widened,
    without,
)
from loss_core_torch.values import compute_dtype


def _row_max(z_BV: Tensor) -> Tensor:
    return z_BV.amax(-1)


def _rows(logits: Tensor, labels_T: Tensor) -> int:
    return min(block_rows(logits.shape[-1], logits.device), max(labels_T.numel(), 1))


def _fake_stats(logits: Tensor, labels_T: Tensor, vocab_start: int) -> tuple[Tensor, Tensor, Tensor]:
    stat = logits.new_empty(labels_T.shape, dtype=compute_dtype(logits.dtype))
    return stat, stat.clone(), stat.clone()


@opaque(_fake_stats)
def cross_entropy_stats(logits: Tensor, labels_T: Tensor, vocab_start: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row state (m, s, t) of each token over this rank's part of the vocabulary.

    Args:
        logits: [..., V] float, any strides.
        labels_T: [T] int64, counted over the whole vocabulary.
        vocab_start: first class of this part.
    Returns:
        m, s, t: [T] each, float32 (float64 for float64); t is -inf where another part owns the label.
    """
    m_T, s_T, t_T = _fake_stats(logits, labels_T, vocab_start)
    vocab = logits.shape[-1]
    if vocab == 0:
        # A rank may own no part of the vocabulary: the identity of `row_stats.combine`.
        return m_T.fill_(-torch.inf), s_T.zero_(), t_T.fill_(-torch.inf)
    rows = _rows(logits, labels_T)
    buffer = Buffer(rows, logits, m_T.dtype)
    local_T = labels_T - vocab_start
    owned_T = (local_T >= 0) & (local_T < vocab)
    column_T = torch.where(owned_T, local_T, 0)
    for at, (block_BV,) in row_blocks(rows, logits):
        out_BV = buffer.take(block_BV)
        z_BV = widened(block_BV, out_BV)
        m_T[at] = m_B = _row_max(z_BV)
        t_T[at] = z_BV.gather(1, column_T[at, None])[:, 0]
        number_B = log2_exp(z_BV, 1.0, m_B, out_BV)
        s_T[at] = without(number_B, buffer.exp2(out_BV).sum(-1))
    return m_T, s_T, t_T.masked_fill_(~owned_T, -torch.inf)


def _fake_grad(
    logits: Tensor, labels_T: Tensor, vocab_start: int, keep_T: Tensor, m_T: Tensor, s_T: Tensor, coef_T: Tensor
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@opaque(_fake_grad)
def cross_entropy_grad(
    logits: Tensor, labels_T: Tensor, vocab_start: int, keep_T: Tensor, m_T: Tensor, s_T: Tensor, coef_T: Tensor
) -> Tensor:
    """coef (softmax - onehot) per token, in the logits' dtype; exactly 0 where keep is False.

    Args:
        m_T, s_T: row state over the whole vocabulary; keep_T: [T] bool; coef_T: [T] upstream.
    """
    grad = huge_pages.empty(logits.shape, logits.dtype, logits.device)
    _write_grad(grad, logits, labels_T, vocab_start, keep_T, m_T, s_T, coef_T)
    return grad


@untraced
def cross_entropy_overwrite(
    logits: Tensor, labels_T: Tensor, vocab_start: int, keep_T: Tensor, m_T: Tensor, s_T: Tensor, coef_T: Tensor
) -> None:
    """What `cross_entropy_grad` returns, bit for bit, written over the logits (of any strides without overlap)."""
    _write_grad(logits.detach(), logits.detach(), labels_T, vocab_start, keep_T, m_T, s_T, coef_T)


def _write_grad(
    grad: Tensor,
    logits: Tensor,
    labels_T: Tensor,
    vocab_start: int,
    keep_T: Tensor,
    m_T: Tensor,
    s_T: Tensor,
    coef_T: Tensor,
) -> None:
    """`cross_entropy_grad` into `grad`, which may be the logits themselves."""
    vocab = logits.shape[-1]
    if vocab == 0:
        return
    rows = _rows(logits, labels_T)
    buffer = Buffer(rows, logits, m_T.dtype)
    local_T = labels_T - vocab_start
    owned_T = (local_T >= 0) & (local_T < vocab)
    column_T = torch.where(owned_T, local_T, 0)
    scale_T = coef_T / s_T
    hit_T = torch.where(owned_T, -coef_T, 0.0)
    ignored = some_ignored(keep_T)
    for at, (block_BV, grad_BV) in row_blocks(rows, logits, grad):
        y_BV = buffer.take(block_BV)
        number_B = log2_exp(widened(block_BV, y_BV), 1.0, m_T[at], y_BV)
        scale_B = without(number_B, scale_T[at])
        _store_grad(grad_BV, buffer.exp2(y_BV), scale_B, column_T[at], hit_T[at], keep_T[at] if ignored else None)


def _store_grad(
    grad_BV: Tensor, powers_BV: Tensor, scale_B: Tensor, column_B: Tensor, hit_B: Tensor, keep_B: Tensor | None
) -> None:
    """scale * powers + hit at each column, 0 where keep is False, rounded once to the gradient's dtype."""
    out_BV = grad_BV if grad_BV.dtype == powers_BV.dtype else powers_BV
    torch.mul(powers_BV, scale_B[:, None], out=out_BV).scatter_add_(1, column_B[:, None], hit_B[:, None])
    if keep_B is not None:
        # Not a product with 0: an ignored row may hold inf or NaN.
        out_BV.masked_fill_(~keep_B[:, None], 0.0)
    if out_BV is not grad_BV:
        grad_BV.copy_(out_BV)


@untraced
def cross_entropy_with_grad(
    logits: Tensor, labels_T: Tensor, keep_T: Tensor, coef_T: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradient with one look at the logits, where the coefficients are known in the forward.

    Args:
        logits: [..., V] float, any strides; labels_T: [T] int64; keep_T: [T] bool.
        coef_T: [T] factor of each token's loss in the objective.
    Returns:
        loss_T, m_T, s_T as of `cross_entropy_stats`, and the gradient in the logits' dtype; 0 where keep is False.
    """
    grad = huge_pages.empty(logits.shape, logits.dtype, logits.device)
    dtype, vocab = compute_dtype(logits.dtype), logits.shape[-1]
    grad_TV = grad.view(-1, vocab)
    rows = _rows(logits, labels_T)
    buffer = Buffer(rows, logits, dtype)
    places_N = counted_places(keep_T, logits)
    if places_N is not None:
        state = _counted_state(labels_T, dtype)
        grad_TV.index_fill_(0, (~keep_T).nonzero()[:, 0], 0.0)
        for at_B, (block_BV,) in Gathered(rows, places_N, logits):
            # The gradient takes the place of the copy.
            part = _rows_with_grad(block_BV, block_BV, labels_T[at_B], coef_T[at_B], None, buffer)
            grad_TV.index_copy_(0, at_B, block_BV)
            _put_state(state, at_B, part)
        return row_stats.finish(torch, state), state.m, state.s, grad
    ignored = some_ignored(keep_T)
    column_T = torch.where((labels_T >= 0) & (labels_T < vocab), labels_T, 0) if ignored else labels_T
    blocks = list(row_blocks(rows, logits))
    if not blocks:
        return (*_fake_stats(logits, labels_T, 0), grad)
    states = []
    for at, (block_BV,) in blocks:
        # A small call is one block, and all overhead.
        cut = (grad_TV, column_T, coef_T) if len(blocks) == 1 else (grad_TV[at], column_T[at], coef_T[at])
        states.append(_rows_with_grad(block_BV, *cut, keep_T[at] if ignored else None, buffer))
    state = states[0] if len(states) == 1 else row_stats.RowState(*map(torch.cat, zip(*states, strict=True)))
    loss_T = row_stats.finish(torch, state)
    return loss_T.masked_fill_(~keep_T, 0.0) if ignored else loss_T, state.m, state.s, grad


def _counted_state(labels_T: Tensor, dtype: torch.dtype) -> row_stats.RowState:
    """Row states to be filled in where a token counts; of loss 0 elsewhere."""
    zero_T = torch.zeros(labels_T.shape, dtype=dtype, device=labels_T.device)
    return row_stats.RowState(zero_T, torch.ones_like(zero_T), zero_T.clone())


def _put_state(state: row_stats.RowState, at_B: Tensor, part: row_stats.RowState) -> None:
    for whole_T, part_B in zip(state, part, strict=True):
        whole_T[at_B] = part_B


def _rows_with_grad(
    block_BV: Tensor, grad_BV: Tensor, column_B: Tensor, coef_B: Tensor, keep_B: Tensor | None, buffer: Buffer
) -> row_stats.RowState:
    """The row state of a block, and its gradient into grad."""
    y_BV = buffer.take(block_BV)
    z_BV = widened(block_BV, y_BV)
    m_B = _row_max(z_BV)
    t_B = z_BV.gather(1, column_B.unsqueeze(1)).squeeze(1)
    number_B = log2_exp(z_BV, 1.0, m_B, y_BV)
    s_B = without(number_B, buffer.exp2(y_BV).sum(-1))
    _store_grad(grad_BV, y_BV, without(number_B, coef_B / s_B), column_B, coef_B.neg(), keep_B)
    return row_stats.RowState(m_B, s_B, t_B)


def cross_entropy_rows(logits: Tensor, labels_T: Tensor, keep_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """loss_T, m_T, s_T of `cross_entropy_with_grad`, without the gradient."""
    places_N = counted_places(keep_T, logits)
    if places_N is not None:
        state = _counted_state(labels_T, compute_dtype(logits.dtype))
        for at_B, (block_BV,) in Gathered(_rows(logits, labels_T), places_N, logits):
            _put_state(state, at_B, row_stats.RowState(*cross_entropy_stats(block_BV, labels_T[at_B], 0)))
        return row_stats.finish(torch, state), state.m, state.s
    state = row_stats.RowState(*cross_entropy_stats(logits, labels_T, 0))
    return row_stats.finish(torch, state).masked_fill_(~keep_T, 0.0), state.m, state.s


@untraced
def cross_entropy_scale_grad(
    grad: Tensor,
    logits: Tensor,
    labels_T: Tensor,
    keep_T: Tensor,
    m_T: Tensor,
    s_T: Tensor,
    coef_T: Tensor,
    upstream: Tensor,
) -> None:
    """Multiply what `cross_entropy_with_grad` gave by a scalar on the CPU, in place; by 1 it is left alone."""
    factor = float(upstream)
    if not scaled(grad, m_T.dtype, factor):
        _write_grad(grad, logits, labels_T, 0, keep_T, m_T, s_T, coef_T * factor)


def scaled(grad: Tensor, dtype: torch.dtype, factor: float) -> bool:
    """Whether the gradient could be multiplied by the factor, in place; else it is to be made anew.

    A gradient narrower than `dtype`, that of the arithmetic, would be rounded twice, and 0 times inf in an ignored row
    is NaN.
    """
    if factor == 1.0:
        return True
    fits = grad.dtype == dtype and math.isfinite(factor)
    if fits:
        grad.mul_(factor)
    return fits
