"""The kernels of `torch:triton`: the same functions as `eager`, launched as Triton kernels.

Each function checks, allocates and launches; the kernels are in `triton_kernels.py`, the sizes of a
launch come from `triton_sizes.launch_parameters` alone. Nothing is tuned at run time: that would cost the
host time in the first steps, and results would depend on which sizes won.
"""

# T = tokens, B = tokens of a chunk, H = hidden, V = vocabulary (of this rank)

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from loss_core import row_stats
from loss_core.backend import BackendUnavailable
from loss_core_torch import eager_distillation, eager_logits, triton_kernels, triton_sizes
from loss_core_torch.opaque import opaque
from loss_core_torch.triton_sizes import LaunchParameters
from loss_core_torch.values import compute_dtype

# Called with the name of each kernel that is launched: tests see by it that the flag ran what it names.
on_launch: list[Callable[[str], None]] = []

# Triton decides when the kernels are decorated, so this holds for the life of the process.
_INTERPRETED = not isinstance(triton_kernels.cross_entropy_row_kernel, triton.JITFunction)


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, size: LaunchParameters, **constants: Any) -> None:
    """Start one kernel on the device of its first tensor."""
    device = args[0].device
    if device.type == "cpu" and not _INTERPRETED:
        raise BackendUnavailable(
            "'torch:triton' got tensors on the cpu; it needs them on a GPU. Use 'torch:eager' for the CPU, or set "
            "TRITON_INTERPRET=1 before the first import to run the kernels there, slowly."
        )
    # Triton launches on the current device, which need not be the tensors'.
    here: AbstractContextManager[Any] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    warps = triton_sizes.warps_on(size, amd=torch.version.hip is not None)
    for hook in on_launch:
        hook(kernel.fn.__name__)
    with here:
        kernel[grid](*args, **constants, num_warps=warps, num_stages=size.num_stages)


def _merged(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """(size, stride) of as few dimensions as walk through the same rows in the same order."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == stride * size:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


def _rows(x: Tensor) -> tuple[int, int, int, int, int, int] | None:
    """How a kernel finds the rows of [..., V]: num_1, num_2, stride_0, stride_1, stride_2, stride_v.

    None when more than three dimensions remain. A plain matrix needs no division: its rows are dimension 0.
    """
    dims = _merged(tuple(x.shape[:-1]), x.stride()[:-1])
    if len(dims) > 3:
        return None
    (_, stride_0), (num_1, stride_1), (num_2, stride_2) = (dims + [(1, 0)] * 3)[:3]
    return num_1, num_2, stride_0, stride_1, stride_2, x.stride(-1)


def _pieces(*tensors: Tensor) -> Iterator[tuple[slice, tuple[tuple[int, ...], ...], tuple[Tensor, ...]]]:
    """Cut [..., V] tensors of one shape into pieces that a launch can take: rows, how to find them, views."""
    found = [_rows(x) for x in tensors]
    if all(rows is not None for rows in found):
        num_rows = tensors[0].numel() // max(tensors[0].shape[-1], 1)
        yield slice(0, num_rows), tuple(rows for rows in found if rows is not None), tensors
        return
    start = 0
    for index in range(tensors[0].shape[0]):
        for at, rows, views in _pieces(*(x[index] for x in tensors)):
            yield slice(start + at.start, start + at.stop), rows, views
        start += tensors[0][index].numel() // tensors[0].shape[-1]


def _parts(num_rows: int, vocab: int, dtype: torch.dtype, kind: str) -> tuple[LaunchParameters, int, int]:
    """Sizes of a launch, the columns of a part, and the number of parts."""
    size = triton_sizes.launch_parameters(num_rows, vocab, dtype, kind)
    blocks = triton.cdiv(vocab, size.block_v)
    part = triton.cdiv(blocks, size.split) * size.block_v
    return size, part, triton.cdiv(vocab, part)


def empty_state(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The row state of no classes: the identity of `row_stats.combine`."""
    empty = torch.full(shape, -torch.inf, dtype=dtype, device=device)
    return empty, torch.zeros_like(empty), empty.clone()


def _fake_stats(logits: Tensor, labels_T: Tensor, vocab_start: int, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    return eager_logits._fake_stats(logits, labels_T, vocab_start)


@opaque(_fake_stats)
def _stats(logits: Tensor, labels_T: Tensor, vocab_start: int, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    dtype, device, vocab = compute_dtype(logits.dtype), logits.device, logits.shape[-1]
    if logits.numel() == 0:
        return empty_state(labels_T.shape, dtype, device)
    m_T, s_T, t_T = (torch.empty(labels_T.shape, dtype=dtype, device=device) for _ in range(3))
    for at, (rows,), (piece,) in _pieces(logits):
        num_rows = at.stop - at.start
        size, part, parts = _parts(num_rows, vocab, logits.dtype, "capped_stats" if softcap else "stats")
        out = (m_T[at], s_T[at], t_T[at])
        into = out if parts == 1 else tuple(x.new_empty((num_rows, parts)) for x in out)
        _launch(
            triton_kernels.cross_entropy_stats_kernel, (num_rows, parts), piece, labels_T[at], *into, vocab_start,
            vocab, part, *rows, size=size, SOFTCAP=softcap, BLOCK_V=size.block_v, UNROLL=size.unroll,
        )  # fmt: skip
        if parts > 1:
            _fold(triton_kernels.cross_entropy_fold_kernel, into, out, parts)
    return m_T, s_T, t_T


def cross_entropy_stats(
    logits: Tensor, labels_T: Tensor, vocab_start: int, softcap: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Row state (m, s, t) of each token, of softcap(logits); see `eager_logits.cross_entropy_stats`."""
    return _stats(logits, labels_T, vocab_start, softcap)


def _fold(kernel: Any, into: tuple[Tensor, ...], out: tuple[Tensor, ...], parts: int) -> None:
    size = triton_sizes.fold_parameters(parts)
    _launch(kernel, (out[0].numel(),), *into, *out, parts, size=size, BLOCK_PARTS=size.block_v)


@opaque(eager_logits._fake_grad)
def cross_entropy_grad(
    logits: Tensor, labels_T: Tensor, vocab_start: int, keep_T: Tensor, m_T: Tensor, s_T: Tensor, coef_T: Tensor
) -> Tensor:
    """coef (softmax - onehot) per token; see `eager_logits.cross_entropy_grad`."""
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    write_grad(grad, logits, labels_T, vocab_start, keep_T, m_T, s_T, coef_T, None)
    return grad


def cross_entropy_overwrite(
    logits: Tensor, labels_T: Tensor, vocab_start: int, keep_T: Tensor, m_T: Tensor, s_T: Tensor, coef_T: Tensor
) -> None:
    """What `cross_entropy_grad` returns, bit for bit, written over the logits (of any strides without overlap)."""
    write_grad(None, logits, labels_T, vocab_start, keep_T, m_T, s_T, coef_T, None)


def cross_entropy_with_grad(
    logits: Tensor, labels_T: Tensor, keep_T: Tensor, coef_T: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradient in one kernel, where the coefficients are known in the forward.

    A row is read a second time at once after the first, from the cache, so that memory sees one read and one
    write. Few rows would leave most of the chip idle: their statistics and gradients take two kernels.

    Args:
        logits: [..., V] float, any strides; labels_T: [T] int64; keep_T: [T] bool.
        coef_T: [T] factor of each token's loss in the objective.
    Returns:
        loss_T, m_T, s_T as of `cross_entropy_stats`, and the gradient in the logits' dtype; 0 where keep is False.
    """
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return *_rows_of(logits, labels_T, keep_T, coef_T.contiguous(), grad), grad


def cross_entropy_rows(logits: Tensor, labels_T: Tensor, keep_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `cross_entropy_with_grad` returns, bit for bit, but for the gradient, which is not made."""
    unused_T = torch.empty(keep_T.shape, dtype=compute_dtype(logits.dtype), device=logits.device)
    return _rows_of(logits, labels_T, keep_T, unused_T, None)


def _rows_of(
    logits: Tensor, labels_T: Tensor, keep_T: Tensor, coef_T: Tensor, grad: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """loss_T, m_T, s_T, and the gradient into `grad` where there is one."""
    vocab = logits.shape[-1]
    if logits.numel() == 0 or _parts(keep_T.numel(), vocab, logits.dtype, "stats")[2] > 1:
        state = row_stats.RowState(*cross_entropy_stats(logits, labels_T, 0))
        if grad is not None:
            write_grad(grad, logits, labels_T, 0, keep_T, state.m, state.s, coef_T, None)
        return row_stats.finish(torch, state).masked_fill(~keep_T, 0.0), state.m, state.s
    m_T, s_T, loss_T = (torch.empty_like(coef_T) for _ in range(3))
    grad_TV = None if grad is None else grad.view(-1, vocab)
    for at, (rows,), (piece,) in _pieces(logits):
        size = triton_sizes.launch_parameters(at.stop - at.start, vocab, logits.dtype, "row")
        into = piece if grad_TV is None else grad_TV[at]
        _launch(
            triton_kernels.cross_entropy_row_kernel, (at.stop - at.start,), piece, into, labels_T[at],
            keep_T[at], coef_T[at], m_T[at], s_T[at], loss_T[at], vocab, *rows,
            size=size, SOFTCAP=0.0, WITH_GRAD=grad is not None, BLOCK_V=size.block_v, UNROLL=size.unroll,
        )  # fmt: skip
    return loss_T, m_T, s_T


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
    """Multiply what `cross_entropy_with_grad` gave by a scalar, in place; nothing happens where it is exactly 1.

    The kernel looks at the scalar, so the host need not wait for it. A gradient is made anew from the logits
    rather than multiplied: it would be rounded twice, for as many bytes.
    """
    write_grad(grad, logits, labels_T, 0, keep_T, m_T, s_T, coef_T, upstream.to(m_T.dtype))


def write_grad(
    grad: Tensor | None,
    logits: Tensor,
    labels_T: Tensor,
    vocab_start: int,
    keep_T: Tensor,
    m_T: Tensor,
    s_T: Tensor,
    coef_T: Tensor,
    upstream: Tensor | None,
    softcap: float = 0.0,
) -> None:
    """coef (softmax - onehot), times the softcap's slope, into grad.

    Args:
        grad: contiguous, of any dtype, may be the logits themselves; None: over the logits, whatever their strides.
        upstream: further factor of all, or None; where it is exactly 1, nothing happens.
    """
    if logits.numel() == 0:
        return
    vocab = logits.shape[-1]
    grad_TV = None if grad is None else grad.view(-1, vocab)
    coef_T = coef_T.contiguous()
    for at, (rows,), (piece,) in _pieces(logits):
        num_rows = at.stop - at.start
        size, part, parts = _parts(num_rows, vocab, logits.dtype, "grad")
        _launch(
            triton_kernels.cross_entropy_grad_kernel, (num_rows, parts), piece if grad_TV is None else grad_TV[at],
            piece, labels_T[at], keep_T[at], m_T[at], s_T[at], coef_T[at], coef_T if upstream is None else upstream,
            vocab_start, vocab, part, *rows, size=size, UNLESS_ONE=upstream is not None, SOFTCAP=softcap,
            IN_PLACE=grad is None, BLOCK_V=size.block_v,
        )  # fmt: skip


@opaque(eager_distillation._fake_kd_stats)
def distillation_stats(
    student: Tensor, teacher: Tensor, keep_T: Tensor, inverse_temperature: float, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """KDRowState of each token; see `eager_logits.distillation_stats`.

    chunk_size bounds temporaries of [chunk_size, V]; there are none here, so that any value is kept to.
    """
    state = eager_distillation._fake_kd_stats(student, teacher, keep_T, inverse_temperature, chunk_size)
    if student.numel() == 0:
        for part_T, value in zip(state, (-torch.inf, 0.0, 0.0, -torch.inf, 0.0), strict=True):
            part_T.fill_(value)
        return state
    vocab = student.shape[-1]
    for at, (s_rows, t_rows), (s_piece, t_piece) in _pieces(student, teacher):
        num_rows = at.stop - at.start
        size, part, parts = _parts(num_rows, vocab, student.dtype, "kd_stats")
        out = tuple(x[at] for x in state)
        into = out if parts == 1 else tuple(x.new_empty((num_rows, parts)) for x in out)
        _launch(
            triton_kernels.distillation_stats_kernel, (num_rows, parts), s_piece, t_piece, keep_T[at], *into,
            inverse_temperature, vocab, part, *s_rows, *t_rows, size=size, BLOCK_V=size.block_v, UNROLL=size.unroll,
        )  # fmt: skip
        if parts > 1:
            _fold(triton_kernels.distillation_fold_kernel, into, out, parts)
    return state


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
    """Gradient of coef * KL; see `eager_logits.distillation_grad`, and `distillation_stats` on chunk_size."""
    like = teacher if of_teacher else student
    grad = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if grad.numel() == 0:
        return grad
    vocab = student.shape[-1]
    grad_TV = grad.view(-1, vocab)
    m_t_T, s_t_T, _, m_s_T, s_s_T = state
    coef_T = coef_T.contiguous()
    for at, (s_rows, t_rows), (s_piece, t_piece) in _pieces(student, teacher):
        num_rows = at.stop - at.start
        size, part, parts = _parts(num_rows, vocab, student.dtype, "kd_grad")
        _launch(
            triton_kernels.distillation_grad_kernel, (num_rows, parts), grad_TV[at], s_piece, t_piece, keep_T[at],
            m_t_T[at], s_t_T[at], m_s_T[at], s_s_T[at], kl_T[at], coef_T[at], inverse_temperature, vocab, part,
            *s_rows, *t_rows, size=size, OF_TEACHER=of_teacher, BLOCK_V=size.block_v,
        )  # fmt: skip
    return grad
