"""KL divergence from a teacher in plain PyTorch operations, block of rows by block of rows, on any torch device.

As `eager_logits`. Exponents stay binary logarithms (see `row_blocks.log2_exp`) until a row is done.
"""

# T = tokens, B = rows of a block, V = vocabulary (of this rank)

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from loss_core import row_stats
from loss_core_torch import huge_pages, values
from loss_core_torch.eager_logits import scaled
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

_LN_2 = math.log(2.0)


def _rows(student: Tensor, keep_T: Tensor, chunk_size: int) -> int:
    return min(chunk_size or block_rows(2 * student.shape[-1], student.device), max(keep_T.numel(), 1))


class _Exponents:
    """Both sides of a block: exp(z / temperature - m) = 2^(y - n), in buffers that the next block uses again."""

    def __init__(self, rows: int, student: Tensor, dtype: torch.dtype, inverse_temperature: float) -> None:
        self._buffers = [Buffer(rows, student, dtype) for _ in range(3)]
        self._inverse_temperature = inverse_temperature

    def of(self, block_BV: Tensor, place: int, m_B: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """(y, m, n) of a block of logits, y in the given buffer.

        Args:
            m_B: as from the whole vocabulary; None: of this block.
        """
        y_BV = self._buffers[place].take(block_BV)
        z_BV = widened(block_BV, y_BV)
        if m_B is None:
            m_B = z_BV.amax(-1).mul_(self._inverse_temperature)
        return y_BV, m_B, log2_exp(z_BV, self._inverse_temperature, m_B, y_BV)

    def exp2(self, y_BV: Tensor, place: int) -> Tensor:
        """2^y, in the place of y."""
        return self._buffers[place].exp2(y_BV)

    def gap(self, yt_BV: Tensor, ys_BV: Tensor) -> Tensor:
        return torch.sub(yt_BV, ys_BV, out=self._buffers[2].take(yt_BV))


def _weighted_gap(weights_BV: Tensor, gap_BV: Tensor) -> Tensor:
    """Sum of weights * gap per row, where a weight of 0 counts for nothing even if its gap is inf or NaN."""
    if values.may_read(gap_BV):
        total_B = torch.linalg.vecdot(weights_BV, gap_BV)
        if bool(torch.isfinite(total_B).all()):
            return total_B
    return gap_BV.masked_fill_(weights_BV == 0, 0.0).mul_(weights_BV).sum(-1)


def _fake_kd_stats(
    student: Tensor, teacher: Tensor, keep_T: Tensor, inverse_temperature: float, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    stat = student.new_empty(keep_T.shape, dtype=compute_dtype(student.dtype))
    return stat, stat.clone(), stat.clone(), stat.clone(), stat.clone()


@opaque(_fake_kd_stats)
def distillation_stats(
    student: Tensor, teacher: Tensor, keep_T: Tensor, inverse_temperature: float, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """KDRowState (m_t, s_t, a, m_s, s_s) of each token over this rank's part of the vocabulary.

    Args:
        student, teacher: [..., V] float, any strides; divided by the temperature here.
        chunk_size: rows of a block, 0 = chosen here.
    Returns:
        Five [T], float32 (float64 for float64).
    """
    state = row_stats.KDRowState(*_fake_kd_stats(student, teacher, keep_T, inverse_temperature, chunk_size))
    if student.shape[-1] == 0:
        for part_T, identity in zip(state, (-torch.inf, 0.0, 0.0, -torch.inf, 0.0), strict=True):
            part_T.fill_(identity)
        return tuple(state)
    rows = _rows(student, keep_T, chunk_size)
    exponents = _Exponents(rows, student, state.m_t.dtype, inverse_temperature)
    for at, (s_BV, t_BV) in _counted_blocks(rows, keep_T, state, student, teacher):
        _block_stats(exponents, s_BV, t_BV, at, state)
    return tuple(state)


def _counted_blocks(
    rows: int, keep_T: Tensor, state: row_stats.KDRowState, *tensors: Tensor
) -> Iterable[tuple[slice | Tensor, tuple[Tensor, ...]]]:
    """Blocks of rows: of all of them, or copies of those that count, with the others' state made that of a KL of 0."""
    places_N = counted_places(keep_T, *tensors)
    if places_N is None:
        return row_blocks(rows, *tensors)
    for part_T, neutral in zip(state, (0.0, 1.0, 0.0, 0.0, 1.0), strict=True):
        part_T.fill_(neutral)
    return Gathered(rows, places_N, *tensors)


def _block_stats(
    exponents: _Exponents, s_BV: Tensor, t_BV: Tensor, at: slice | Tensor, state: row_stats.KDRowState
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write a block's row state; returns 2^y of student and teacher in buffers, and their sums."""
    ys_BV, state.m_s[at], ns_B = exponents.of(s_BV, 0)
    yt_BV, state.m_t[at], nt_B = exponents.of(t_BV, 1)
    gap_BV = exponents.gap(yt_BV, ys_BV)
    es_BV, et_BV = exponents.exp2(ys_BV, 0), exponents.exp2(yt_BV, 1)
    sum_s_B, sum_t_B = es_BV.sum(-1), et_BV.sum(-1)
    weighted_B = _weighted_gap(et_BV, gap_BV)
    if ns_B is not None:
        weighted_B += sum_t_B * ns_B
    if nt_B is not None:
        weighted_B -= sum_t_B * nt_B
    state.s_s[at], state.s_t[at] = without(ns_B, sum_s_B), without(nt_B, sum_t_B)
    state.a[at] = without(nt_B, weighted_B).mul_(_LN_2)
    return es_BV, et_BV, sum_s_B, sum_t_B


def _fake_kd_grad(
    student: Tensor,
    teacher: Tensor,
    keep_T: Tensor,
    inverse_temperature: float,
    chunk_size: int,
    state: list[Tensor],
    kl_T: Tensor,
    coef_T: Tensor,
    of_teacher: bool,
) -> Tensor:
    like = teacher if of_teacher else student
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


@opaque(_fake_kd_grad)
def distillation_grad(
    student: Tensor,
    teacher: Tensor,
    keep_T: Tensor,
    inverse_temperature: float,
    chunk_size: int,
    state: list[Tensor],
    kl_T: Tensor,
    coef_T: Tensor,
    of_teacher: bool,
) -> Tensor:
    """Gradient of coef * KL by the student's logits, or by the teacher's; exactly 0 where keep is False.

    Args:
        state: the five parts of KDRowState over the whole vocabulary, [T] each.
        kl_T: KL per token; coef_T: [T] upstream, all factors of the temperature included.
        of_teacher: which of the two gradients.
    """
    like = teacher if of_teacher else student
    grad = huge_pages.empty(like.shape, like.dtype, like.device)
    if student.shape[-1] == 0:
        return grad
    grad_TV = grad.view(-1, student.shape[-1])
    m_t_T, s_t_T, _, m_s_T, s_s_T = state
    rows = _rows(student, keep_T, chunk_size)
    exponents = _Exponents(rows, student, m_t_T.dtype, inverse_temperature)
    log_ratio_T = (s_t_T.log() - s_s_T.log() + kl_T) / _LN_2
    for at, (s_BV, t_BV) in row_blocks(rows, student, teacher):
        grad_BV = grad_TV[at]
        ys_BV, _, ns_B = exponents.of(s_BV, 0, m_s_T[at])
        yt_BV, _, nt_B = exponents.of(t_BV, 1, m_t_T[at])
        scale_t_B = without(nt_B, coef_T[at] / s_t_T[at])
        if of_teacher:
            gap_BV = exponents.gap(yt_BV, ys_BV).sub_(_row_numbers(log_ratio_T[at], ns_B, nt_B)[:, None])
            et_BV = exponents.exp2(yt_BV, 1)
            out_BV = gap_BV.masked_fill_(et_BV == 0, 0.0).mul_(et_BV).mul_((scale_t_B * _LN_2)[:, None])
        else:
            scale_s_B = without(ns_B, coef_T[at] / s_s_T[at])
            es_BV, et_BV = exponents.exp2(ys_BV, 0), exponents.exp2(yt_BV, 1)
            out_BV = _difference(es_BV, scale_s_B, et_BV, scale_t_B, grad_BV)
        _store(grad_BV, out_BV, keep_T[at])
    return grad


def _row_numbers(log_ratio_B: Tensor, ns_B: Tensor | None, nt_B: Tensor | None) -> Tensor:
    """What to take off yt - ys for the difference of the log-probabilities minus the KL, in base 2."""
    if nt_B is not None:
        log_ratio_B = log_ratio_B + nt_B
    return log_ratio_B if ns_B is None else log_ratio_B - ns_B


def _difference(es_BV: Tensor, scale_s_B: Tensor, et_BV: Tensor, scale_t_B: Tensor, grad_BV: Tensor) -> Tensor:
    """scale_s es - scale_t et: in the gradient where its dtype allows, else in the place of es."""
    out_BV = grad_BV if grad_BV.dtype == es_BV.dtype else es_BV
    return torch.sub(es_BV.mul_(scale_s_B[:, None]), et_BV.mul_(scale_t_B[:, None]), out=out_BV)


def _store(grad_BV: Tensor, out_BV: Tensor, keep_B: Tensor) -> None:
    """out into the gradient, with ignored rows cleared."""
    if some_ignored(keep_B):
        # Not a product with 0: an ignored row may hold inf or NaN.
        out_BV.masked_fill_(~keep_B[:, None], 0.0)
    if out_BV is not grad_BV:
        grad_BV.copy_(out_BV)


@untraced
def distillation_with_grad(
    student: Tensor, teacher: Tensor, keep_T: Tensor, inverse_temperature: float, chunk_size: int, coef_T: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """State and the student's gradient with one look at the logits, where the coefficients are known in the forward.

    Args: as of `distillation_stats` and `distillation_grad`.
    Returns:
        The state, and the gradient of the sum of coef * KL in the student's dtype.
    """
    state = row_stats.KDRowState(*_fake_kd_stats(student, teacher, keep_T, inverse_temperature, chunk_size))
    grad = huge_pages.empty(student.shape, student.dtype, student.device)
    grad_TV = grad.view(-1, student.shape[-1])
    rows = _rows(student, keep_T, chunk_size)
    exponents = _Exponents(rows, student, state.m_t.dtype, inverse_temperature)
    blocks = _counted_blocks(rows, keep_T, state, student, teacher)
    if isinstance(blocks, Gathered):
        grad_TV.index_fill_(0, (~keep_T).nonzero()[:, 0], 0.0)
    for at, (s_BV, t_BV) in blocks:
        # The gradient of rows that were copied takes the place of the copy.
        grad_BV = s_BV if isinstance(at, Tensor) else grad_TV[at]
        es_BV, et_BV, sum_s_B, sum_t_B = _block_stats(exponents, s_BV, t_BV, at, state)
        out_BV = _difference(es_BV, coef_T[at] / sum_s_B, et_BV, coef_T[at] / sum_t_B, grad_BV)
        _store(grad_BV, out_BV, keep_T[at])
        if isinstance(at, Tensor):
            grad_TV.index_copy_(0, at, grad_BV)
    return tuple(state), grad


@untraced
def distillation_scale_grad(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    keep_T: Tensor,
    inverse_temperature: float,
    chunk_size: int,
    state: list[Tensor],
    kl_T: Tensor,
    coef_T: Tensor,
    upstream: Tensor,
) -> Tensor:
    """What `distillation_with_grad` gave, times a scalar on the CPU; by 1 it is left alone."""
    factor = float(upstream)
    if scaled(grad, coef_T.dtype, factor):
        return grad
    args = (student, teacher, keep_T, inverse_temperature, chunk_size, state, kl_T, coef_T * factor)
    return distillation_grad(*args, False)
