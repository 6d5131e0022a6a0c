"""Kernels over pairs of rows, student and teacher: their terms, sums against their mixture, and gradients.

`inverse_temperature` is annotated as fp64: Triton passes a Python float in float32, too coarse for float64 logits.
"""

# T = tokens (rows), V = vocabulary (of this rank), P = pieces of a row, rounded up to a power of 2, E = columns at the
# edges of a row; a block is [K, L, W]: K vectors of W columns for each of L lanes (threads)

import triton
import triton.language as tl

from loss_core_torch.kernels.gpu.kernels.memory import (
    already_written,
    body_start,
    edge_columns,
    head_and_body,
    is_ignored,
    load_logits,
    load_optional,
    row_start,
    store_grad,
    store_zeros,
)
from loss_core_torch.kernels.gpu.kernels.pieces import PARTIAL_TERMS, piece_of_row, publish, wait_for
from loss_core_torch.kernels.gpu.kernels.terms import (
    LOG2_E,
    extend_pairs,
    finite,
    fold_pairs,
    initial_max,
    lane_sum,
    mixture_logs,
    row_max,
    scalar,
)


@triton.jit
def pair_terms(
    student_ptr, teacher_ptr, vocab, rate, s_layout, t_layout, dtype: tl.constexpr, EVICT: tl.constexpr,
    BLOCK_V: tl.constexpr, L: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """(m_t, s_t, a, m_s, s_s), each [1], of a pair of rows or a piece, before the temperature; m as in `row_terms`."""
    K: tl.constexpr = BLOCK_V // (L * W)
    head, body = head_and_body(student_ptr, vocab, W)
    body_t, body_s = body_start(teacher_ptr, head, t_layout, W), body_start(student_ptr, head, s_layout, W)
    m_t = initial_max(L, dtype)
    s_t = tl.zeros([L], dtype)
    a = tl.zeros([L], dtype)
    m_s = initial_max(L, dtype)
    s_s = tl.zeros([L], dtype)
    for start in range(0, body, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < body
        zt_KLW = tl.reshape(load_logits(body_t, offs_v, mask_v, t_layout, dtype, EVICT), [K, L, W])
        zs_KLW = tl.reshape(load_logits(body_s, offs_v, mask_v, s_layout, dtype, EVICT), [K, L, W])
        m_t, s_t, a, m_s, s_s = extend_pairs(m_t, s_t, a, m_s, s_s, zt_KLW, zs_KLW, rate)
    m_t, s_t, a, m_s, s_s = fold_pairs(m_t, s_t, a, m_s, s_s, rate)
    if body < vocab:
        edge = edge_columns(head, body, W)
        zt_11E = tl.reshape(load_logits(teacher_ptr, edge, edge < vocab, t_layout, dtype, EVICT), [1, 1, 2 * W])
        zs_11E = tl.reshape(load_logits(student_ptr, edge, edge < vocab, s_layout, dtype, EVICT), [1, 1, 2 * W])
        m_t, s_t, a, m_s, s_s = extend_pairs(m_t, s_t, a, m_s, s_s, zt_11E, zs_11E, rate)
    return m_t, s_t, a, m_s, s_s


@triton.jit
def store_pair_terms(row, m_t, s_t, a, m_s, s_s, inv_temp, m_t_ptr, s_t_ptr, a_ptr, m_s_ptr, s_s_ptr):
    """Store the `pair_terms` of a pair of rows, with maxima and gaps times the inverse temperature."""
    tl.store(m_t_ptr + row, scalar(row_max(m_t, s_t)) * inv_temp)
    tl.store(s_t_ptr + row, scalar(s_t))
    tl.store(a_ptr + row, scalar(a) * inv_temp)
    tl.store(m_s_ptr + row, scalar(row_max(m_s, s_s)) * inv_temp)
    tl.store(s_s_ptr + row, scalar(s_s))


@triton.jit
def mixture_sums(zt, zs, base_t, base_s, offset, log_share_t, log_share_s, rate):
    """exp(z - m) log(p / M) of each class, for teacher and student."""
    zt, zs = zt - base_t, zs - base_s
    e_t, e_s = tl.exp2(zt * rate), tl.exp2(zs * rate)
    log_t, log_s = mixture_logs((zt - zs) * (rate / LOG2_E) - offset, log_share_t, log_share_s)
    return e_t * tl.where(e_t == 0, 0.0, log_t), e_s * tl.where(e_s == 0, 0.0, log_s)


@triton.jit
def pair_grad(
    zt, zs, base_t, base_s, scale_t, scale_s, offset, kl, log_share_t, log_share_s, rate, OF_TEACHER: tl.constexpr,
    MIXTURE: tl.constexpr,
):  # fmt: skip
    """Gradient by the student's logits, or by the teacher's, of each class; see `KernelSet.pair_grad`."""
    zt, zs = zt - base_t, zs - base_s
    e_t = tl.exp2(zt * rate)
    if MIXTURE:
        log_t, log_s = mixture_logs((zt - zs) * (rate / LOG2_E) - offset, log_share_t, log_share_s)
        if OF_TEACHER:
            grad = tl.where(e_t == 0, 0.0, log_t - kl) * e_t * scale_t
        else:
            e_s = tl.exp2(zs * rate)
            grad = tl.where(e_s == 0, 0.0, log_s - kl) * e_s * scale_s
    elif OF_TEACHER:
        # offset + kl is `row_terms.kl_centre`.
        grad = tl.where(e_t == 0, 0.0, (zt - zs) * (rate / LOG2_E) - (offset + kl)) * e_t * scale_t
    else:
        grad = tl.exp2(zs * rate) * scale_s - e_t * scale_t
    return grad


@triton.jit
def write_pair_grad(
    grad_ptr, student_ptr, teacher_ptr, vocab, rate, grad_layout, s_layout, t_layout, m_t, s_t, m_s, s_s, kl, coef,
    log_share_t, log_share_s, dtype: tl.constexpr, OF_TEACHER: tl.constexpr, MIXTURE: tl.constexpr,
    BLOCK_V: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Store the `pair_grad` of a pair of rows; m is before the temperature."""
    base_t, base_s, scale_t, scale_s = finite(m_t), finite(m_s), coef / s_t, coef / s_s
    offset = tl.log(s_t) - tl.log(s_s)  # `row_terms.log_ratio_offset`
    head, body = head_and_body(student_ptr, vocab, W)
    body_t, body_s = body_start(teacher_ptr, head, t_layout, W), body_start(student_ptr, head, s_layout, W)
    to_ptr = body_start(grad_ptr, head, grad_layout, W)
    blocks = tl.cdiv(body, BLOCK_V)
    for block in range(blocks):
        offs_v = (blocks - 1 - block) * BLOCK_V + tl.arange(0, BLOCK_V)
        mask_v = offs_v < body
        zt = load_logits(body_t, offs_v, mask_v, t_layout, dtype, "evict_first")
        zs = load_logits(body_s, offs_v, mask_v, s_layout, dtype, "evict_first")
        grad = pair_grad(
            zt, zs, base_t, base_s, scale_t, scale_s, offset, kl, log_share_t, log_share_s, rate, OF_TEACHER, MIXTURE
        )
        store_grad(to_ptr, offs_v, mask_v, grad_layout, grad)
    if body < vocab:
        edge = edge_columns(head, body, W)
        zt_E = load_logits(teacher_ptr, edge, edge < vocab, t_layout, dtype, "evict_first")
        zs_E = load_logits(student_ptr, edge, edge < vocab, s_layout, dtype, "evict_first")
        grad_E = pair_grad(
            zt_E, zs_E, base_t, base_s, scale_t, scale_s, offset, kl, log_share_t, log_share_s, rate, OF_TEACHER,
            MIXTURE,
        )  # fmt: skip
        store_grad(grad_ptr, edge, edge < vocab, grad_layout, grad_E)


@triton.jit
def pair_terms_kernel(
    student_ptr, teacher_ptr,  # [T, V]
    keep_ptr,  # [T] bool, or None
    m_t_ptr, s_t_ptr, a_ptr, m_s_ptr, s_s_ptr,  # [T]
    inverse_temperature: "fp64",  # type: ignore[name-defined]  # noqa: F821
    vocab, s_layout, t_layout,
    BLOCK_V: tl.constexpr, L: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Terms of one pair of rows, those of an empty piece if it is ignored: program (row)."""
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = m_t_ptr.dtype.element_ty
    end = tl.where(is_ignored(keep_ptr, row), 0, vocab)
    student_ptr += row_start(row, s_layout)
    teacher_ptr += row_start(row, t_layout)
    inv_temp = tl.full([], inverse_temperature, dtype)
    rate = tl.full([], inverse_temperature * LOG2_E, dtype)
    m_t, s_t, a, m_s, s_s = pair_terms(
        student_ptr, teacher_ptr, end, rate, s_layout, t_layout, dtype, "evict_first", BLOCK_V, L, W
    )
    store_pair_terms(row, m_t, s_t, a, m_s, s_s, inv_temp, m_t_ptr, s_t_ptr, a_ptr, m_s_ptr, s_s_ptr)


@triton.jit
def pair_mixture_kernel(
    student_ptr, teacher_ptr,  # [T, V]
    keep_ptr,  # [T] bool, or None
    m_t_ptr, s_t_ptr, m_s_ptr, s_s_ptr,  # [T]
    kl_t_ptr, kl_s_ptr,  # [T]
    inverse_temperature: "fp64",  # type: ignore[name-defined]  # noqa: F821
    log_share_t: "fp64", log_share_s: "fp64",  # type: ignore[name-defined]  # noqa: F821
    vocab, s_layout, t_layout,
    BLOCK_V: tl.constexpr, L: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Sums of one pair of rows against their mixture, 0 if it is ignored: program (row)."""
    K: tl.constexpr = BLOCK_V // (L * W)
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = m_t_ptr.dtype.element_ty
    end = tl.where(is_ignored(keep_ptr, row), 0, vocab)
    student_ptr += row_start(row, s_layout)
    teacher_ptr += row_start(row, t_layout)
    inv_temp = tl.full([], inverse_temperature, dtype)
    rate = tl.full([], inverse_temperature * LOG2_E, dtype)
    share_t, share_s = tl.full([], log_share_t, dtype), tl.full([], log_share_s, dtype)
    base_t, base_s = finite(tl.load(m_t_ptr + row)) / inv_temp, finite(tl.load(m_s_ptr + row)) / inv_temp
    s_t, s_s = tl.load(s_t_ptr + row), tl.load(s_s_ptr + row)
    offset = tl.log(s_t) - tl.log(s_s)  # `row_terms.log_ratio_offset`
    head, body = head_and_body(student_ptr, end, W)
    body_t, body_s = body_start(teacher_ptr, head, t_layout, W), body_start(student_ptr, head, s_layout, W)
    kl_t = tl.zeros([L], dtype)
    kl_s = tl.zeros([L], dtype)
    for start in range(0, body, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < body
        zt = load_logits(body_t, offs_v, mask_v, t_layout, dtype, "evict_first")
        zs = load_logits(body_s, offs_v, mask_v, s_layout, dtype, "evict_first")
        of_t, of_s = mixture_sums(zt, zs, base_t, base_s, offset, share_t, share_s, rate)
        kl_t += lane_sum(tl.reshape(of_t, [K, L, W]))
        kl_s += lane_sum(tl.reshape(of_s, [K, L, W]))
    kl_t, kl_s = tl.sum(kl_t, 0), tl.sum(kl_s, 0)
    if body < end:
        edge = edge_columns(head, body, W)
        zt_E = load_logits(teacher_ptr, edge, edge < end, t_layout, dtype, "evict_first")
        zs_E = load_logits(student_ptr, edge, edge < end, s_layout, dtype, "evict_first")
        of_t, of_s = mixture_sums(zt_E, zs_E, base_t, base_s, offset, share_t, share_s, rate)
        kl_t += tl.sum(of_t, 0)
        kl_s += tl.sum(of_s, 0)
    tl.store(kl_t_ptr + row, kl_t / s_t)
    tl.store(kl_s_ptr + row, kl_s / s_s)


@triton.jit
def pair_grad_kernel(
    grad_ptr,  # [T, V]
    student_ptr, teacher_ptr,  # [T, V]
    keep_ptr,  # [T] bool, or None
    m_t_ptr, s_t_ptr, m_s_ptr, s_s_ptr, kl_ptr, coef_ptr,  # [T]
    factor_ptr,  # scalar factor of all coefficients, or None
    inverse_temperature: "fp64",  # type: ignore[name-defined]  # noqa: F821
    log_share_t: "fp64", log_share_s: "fp64",  # type: ignore[name-defined]  # noqa: F821
    vocab, grad_layout, s_layout, t_layout,
    OF_TEACHER: tl.constexpr, MIXTURE: tl.constexpr, PREFILLED: tl.constexpr, BLOCK_V: tl.constexpr, L: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """`pair_grad` for one pair of rows: program (row)."""
    dtype: tl.constexpr = m_t_ptr.dtype.element_ty
    factor = load_optional(factor_ptr, 0, 1.0, dtype)
    if already_written(factor, PREFILLED):
        return
    row = tl.program_id(0).to(tl.int64)
    grad_ptr += row_start(row, grad_layout)
    if is_ignored(keep_ptr, row):
        store_zeros(grad_ptr, vocab, grad_layout, BLOCK_V, W)
        return
    student_ptr += row_start(row, s_layout)
    teacher_ptr += row_start(row, t_layout)
    inv_temp = tl.full([], inverse_temperature, dtype)
    rate = tl.full([], inverse_temperature * LOG2_E, dtype)
    write_pair_grad(
        grad_ptr, student_ptr, teacher_ptr, vocab, rate, grad_layout, s_layout, t_layout,
        tl.load(m_t_ptr + row) / inv_temp, tl.load(s_t_ptr + row), tl.load(m_s_ptr + row) / inv_temp,
        tl.load(s_s_ptr + row), tl.load(kl_ptr + row), tl.load(coef_ptr + row) * factor,
        tl.full([], log_share_t, dtype), tl.full([], log_share_s, dtype), dtype, OF_TEACHER, MIXTURE, BLOCK_V, W,
    )  # fmt: skip


@triton.jit
def pair_kernel(
    grad_ptr,  # [T, V]
    student_ptr, teacher_ptr,  # [T, V]
    keep_ptr,  # [T] bool, or None
    coef_ptr,  # [T] factor of each row's loss
    m_t_ptr, s_t_ptr, a_ptr, m_s_ptr, s_s_ptr,  # [T]
    partials_ptr,  # [T, PARTIAL_TERMS, NUM_PIECES] bits, all UNPUBLISHED; None for one piece
    inverse_temperature: "fp64",  # type: ignore[name-defined]  # noqa: F821
    vocab, grad_layout, s_layout, t_layout,
    NUM_PIECES: tl.constexpr, P: tl.constexpr, PIECE_V: tl.constexpr, PUBLISH_ONLY: tl.constexpr, BLOCK_V: tl.constexpr,
    L: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Terms and the student's gradient of one pair of rows: program (row, piece). See `row_kernel`."""
    row, piece, start_v, piece_vocab = piece_of_row(vocab, PIECE_V, NUM_PIECES)
    dtype: tl.constexpr = m_t_ptr.dtype.element_ty
    ignored = is_ignored(keep_ptr, row)
    grad_ptr += row_start(row, grad_layout) + start_v.to(tl.int64) * grad_layout.stride_v
    student_ptr += row_start(row, s_layout) + start_v.to(tl.int64) * s_layout.stride_v
    teacher_ptr += row_start(row, t_layout) + start_v.to(tl.int64) * t_layout.stride_v
    coef = tl.load(coef_ptr + row)
    inv_temp = tl.full([], inverse_temperature, dtype)
    rate = tl.full([], inverse_temperature * LOG2_E, dtype)
    m_t, s_t, a, m_s, s_s = pair_terms(
        student_ptr, teacher_ptr, tl.where(ignored, 0, piece_vocab), rate, s_layout, t_layout, dtype, "evict_last",
        BLOCK_V, L, W,
    )  # fmt: skip
    if NUM_PIECES > 1:
        partials_ptr += row * (PARTIAL_TERMS * NUM_PIECES)
        publish(partials_ptr, 0, scalar(m_t), piece, NUM_PIECES)
        publish(partials_ptr, 1, scalar(s_t), piece, NUM_PIECES)
        publish(partials_ptr, 2, scalar(a), piece, NUM_PIECES)
        publish(partials_ptr, 3, scalar(m_s), piece, NUM_PIECES)
        publish(partials_ptr, 4, scalar(s_s), piece, NUM_PIECES)
        if PUBLISH_ONLY:
            return
        no_logit, zeros = initial_max(P, dtype), tl.zeros([P], dtype)
        m_t_P = wait_for(partials_ptr, 0, no_logit, NUM_PIECES)
        s_t_P = wait_for(partials_ptr, 1, zeros, NUM_PIECES)
        a_P = wait_for(partials_ptr, 2, zeros, NUM_PIECES)
        m_s_P = wait_for(partials_ptr, 3, no_logit, NUM_PIECES)
        s_s_P = wait_for(partials_ptr, 4, zeros, NUM_PIECES)
        m_t, s_t, a, m_s, s_s = fold_pairs(m_t_P, s_t_P, a_P, m_s_P, s_s_P, rate)
    if piece == 0:
        store_pair_terms(row, m_t, s_t, a, m_s, s_s, inv_temp, m_t_ptr, s_t_ptr, a_ptr, m_s_ptr, s_s_ptr)
    if ignored | (coef == 0):
        store_zeros(grad_ptr, piece_vocab, grad_layout, BLOCK_V, W)
        return
    write_pair_grad(
        grad_ptr, student_ptr, teacher_ptr, piece_vocab, rate, grad_layout, s_layout, t_layout,
        scalar(row_max(m_t, s_t)), scalar(s_t), scalar(row_max(m_s, s_s)), scalar(s_s), 0.0, coef, 0.0, 0.0, dtype,
        False, False, BLOCK_V, W,
    )  # fmt: skip
