"""Kernels over rows of logits: their terms, their gradient, and both in one kernel."""

# T = tokens (rows), V = vocabulary (of this rank), N = targets of a row and P = pieces of one, rounded up to a power of
# 2, E = columns at the edges of a row; a block is [K, L, W]: K vectors of W columns for each of L lanes (threads)

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
    cross_entropy_coefficients,
    exp,
    exp_weighted,
    extend,
    finite,
    fold,
    initial_max,
    lane_sum,
    row_max,
    scalar,
    tanh,
)


@triton.jit
def softcap_and_scale(z, mask, inv_temp, SOFTCAP: tl.constexpr, HAS_TEMPERATURE: tl.constexpr):
    """softcap(z) / temperature, -inf outside of the mask."""
    if SOFTCAP != 0:
        z = tl.where(mask, SOFTCAP * tanh(z / SOFTCAP), float("-inf"))
    if HAS_TEMPERATURE:
        z = z * inv_temp
    return z


@triton.jit
def load_labels(labels_ptr, vocab_start, NUM_TARGETS: tl.constexpr, N: tl.constexpr):
    """[N] columns of a row's targets, -1 after the last of NUM_TARGETS."""
    offs_n = tl.arange(0, N).to(tl.int64)
    labels = tl.load(labels_ptr + offs_n, mask=offs_n < NUM_TARGETS, other=0) - vocab_start
    return tl.where(offs_n < NUM_TARGETS, labels, -1)


@triton.jit
def load_targets(ptr, row, NUM_TARGETS: tl.constexpr, N: tl.constexpr):
    """[N] values of a row's targets."""
    offs_n = tl.arange(0, N).to(tl.int64)
    return tl.load(ptr + row * NUM_TARGETS + offs_n, mask=offs_n < NUM_TARGETS, other=0.0)


@triton.jit
def mask_targets(z, offs_v, end, target, labels_ptr, vocab_start, NUM_TARGETS: tl.constexpr):
    """The block with -inf at the targets' columns below `end`, and the index of the next target.

    Targets ascend, so that each is compared with the columns of one block alone.
    """
    column = tl.load(labels_ptr + target, mask=target < NUM_TARGETS, other=0) - vocab_start
    while (target < NUM_TARGETS) & (column < end):
        z = tl.where(offs_v == column.to(tl.int32), float("-inf"), z)
        target += 1
        column = tl.load(labels_ptr + target, mask=target < NUM_TARGETS, other=0) - vocab_start
    return z, target


@triton.jit
def row_terms(
    row_ptr, vocab, labels_ptr, vocab_start, layout, inv_temp, dtype: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr, HAS_Z_SUM: tl.constexpr, HAS_E: tl.constexpr, EVICT: tl.constexpr,
    NUM_TARGETS: tl.constexpr, N: tl.constexpr, EXCLUDE_TARGETS: tl.constexpr, BLOCK_V: tl.constexpr, L: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """(m [1], s [1], t [N], z_sum [1], e [1]) of a row or a piece; z_sum is 0 without HAS_Z_SUM, e without HAS_E.

    m is finite, and s is 0 if all logits are -inf; see `row_max`. EXCLUDE_TARGETS: the targets' columns are in t alone.
    """
    label = load_labels(labels_ptr, vocab_start, NUM_TARGETS, N)
    owned = (label >= 0) & (label < vocab)
    # Before the loop: a gradient that follows may be written over the logits.
    t = tl.load(row_ptr + label * layout.stride_v, mask=owned, other=float("-inf")).to(dtype)
    t = softcap_and_scale(t, owned, inv_temp, SOFTCAP, HAS_TEMPERATURE)
    head, body = head_and_body(row_ptr, vocab, W)
    target = tl.full([], 0, tl.int64)
    body_ptr = body_start(row_ptr, head, layout, W)
    m = initial_max(L, dtype)
    s = tl.zeros([L], dtype)
    z_sum = tl.zeros([L], dtype)
    e = tl.zeros([L], dtype)
    for start in range(0, body, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < body
        z = load_logits(body_ptr, offs_v, mask_v, layout, dtype, EVICT)
        z = softcap_and_scale(z, mask_v, inv_temp, SOFTCAP, HAS_TEMPERATURE)
        if EXCLUDE_TARGETS:
            end = head + start + BLOCK_V
            z, target = mask_targets(z, head + offs_v, end, target, labels_ptr, vocab_start, NUM_TARGETS)
        if HAS_Z_SUM:
            z_sum += lane_sum(tl.reshape(tl.where(mask_v, z, 0.0), [BLOCK_V // (L * W), L, W]))
        m, s, e = extend(m, s, e, tl.reshape(z, [BLOCK_V // (L * W), L, W]), HAS_E)
    m, s, e = fold(m, s, e, HAS_E)
    z_sum = tl.sum(z_sum, 0, keep_dims=True)
    if body < vocab:
        edge = edge_columns(head, body, W)
        z_E = load_logits(row_ptr, edge, edge < vocab, layout, dtype, EVICT)
        z_E = softcap_and_scale(z_E, edge < vocab, inv_temp, SOFTCAP, HAS_TEMPERATURE)
        if EXCLUDE_TARGETS:
            z_E = tl.where(tl.max((edge[:, None] == label[None, :]).to(tl.int32), 1) > 0, float("-inf"), z_E)
        z_sum += tl.sum(tl.where(edge < vocab, z_E, 0.0), 0, keep_dims=True)
        m, s, e = extend(m, s, e, tl.reshape(z_E, [1, 1, 2 * W]), HAS_E)
    return m, s, t, z_sum, e


@triton.jit
def publish_terms(
    partials_ptr, m, s, t, z_sum, e, piece, HAS_Z_SUM: tl.constexpr, HAS_E: tl.constexpr, NUM_PIECES: tl.constexpr
):  # fmt: skip
    """Publish the `row_terms` of a piece with one target."""
    publish(partials_ptr, 0, scalar(m), piece, NUM_PIECES)
    publish(partials_ptr, 1, scalar(s), piece, NUM_PIECES)
    publish(partials_ptr, 2, scalar(t), piece, NUM_PIECES)
    if HAS_Z_SUM:
        publish(partials_ptr, 3, scalar(z_sum), piece, NUM_PIECES)
    if HAS_E:
        publish(partials_ptr, 4, scalar(e), piece, NUM_PIECES)


@triton.jit
def wait_for_terms(
    partials_ptr, z_sum, e, dtype: tl.constexpr, HAS_Z_SUM: tl.constexpr, HAS_E: tl.constexpr, NUM_PIECES: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """The `row_terms` of all pieces, combined; z_sum and e are returned as they are without their flags."""
    zeros = tl.zeros([P], dtype)
    m = wait_for(partials_ptr, 0, initial_max(P, dtype), NUM_PIECES)
    s = wait_for(partials_ptr, 1, zeros, NUM_PIECES)
    t = tl.max(wait_for(partials_ptr, 2, zeros + float("-inf"), NUM_PIECES), 0, keep_dims=True)
    if HAS_Z_SUM:
        z_sum = tl.sum(wait_for(partials_ptr, 3, zeros, NUM_PIECES), 0, keep_dims=True)
    if HAS_E:
        m, s, e = fold(m, s, wait_for(partials_ptr, 4, zeros, NUM_PIECES), True)
    else:
        m, s, _ = fold(m, s, zeros, False)
    return m, s, t, z_sum, e


@triton.jit
def store_terms(
    row, m, s, t, z_sum, e, m_ptr, s_ptr, t_ptr, z_sum_ptr, e_ptr, NUM_TARGETS: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """Store the `row_terms` of a row; z_sum and e only if their pointers are not None."""
    tl.store(m_ptr + row, scalar(row_max(m, s)))
    tl.store(s_ptr + row, scalar(s))
    offs_n = tl.arange(0, N).to(tl.int64)
    tl.store(t_ptr + row * NUM_TARGETS + offs_n, t, mask=offs_n < NUM_TARGETS)
    if z_sum_ptr is not None:
        tl.store(z_sum_ptr + row, scalar(z_sum))
    if e_ptr is not None:
        tl.store(e_ptr + row, scalar(e))


@triton.jit
def logits_grad(
    z, m, inv_temp, scale, uniform, slope, SOFTCAP: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
    HAS_UNIFORM: tl.constexpr, HAS_SLOPE: tl.constexpr,
):  # fmt: skip
    """(exp(x) * (scale + slope * x) - uniform) times the softcap's slope; see `row_terms.Coefficients`."""
    tanh_z = z
    if SOFTCAP != 0:
        tanh_z = tanh(z / SOFTCAP)
        z = SOFTCAP * tanh_z
    if HAS_TEMPERATURE:
        z = z * inv_temp
    x = z - finite(m)
    grad = exp(x)
    if HAS_SLOPE:
        grad = grad * scale + exp_weighted(grad, x) * slope
    else:
        grad = grad * scale
    if HAS_UNIFORM:
        grad = grad - uniform
    if SOFTCAP != 0:
        grad = grad * (1.0 - tanh_z * tanh_z)
    return grad


@triton.jit
def write_row_grad(
    grad_ptr, row_ptr, vocab, label, grad_layout, layout, inv_temp, m, t, scale, target, uniform, slope,
    dtype: tl.constexpr, SOFTCAP: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, HAS_UNIFORM: tl.constexpr,
    HAS_SLOPE: tl.constexpr, BLOCK_V: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Store the gradient of a row by its logits: `logits_grad`, and at the targets' columns `target` times the slope.

    label, t and target are [N]. The gradient may be written over the logits: each is read before.
    """
    if HAS_TEMPERATURE:
        scale, target, uniform, slope = scale * inv_temp, target * inv_temp, uniform * inv_temp, slope * inv_temp
    head, body = head_and_body(row_ptr, vocab, W)
    from_ptr, to_ptr = body_start(row_ptr, head, layout, W), body_start(grad_ptr, head, grad_layout, W)
    blocks = tl.cdiv(body, BLOCK_V)
    for block in range(blocks):
        offs_v = (blocks - 1 - block) * BLOCK_V + tl.arange(0, BLOCK_V)
        mask_v = offs_v < body
        z = load_logits(from_ptr, offs_v, mask_v, layout, dtype, "evict_first")
        grad = logits_grad(z, m, inv_temp, scale, uniform, slope, SOFTCAP, HAS_TEMPERATURE, HAS_UNIFORM, HAS_SLOPE)
        store_grad(to_ptr, offs_v, mask_v, grad_layout, grad)
    if body < vocab:
        edge = edge_columns(head, body, W)
        z_E = load_logits(row_ptr, edge, edge < vocab, layout, dtype, "evict_first")
        grad_E = logits_grad(z_E, m, inv_temp, scale, uniform, slope, SOFTCAP, HAS_TEMPERATURE, HAS_UNIFORM, HAS_SLOPE)
        store_grad(grad_ptr, edge, edge < vocab, grad_layout, grad_E)
    # The loop compares no indices: its values at the targets' columns are overwritten.
    if SOFTCAP != 0:
        tanh_t = t / SOFTCAP
        if HAS_TEMPERATURE:
            tanh_t = tanh_t / inv_temp
        target = target * (1.0 - tanh_t * tanh_t)
    # The loop's value is stored by another thread, and must come first.
    tl.debug_barrier()
    store_grad(grad_ptr, label, (label >= 0) & (label < vocab), grad_layout, target)


@triton.jit
def row_terms_kernel(
    logits_ptr,  # [T, V]
    labels_ptr,  # [T, NUM_TARGETS] int64, over the full vocabulary; ascending in a row
    keep_ptr,  # [T] bool, or None
    inv_temp_ptr,  # [T] inverse temperatures, or None
    m_ptr, s_ptr,  # [T]
    t_ptr,  # [T, NUM_TARGETS]
    z_sum_ptr, e_ptr,  # [T], or None
    vocab_start, vocab, layout,
    SOFTCAP: tl.constexpr, NUM_TARGETS: tl.constexpr, N: tl.constexpr, EXCLUDE_TARGETS: tl.constexpr,
    BLOCK_V: tl.constexpr, L: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Terms of one row, those of an empty piece if it is ignored: program (row)."""
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = m_ptr.dtype.element_ty
    end = tl.where(is_ignored(keep_ptr, row), 0, vocab)
    row_ptr = logits_ptr + row_start(row, layout)
    inv_temp = load_optional(inv_temp_ptr, row, 1.0, dtype)
    m, s, t, z_sum, e = row_terms(
        row_ptr, end, labels_ptr + row * NUM_TARGETS, vocab_start, layout, inv_temp, dtype, SOFTCAP,
        inv_temp_ptr is not None, z_sum_ptr is not None, e_ptr is not None, "evict_first", NUM_TARGETS, N,
        EXCLUDE_TARGETS, BLOCK_V, L, W,
    )  # fmt: skip
    store_terms(row, m, s, t, z_sum, e, m_ptr, s_ptr, t_ptr, z_sum_ptr, e_ptr, NUM_TARGETS, N)


@triton.jit
def row_grad_kernel(
    grad_ptr,  # [T, V]; may be the logits
    logits_ptr,  # [T, V]
    labels_ptr,  # [T, NUM_TARGETS] int64, over the full vocabulary
    keep_ptr,  # [T] bool, or None
    inv_temp_ptr,  # [T] inverse temperatures, or None
    m_ptr,  # [T]
    t_ptr,  # [T, NUM_TARGETS]
    scale_ptr,  # [T]
    target_ptr,  # [T, NUM_TARGETS]
    uniform_ptr, slope_ptr,  # [T], or None
    factor_ptr,  # scalar factor of all coefficients, or None
    vocab_start, vocab, grad_layout, layout,
    SOFTCAP: tl.constexpr, NUM_TARGETS: tl.constexpr, N: tl.constexpr, PREFILLED: tl.constexpr, BLOCK_V: tl.constexpr,
    L: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Gradient of one row: program (row)."""
    dtype: tl.constexpr = m_ptr.dtype.element_ty
    factor = load_optional(factor_ptr, 0, 1.0, dtype)
    if already_written(factor, PREFILLED):
        return
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row_start(row, layout)
    grad_ptr += row_start(row, grad_layout)
    if is_ignored(keep_ptr, row):
        store_zeros(grad_ptr, vocab, grad_layout, BLOCK_V, W)
        return
    label = load_labels(labels_ptr + row * NUM_TARGETS, vocab_start, NUM_TARGETS, N)
    inv_temp = load_optional(inv_temp_ptr, row, 1.0, dtype)
    uniform = load_optional(uniform_ptr, row, 0.0, dtype) * factor
    slope = load_optional(slope_ptr, row, 0.0, dtype) * factor
    write_row_grad(
        grad_ptr, row_ptr, vocab, label, grad_layout, layout, inv_temp, tl.load(m_ptr + row),
        load_targets(t_ptr, row, NUM_TARGETS, N), tl.load(scale_ptr + row) * factor,
        load_targets(target_ptr, row, NUM_TARGETS, N) * factor, uniform, slope, dtype, SOFTCAP,
        inv_temp_ptr is not None, uniform_ptr is not None, slope_ptr is not None, BLOCK_V, W,
    )  # fmt: skip


@triton.jit
def row_kernel(
    grad_ptr,  # [T, V]; may be the logits
    logits_ptr,  # [T, V]
    labels_ptr,  # [T] int64, over the full vocabulary
    keep_ptr,  # [T] bool, or None
    inv_temp_ptr,  # [T] inverse temperatures, or None
    coef_ptr,  # [T] factor of each row's loss
    m_ptr, s_ptr, t_ptr,  # [T]
    z_sum_ptr, e_ptr,  # [T], or None
    scale_ptr, target_ptr,  # [T]
    uniform_ptr,  # [T], or None
    partials_ptr,  # [T, PARTIAL_TERMS, NUM_PIECES] bits, all UNPUBLISHED; None for one piece
    num_classes,  # of the full vocabulary
    vocab_start, vocab, grad_layout, layout,
    SOFTCAP: tl.constexpr, LABEL_SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, NUM_PIECES: tl.constexpr,
    P: tl.constexpr, PIECE_V: tl.constexpr, PUBLISH_ONLY: tl.constexpr, BLOCK_V: tl.constexpr, L: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """Terms and gradient of one row, and the gradient's coefficients: program (row, piece).

    The gradient of a row with coef 0 is 0, even if it holds inf or NaN.
    """
    row, piece, start_v, piece_vocab = piece_of_row(vocab, PIECE_V, NUM_PIECES)
    dtype: tl.constexpr = m_ptr.dtype.element_ty
    ignored = is_ignored(keep_ptr, row)
    row_ptr = logits_ptr + row_start(row, layout) + start_v.to(tl.int64) * layout.stride_v
    grad_ptr += row_start(row, grad_layout) + start_v.to(tl.int64) * grad_layout.stride_v
    vocab_start += start_v
    coef = tl.load(coef_ptr + row)
    inv_temp = load_optional(inv_temp_ptr, row, 1.0, dtype)
    m, s, t, z_sum, e = row_terms(
        row_ptr, tl.where(ignored, 0, piece_vocab), labels_ptr + row, vocab_start, layout, inv_temp, dtype, SOFTCAP,
        inv_temp_ptr is not None, z_sum_ptr is not None, e_ptr is not None, "evict_last", 1, 1, False, BLOCK_V, L, W,
    )  # fmt: skip
    if NUM_PIECES > 1:
        partials_ptr += row * (PARTIAL_TERMS * NUM_PIECES)
        publish_terms(partials_ptr, m, s, t, z_sum, e, piece, z_sum_ptr is not None, e_ptr is not None, NUM_PIECES)
        if PUBLISH_ONLY:
            return
        m, s, t, z_sum, e = wait_for_terms(
            partials_ptr, z_sum, e, dtype, z_sum_ptr is not None, e_ptr is not None, NUM_PIECES, P
        )
    scale, target, uniform = cross_entropy_coefficients(
        scalar(row_max(m, s)), scalar(s), t, coef, num_classes, LABEL_SMOOTHING, Z_LOSS
    )
    if piece == 0:
        store_terms(row, m, s, t, z_sum, e, m_ptr, s_ptr, t_ptr, z_sum_ptr, e_ptr, 1, 1)
        tl.store(scale_ptr + row, scale)
        tl.store(target_ptr + row, scalar(target))
        if uniform_ptr is not None:
            tl.store(uniform_ptr + row, uniform)
    if ignored | (coef == 0):
        store_zeros(grad_ptr, piece_vocab, grad_layout, BLOCK_V, W)
        return
    write_row_grad(
        grad_ptr, row_ptr, piece_vocab, load_labels(labels_ptr + row, vocab_start, 1, 1), grad_layout, layout, inv_temp,
        scalar(row_max(m, s)), t, scale, target, uniform, 0.0, dtype, SOFTCAP, inv_temp_ptr is not None,
        LABEL_SMOOTHING != 0, False, BLOCK_V, W,
    )  # fmt: skip
