"""The losses over logits in plain PyTorch operations, block of rows by block of rows, on any torch device.

A block is small enough to stay in cache (on a CPU) and its buffer is used again for the next one, so
that no [T, V] temporary exists, in any dtype. Arithmetic is float32, or float64 for float64 logits.
The formulas stand in `loss_core.oracle`, the row state in `loss_core.row_stats`.
"""

# T = tokens, B = rows of a block, V = vocabulary (of this rank)

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from loss_core_torch import values
from loss_core_torch.opaque import opaque
from loss_core_torch.values import compute_dtype

# Elements of a block's buffer. CPU: 2 MiB of float32, which the L2 caches of a few cores hold; below that
# the calls cost more than they save. Elsewhere: few, large launches.
_BLOCK_ELEMENTS_CPU = 1 << 19
_BLOCK_ELEMENTS = 1 << 26


def block_rows(num_cols: int, device: torch.device) -> int:
    """Rows whose logits fit the block buffer; at least 1."""
    elements = _BLOCK_ELEMENTS_CPU if device.type == "cpu" else _BLOCK_ELEMENTS
    return max(1, elements // max(num_cols, 1))


def row_blocks(rows: int, *tensors: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Cut [..., V] tensors of one shape into 2-D views of at most `rows` rows, all at the same places. Never copies.

    Yields:
        The place of a block among the T rows, and the block of each tensor.
    """
    shape = tensors[0].shape
    if tensors[0].numel() == 0:
        return
    if len(shape) <= 2 or all(x.is_contiguous() for x in tensors):
        pieces = [tuple(x.reshape(-1, shape[-1]) for x in tensors)]
    else:
        # A slice such as logits[:, :-1] is no matrix, but each of its sequences is.
        pieces = [tuple(x[index] for x in tensors) for index in itertools.product(*map(range, shape[:-2]))]
    start = 0
    for piece in pieces:
        length = piece[0].shape[0]
        for first in range(0, length, rows):
            last = min(first + rows, length)
            yield slice(start + first, start + last), tuple(x[first:last] for x in piece)
        start += length


def some_ignored(keep: Tensor) -> bool:
    """Whether rows of a block may need clearing."""
    return not (values.may_read(keep) and bool(keep.all()))


class _Buffer:
    """Room for the largest block, handed out in the shape of the present one."""

    def __init__(self, rows: int, like: Tensor, dtype: torch.dtype) -> None:
        self._flat = torch.empty(rows * like.shape[-1], dtype=dtype, device=like.device)

    def take(self, block_BV: Tensor) -> Tensor:
        return self._flat[: block_BV.numel()].view(block_BV.shape)


def _centred_exp(z_BV: Tensor, m_B: Tensor, out_BV: Tensor) -> Tensor:
    """exp(z - m) in out; rows whose maximum is -inf give 0."""
    # -inf minus -inf is NaN: a row without any finite logit has s = 0.
    safe_B1 = torch.where(m_B == -torch.inf, 0.0, m_B)[:, None]
    return torch.sub(z_BV, safe_B1, out=out_BV).exp_()


def _row_max(z_BV: Tensor) -> Tensor:
    return z_BV.amax(-1)


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
    rows = min(block_rows(vocab, logits.device), max(labels_T.numel(), 1))
    buffer = _Buffer(rows, logits, m_T.dtype)
    local_T = labels_T - vocab_start
    owned_T = (local_T >= 0) & (local_T < vocab)
    column_T = torch.where(owned_T, local_T, 0)
    for at, (block_BV,) in row_blocks(rows, logits):
        z_BV = block_BV.to(m_T.dtype)
        m_T[at] = m_B = _row_max(z_BV)
        t_T[at] = z_BV.gather(1, column_T[at, None])[:, 0]
        s_T[at] = _centred_exp(z_BV, m_B, buffer.take(block_BV)).sum(-1)
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
    grad = _fake_grad(logits, labels_T, vocab_start, keep_T, m_T, s_T, coef_T)
    _write_grad(grad, logits, labels_T, vocab_start, keep_T, m_T, s_T, coef_T)
    return grad


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
    rows = min(block_rows(vocab, logits.device), max(labels_T.numel(), 1))
    buffer = _Buffer(rows, logits, m_T.dtype)
    local_T = labels_T - vocab_start
    owned_T = (local_T >= 0) & (local_T < vocab)
    column_T = torch.where(owned_T, local_T, 0)
    scale_T = coef_T / s_T
    hit_T = torch.where(owned_T, -coef_T, 0.0)
    for at, (block_BV, grad_BV) in row_blocks(rows, logits, grad):
        # Strided memory takes the way over the buffer: exp may round differently there.
        direct = grad.dtype == m_T.dtype and grad_BV.is_contiguous()
        out_BV = grad_BV if direct else buffer.take(block_BV)
        _centred_exp(block_BV.to(m_T.dtype), m_T[at], out_BV).mul_(scale_T[at, None])
        out_BV.scatter_add_(1, column_T[at, None], hit_T[at, None])
        keep_B = keep_T[at]
        if some_ignored(keep_B):
            # Not a product with 0: an ignored row may hold inf or NaN.
            out_BV.masked_fill_(~keep_B[:, None], 0.0)
        if not direct:
            grad_BV.copy_(out_BV)


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
    state = _fake_kd_stats(student, teacher, keep_T, inverse_temperature, chunk_size)
    m_t_T, s_t_T, a_T, m_s_T, s_s_T = state
    if student.shape[-1] == 0:
        for part_T, identity in zip(state, (-torch.inf, 0.0, 0.0, -torch.inf, 0.0), strict=True):
            part_T.fill_(identity)
        return state
    dtype = m_t_T.dtype
    rows = min(chunk_size or block_rows(student.shape[-1], student.device), max(keep_T.numel(), 1))
    zs_buffer, zt_buffer, e_buffer = (_Buffer(rows, student, dtype) for _ in range(3))
    for at, (s_BV, t_BV) in row_blocks(rows, student, teacher):
        zs_BV, m_s_T[at] = _scaled_centred(s_BV, inverse_temperature, zs_buffer)
        zt_BV, m_t_T[at] = _scaled_centred(t_BV, inverse_temperature, zt_buffer)
        e_BV = e_buffer.take(s_BV)
        s_s_T[at] = torch.exp(zs_BV, out=e_BV).sum(-1)
        s_t_T[at] = torch.exp(zt_BV, out=e_BV).sum(-1)
        gap_BV = zt_BV.sub_(zs_BV)
        # A class that the teacher rules out weighs nothing, even where its gap is inf or NaN.
        gap_BV.masked_fill_(e_BV == 0, 0.0)
        a_T[at] = gap_BV.mul_(e_BV).sum(-1)
    return state


def _scaled(block_BV: Tensor, factor: float, buffer: _Buffer) -> Tensor:
    # Copied first: torch.mul(bfloat16, float, out=float32) would round the product to bfloat16.
    z_BV = buffer.take(block_BV).copy_(block_BV)
    return z_BV if factor == 1.0 else z_BV.mul_(factor)


def _scaled_centred(block_BV: Tensor, inverse_temperature: float, buffer: _Buffer) -> tuple[Tensor, Tensor]:
    """(z / T - m, m), with m = max z / T."""
    z_BV = _scaled(block_BV, inverse_temperature, buffer)
    m_B = _row_max(z_BV)
    return z_BV.sub_(torch.where(m_B == -torch.inf, 0.0, m_B)[:, None]), m_B


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
    grad = _fake_kd_grad(student, teacher, keep_T, inverse_temperature, chunk_size, state, kl_T, coef_T, of_teacher)
    vocab = student.shape[-1]
    if vocab == 0:
        return grad
    grad_TV = grad.view(-1, vocab)
    m_t_T, s_t_T, _, m_s_T, s_s_T = state
    rows = min(chunk_size or block_rows(vocab, student.device), max(keep_T.numel(), 1))
    zs_buffer, zt_buffer = (_Buffer(rows, student, m_t_T.dtype) for _ in range(2))
    log_ratio_T = s_t_T.log() - s_s_T.log() + kl_T
    for at, (s_BV, t_BV) in row_blocks(rows, student, teacher):
        zs_BV = _scaled(s_BV, inverse_temperature, zs_buffer)
        zt_BV = _scaled(t_BV, inverse_temperature, zt_buffer)
        if of_teacher:
            zt_BV.sub_(m_t_T[at, None])
            gap_BV = zs_BV.sub_(m_s_T[at, None]).neg_().add_(zt_BV).sub_(log_ratio_T[at, None])
            pt_BV = zt_BV.exp_()
            out_BV = gap_BV.masked_fill_(pt_BV == 0, 0.0).mul_(pt_BV).mul_((coef_T[at] / s_t_T[at])[:, None])
        else:
            ps_BV = _centred_exp(zs_BV, m_s_T[at], zs_BV).mul_((coef_T[at] / s_s_T[at])[:, None])
            pt_BV = _centred_exp(zt_BV, m_t_T[at], zt_BV).mul_((coef_T[at] / s_t_T[at])[:, None])
            out_BV = ps_BV.sub_(pt_BV)
        keep_B = keep_T[at]
        if some_ignored(keep_B):
            out_BV.masked_fill_(~keep_B[:, None], 0.0)
        grad_TV[at] = out_BV
    return grad
