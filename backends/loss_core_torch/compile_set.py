"""The kernels of `torch:compile`: the functions of `eager` over logits, each one loop that TorchInductor compiles.

A row is read from memory once, and no temporary of [T, V] exists. The first call of each kind of input compiles, for
seconds; another number of tokens or classes is no other kind. `eager` itself serves a single row or class, and
columns that do not lie side by side: the compiler would make further programs for these, and none better.

The fused linear loss is not here: its time is that of its matrix products, which are no compiler's to make faster.
"""

# T = tokens, V = vocabulary (of this rank)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from loss_core import row_stats
from loss_core_torch import compiled_rows, eager_distillation, eager_logits, huge_pages
from loss_core_torch.compiled import run
from loss_core_torch.opaque import opaque, untraced
from loss_core_torch.row_blocks import row_blocks
from loss_core_torch.values import compute_dtype


def one_pass(device: torch.device) -> bool:
    """Whether loss and gradient of logits are made together, where both are wanted: on a CPU, as in `eager`."""
    return device.type == "cpu"


def _served(*logits: Tensor) -> bool:
    """Whether there is a program for [..., V] tensors of one shape; else they are eager's."""
    vocab = logits[0].shape[-1]
    return vocab > 1 and logits[0].numel() > vocab and all(x.stride(-1) == 1 for x in logits)


def _matrices(*tensors: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """[..., V] tensors of one shape as few matrices each, views all of them, with the place of their rows."""
    shape = tensors[0].shape
    ones = tuple(dim for dim, size in enumerate(shape[:-1]) if size == 1)
    return row_blocks(shape[:-1].numel(), *(x.squeeze(ones) for x in tensors))


class _Labels:
    """The label's column in each row of a matrix, where it has one."""

    def __init__(self, column_T: Tensor, like_TV: Tensor) -> None:
        self._owned_T = (column_T >= 0) & (column_T < like_TV.shape[1])
        self._at = (torch.arange(column_T.numel(), device=column_T.device), torch.where(self._owned_T, column_T, 0))

    def of(self, x_TV: Tensor) -> Tensor:
        """The values there, in the dtype of the arithmetic; of another column where there is none."""
        return x_TV[self._at].to(compute_dtype(x_TV.dtype))

    def subtract(self, grad_TV: Tensor, t_T: Tensor, keep_T: Tensor, m_T: Tensor, s_T: Tensor, coef_T: Tensor) -> None:
        """Write coef (softmax - 1) there, rounded once; 0 where keep is False."""
        power_T = (t_T - torch.where(m_T == -torch.inf, 0.0, m_T)).exp()
        label_T = torch.where(keep_T, power_T * (coef_T / s_T) - coef_T, 0.0).to(grad_TV.dtype)
        grad_TV[self._at] = torch.where(self._owned_T, label_T, grad_TV[self._at])


def _joined(parts: list[Any]) -> Any:
    """Tuples of [t] values, one after the other as tuples of [T] values."""
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))


@opaque(eager_logits._fake_stats)
def cross_entropy_stats(logits: Tensor, labels_T: Tensor, vocab_start: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row state (m, s, t) of each token; see `eager_logits.cross_entropy_stats`."""
    if not _served(logits):
        return eager_logits.cross_entropy_stats(logits, labels_T, vocab_start)
    column_T = labels_T - vocab_start
    found = [run(compiled_rows.cross_entropy_stats, z_TV, column_T[at]) for at, (z_TV,) in _matrices(logits)]
    m_T, s_T, t_T = _joined(found)
    if compiled_rows.looks_once(logits) and not row_stats.near_enough(s_T).all():
        return eager_logits.cross_entropy_stats(logits, labels_T, vocab_start)
    return m_T, s_T, t_T


@opaque(eager_logits._fake_grad)
def cross_entropy_grad(
    logits: Tensor, labels_T: Tensor, vocab_start: int, keep_T: Tensor, m_T: Tensor, s_T: Tensor, coef_T: Tensor
) -> Tensor:
    """coef (softmax - onehot) per token; see `eager_logits.cross_entropy_grad`."""
    if not _served(logits):
        return eager_logits.cross_entropy_grad(logits, labels_T, vocab_start, keep_T, m_T, s_T, coef_T)
    grad = huge_pages.empty(logits.shape, logits.dtype, logits.device)
    _write_grad(grad, logits, labels_T, keep_T, m_T, s_T, coef_T, vocab_start)
    return grad


def _write_grad(
    grad: Tensor,
    logits: Tensor,
    labels_T: Tensor,
    keep_T: Tensor,
    m_T: Tensor,
    s_T: Tensor,
    coef_T: Tensor,
    vocab_start: int = 0,
) -> None:
    column_T, coef_T = labels_T - vocab_start, coef_T.contiguous()
    grad_TV = grad.view(-1, logits.shape[-1])
    for at, (z_TV,) in _matrices(logits):
        rows = (keep_T[at], m_T[at], s_T[at], coef_T[at])
        labels = _Labels(column_T[at], z_TV)
        t_T = labels.of(z_TV)
        run(compiled_rows.cross_entropy_grad, z_TV, *rows, grad_TV[at])
        labels.subtract(grad_TV[at], t_T, *rows)


@untraced
def cross_entropy_overwrite(
    logits: Tensor, labels_T: Tensor, vocab_start: int, keep_T: Tensor, m_T: Tensor, s_T: Tensor, coef_T: Tensor
) -> None:
    """What `cross_entropy_grad` returns, bit for bit, written over the logits (of any strides without overlap)."""
    if not _served(logits):
        return eager_logits.cross_entropy_overwrite(logits, labels_T, vocab_start, keep_T, m_T, s_T, coef_T)
    column_T, coef_T = labels_T - vocab_start, coef_T.contiguous()
    for at, (z_TV,) in _matrices(logits):
        rows = (keep_T[at], m_T[at], s_T[at], coef_T[at])
        labels = _Labels(column_T[at], z_TV)
        t_T = labels.of(z_TV)
        run(compiled_rows.cross_entropy_overwrite, z_TV, *rows)
        labels.subtract(z_TV, t_T, *rows)


@untraced
def cross_entropy_with_grad(
    logits: Tensor, labels_T: Tensor, keep_T: Tensor, coef_T: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradient with one look at the logits; see `eager_logits.cross_entropy_with_grad`."""
    if not _served(logits):
        return eager_logits.cross_entropy_with_grad(logits, labels_T, keep_T, coef_T)
    grad = huge_pages.empty(logits.shape, logits.dtype, logits.device)
    grad_TV, coef_T = grad.view(-1, logits.shape[-1]), coef_T.contiguous()
    found = []
    for at, (z_TV,) in _matrices(logits):
        labels = _Labels(labels_T[at], z_TV)
        t_T = labels.of(z_TV)
        rest = (keep_T[at], coef_T[at], grad_TV[at])
        # Of 16-bit logits TorchInductor would keep the exponentials of all rows.
        if compiled_rows.looks_once(z_TV) and z_TV.dtype == t_T.dtype:
            m_T = compiled_rows.near_largest(z_TV, t_T)
            s_T = run(compiled_rows.cross_entropy_with_grad_near, z_TV, m_T, *rest)
            if not (row_stats.near_enough(s_T) | ~keep_T[at]).all():
                del grad, grad_TV, rest  # before another one is made
                return eager_logits.cross_entropy_with_grad(logits, labels_T, keep_T, coef_T)
        else:
            m_T, s_T = run(compiled_rows.cross_entropy_with_grad, z_TV, *rest)
        labels.subtract(grad_TV[at], t_T, keep_T[at], m_T, s_T, coef_T[at])
        found.append((m_T, s_T, t_T))
    state = row_stats.RowState(*_joined(found))
    return row_stats.finish(torch, state).masked_fill_(~keep_T, 0.0), state.m, state.s, grad


def cross_entropy_rows(logits: Tensor, labels_T: Tensor, keep_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """loss_T, m_T, s_T of `cross_entropy_with_grad`, without the gradient."""
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
    if not _served(logits):
        eager_logits.cross_entropy_scale_grad(grad, logits, labels_T, keep_T, m_T, s_T, coef_T, upstream)
    elif not eager_logits.scaled(grad, coef_T.dtype, factor):
        _write_grad(grad, logits, labels_T, keep_T, m_T, s_T, coef_T * factor)


def _scalar(value: float, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=compute_dtype(like.dtype))


@opaque(eager_distillation._fake_kd_stats)
def distillation_stats(
    student: Tensor, teacher: Tensor, keep_T: Tensor, inverse_temperature: float, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """KDRowState of each token; see `eager_distillation.distillation_stats`.

    chunk_size bounds temporaries of [chunk_size, V]; there are none here, so that any value is kept to.
    """
    if not _served(student, teacher):
        return eager_distillation.distillation_stats(student, teacher, keep_T, inverse_temperature, chunk_size)
    factor = _scalar(inverse_temperature, student)
    found = [run(compiled_rows.distillation_stats, *pair, factor) for _, pair in _matrices(student, teacher)]
    m_t_T, s_t_T, a_T, m_s_T, s_s_T = _joined(found)
    return m_t_T, s_t_T, a_T, m_s_T, s_s_T


@opaque(eager_distillation._fake_kd_grad)
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
    """Gradient of coef * KL; see `eager_distillation.distillation_grad`, and `distillation_stats` on chunk_size."""
    if not _served(student, teacher):
        return eager_distillation.distillation_grad(
            student, teacher, keep_T, inverse_temperature, chunk_size, state, kl_T, coef_T, of_teacher
        )
    like = teacher if of_teacher else student
    grad = huge_pages.empty(like.shape, like.dtype, like.device)
    grad_TV = grad.view(-1, like.shape[-1])
    factor = _scalar(inverse_temperature, student)
    m_t_T, s_t_T, _, m_s_T, s_s_T = state
    coef_T = coef_T.contiguous()
    for at, pair in _matrices(student, teacher):
        rows = (keep_T[at], m_t_T[at], s_t_T[at], m_s_T[at], s_s_T[at])
        if of_teacher:
            rest = (kl_T[at], coef_T[at], factor, grad_TV[at])
            run(compiled_rows.distillation_teacher_grad, *pair, *rows, *rest)
        else:
            run(compiled_rows.distillation_student_grad, *pair, *rows, coef_T[at], factor, grad_TV[at])
    return grad


@untraced
def distillation_with_grad(
    student: Tensor, teacher: Tensor, keep_T: Tensor, inverse_temperature: float, chunk_size: int, coef_T: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """State and the student's gradient with one look at the logits; see `eager_distillation.distillation_with_grad`."""
    if not _served(student, teacher):
        return eager_distillation.distillation_with_grad(
            student, teacher, keep_T, inverse_temperature, chunk_size, coef_T
        )
    grad = huge_pages.empty(student.shape, student.dtype, student.device)
    grad_TV, coef_T = grad.view(-1, student.shape[-1]), coef_T.contiguous()
    factor = _scalar(inverse_temperature, student)
    found = [
        run(compiled_rows.distillation_with_grad, *pair, keep_T[at], coef_T[at], factor, grad_TV[at])
        for at, pair in _matrices(student, teacher)
    ]
    m_t_T, s_t_T, a_T, m_s_T, s_s_T = _joined(found)
    return (m_t_T, s_t_T, a_T, m_s_T, s_s_T), grad


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
    if eager_logits.scaled(grad, coef_T.dtype, factor):
        return grad
    args = (student, teacher, keep_T, inverse_temperature, chunk_size, state, kl_T, coef_T * factor)
    return distillation_grad(*args, False)
