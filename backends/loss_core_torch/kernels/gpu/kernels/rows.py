"""Kernels over rows of logits: their terms, their gradient, and both in one."""

# T = tokens (rows), V = vocabulary (of this rank), N = targets of a row, up to a power of 2; a block is [K, L, W]:
# K vectors of W columns for each of L lanes (threads)

import triton
import triton.language as tl

from loss_core_torch.kernels.gpu.kernels.memory import (
    body_start,
    edge_columns,
    is_ignored,
    is_there,
    load_factor,
    load_logits,
    row_start,
    store_grad,
    store_zeros,
    whole_vectors,
)
from loss_core_torch.kernels.gpu.kernels.pieces import TOLD, piece_of_row, tell, told
from loss_core_torch.kernels.gpu.kernels.terms import (
    cross_entropy_coefficients,
    exp,
    extend,
    finite,
    fold,
    lowest,
    only,
    seen,
    tanh,
    times_exponent,
    total,
)


@triton.jit
def shaped(z, mask, inverse, SOFTCAP: tl.constexpr, TEMPERED: tl.constexpr):
    """softcap(z) times the inverse temperature, -inf outside of the mask."""
    if SOFTCAP != 0:
        z = tl.where(mask, SOFTCAP * tanh(z / SOFTCAP), float("-inf"))
    if TEMPERED:
        z = z * inverse
    return z


@triton.jit
def load_labels(labels_ptr, vocab_start, NUM: tl.constexpr, N: tl.constexpr):
    """[N] columns of a row's targets, -1 behind the last of NUM."""
    offs_n = tl.arange(0, N).to(tl.int64)
    labels = tl.load(labels_ptr + offs_n, mask=offs_n < NUM, other=0) - vocab_start
    return tl.where(offs_n < NUM, labels, -1)


@triton.jit
def load_of_targets(ptr, row, NUM: tl.constexpr, N: tl.constexpr):
    """[N] numbers of a row's targets."""
    offs_n = tl.arange(0, N).to(tl.int64)
    return tl.load(ptr + row * NUM + offs_n, mask=offs_n < NUM, other=0.0)


@triton.jit
def without_targets(z, offs_v, end, target, labels_ptr, vocab_start, NUM: tl.constexpr):
    """A block with -inf at those columns of the targets that are below `end`; and the next target.

    They ascend, so that each is compared with the columns of one block.
    """
    column = tl.load(labels_ptr + target, mask=target < NUM, other=0) - vocab_start
    while (target < NUM) & (column < end):
        z = tl.where(offs_v == column.to(tl.int32), float("-inf"), z)
        target += 1
        column = tl.load(labels_ptr + target, mask=target < NUM, other=0) - vocab_start
    return z, target


@triton.jit
def row_terms(
    row_ptr, vocab, labels_ptr, vocab_start, layout, inverse, dtype: tl.constexpr, SOFTCAP: tl.constexpr,
    TEMPERED: tl.constexpr, Z_SUM: tl.constexpr, E: tl.constexpr, EVICT: tl.constexpr, NUM: tl.constexpr,
    N: tl.constexpr, LEFT_OUT: tl.constexpr, BLOCK_V: tl.constexpr, L: tl.constexpr, W: tl.constexpr,
    ALIKE: tl.constexpr,
):  # fmt: skip
    """(m [1], s [1], t [N], z_sum [1], e [1]) of a row or of a piece; z_sum is 0 without Z_SUM, e without E.

    m is finite, and s 0 where there was no logit above -inf. LEFT_OUT says whether t alone is of the targets' columns.
    """
    label = load_labels(labels_ptr, vocab_start, NUM, N)
    owned = (label >= 0) & (label < vocab)
    # Before the loop: where a gradient follows, it may be written into the same memory.
    t = tl.load(row_ptr + label * layout.stride_v, mask=owned, other=float("-inf")).to(dtype)
    t = shaped(t, owned, inverse, SOFTCAP, TEMPERED)
    head, body = whole_vectors(row_ptr, vocab, W, ALIKE)
    target = tl.full([], 0, tl.int64)
    body_ptr = body_start(row_ptr, head, layout, ALIKE)
    m = lowest(L, dtype)
    s = tl.zeros([L], dtype)
    z_sum = tl.zeros([L], dtype)
    e = tl.zeros([L], dtype)
    for start in range(0, body, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < body
        z = load_logits(body_ptr, offs_v, mask_v, layout, dtype, EVICT)
        z = shaped(z, mask_v, inverse, SOFTCAP, TEMPERED)
        if LEFT_OUT:
            end = head + start + BLOCK_V
            z, target = without_targets(z, head + offs_v, end, target, labels_ptr, vocab_start, NUM)
        if Z_SUM:
            z_sum += total(tl.reshape(tl.where(mask_v, z, 0.0), [BLOCK_V // (L * W), L, W]))
        m, s, e = extend(m, s, e, tl.reshape(z, [BLOCK_V // (L * W), L, W]), E)
    m, s, e = fold(m, s, e, E)
    z_sum = tl.sum(z_sum, 0, keep_dims=True)
    if body < vocab:
        edge = edge_columns(head, body, W)
        z_E = load_logits(row_ptr, edge, edge < vocab, layout, dtype, EVICT)
        z_E = shaped(z_E, edge < vocab, inverse, SOFTCAP, TEMPERED)
        if LEFT_OUT:
            z_E = tl.where(tl.max((edge[:, None] == label[None, :]).to(tl.int32), 1) > 0, float("-inf"), z_E)
        z_sum += tl.sum(tl.where(edge < vocab, z_E, 0.0), 0, keep_dims=True)
        m, s, e = extend(m, s, e, tl.reshape(z_E, [1, 1, 2 * W]), E)
    return m, s, t, z_sum, e


@triton.jit
def tell_terms(
    told_ptr, m, s, t, z_sum, e, piece, Z_SUM: tl.constexpr, E: tl.constexpr, PIECES: tl.constexpr
):  # fmt: skip
    """Tell `row_terms` of a piece; t is of one target."""
    tell(told_ptr, 0, only(m), piece, PIECES)
    tell(told_ptr, 1, only(s), piece, PIECES)
    tell(told_ptr, 2, only(t), piece, PIECES)
    if Z_SUM:
        tell(told_ptr, 3, only(z_sum), piece, PIECES)
    if E:
        tell(told_ptr, 4, only(e), piece, PIECES)


@triton.jit
def told_terms(
    told_ptr, z_sum, e, dtype: tl.constexpr, Z_SUM: tl.constexpr, E: tl.constexpr, PIECES: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """`row_terms` of the whole row; z_sum and e as they are where they are not wanted."""
    zeros = tl.zeros([P], dtype)
    m = told(told_ptr, 0, lowest(P, dtype), PIECES)
    s = told(told_ptr, 1, zeros, PIECES)
    t = tl.max(told(told_ptr, 2, zeros + float("-inf"), PIECES), 0, keep_dims=True)
    if Z_SUM:
        z_sum = tl.sum(told(told_ptr, 3, zeros, PIECES), 0, keep_dims=True)
    if E:
        m, s, e = fold(m, s, told(told_ptr, 4, zeros, PIECES), True)
    else:
        m, s, _ = fold(m, s, zeros, False)
    return m, s, t, z_sum, e


@triton.jit
def store_terms(
    row, m, s, t, z_sum, e, m_ptr, s_ptr, t_ptr, z_sum_ptr, e_ptr, NUM: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """Terms of a row, as `row_terms` has them; the pointers of those that are not needed are None."""
    tl.store(m_ptr + row, only(seen(m, s)))
    tl.store(s_ptr + row, only(s))
    offs_n = tl.arange(0, N).to(tl.int64)
    tl.store(t_ptr + row * NUM + offs_n, t, mask=offs_n < NUM)
    if z_sum_ptr is not None:
        tl.store(z_sum_ptr + row, only(z_sum))
    if e_ptr is not None:
        tl.store(e_ptr + row, only(e))


@triton.jit
def gradient(x, scale, uniform, slope, UNIFORM: tl.constexpr, SLOPE: tl.constexpr):
    """exp(x) * (scale + slope * x) - uniform; see `row_terms.Coefficients`."""
    grad = exp(x)
    if SLOPE:
        grad = grad * scale + times_exponent(grad, x) * slope
    else:
        grad = grad * scale
    if UNIFORM:
        grad = grad - uniform
    return grad


@triton.jit
def logits_grad(
    z, m, inverse, scale, uniform, slope, SOFTCAP: tl.constexpr, TEMPERED: tl.constexpr, UNIFORM: tl.constexpr,
    SLOPE: tl.constexpr,
):  # fmt: skip
    """`gradient` of logits as they lie, times the softcap's slope."""
    bent = z
    if SOFTCAP != 0:
        bent = tanh(z / SOFTCAP)
        z = SOFTCAP * bent
    if TEMPERED:
        z = z * inverse
    grad = gradient(z - finite(m), scale, uniform, slope, UNIFORM, SLOPE)
    if SOFTCAP != 0:
        grad = grad * (1.0 - bent * bent)
    return grad


@triton.jit
def write_row_grad(
    grad_ptr, row_ptr, vocab, label, grad_layout, layout, inverse, m, t, scale, target, uniform, slope,
    dtype: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERED: tl.constexpr, UNIFORM: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_V: tl.constexpr, W: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """Gradient of a row by its logits: `gradient`, or `target`, times the slope of softcap and temperature.

    label, t and target are [N], of the row's targets. Each logit is read before its gradient is written, which may be
    over it.
    """
    if TEMPERED:
        scale, target, uniform, slope = scale * inverse, target * inverse, uniform * inverse, slope * inverse
    head, body = whole_vectors(row_ptr, vocab, W, ALIKE)
    from_ptr, to_ptr = body_start(row_ptr, head, layout, ALIKE), body_start(grad_ptr, head, grad_layout, ALIKE)
    blocks = tl.cdiv(body, BLOCK_V)
    for block in range(blocks):
        offs_v = (blocks - 1 - block) * BLOCK_V + tl.arange(0, BLOCK_V)
        mask_v = offs_v < body
        z = load_logits(from_ptr, offs_v, mask_v, layout, dtype, "evict_first")
        grad = logits_grad(z, m, inverse, scale, uniform, slope, SOFTCAP, TEMPERED, UNIFORM, SLOPE)
        store_grad(to_ptr, offs_v, mask_v, grad_layout, grad)
    if body < vocab:
        edge = edge_columns(head, body, W)
        z_E = load_logits(row_ptr, edge, edge < vocab, layout, dtype, "evict_first")
        grad_E = logits_grad(z_E, m, inverse, scale, uniform, slope, SOFTCAP, TEMPERED, UNIFORM, SLOPE)
        store_grad(grad_ptr, edge, edge < vocab, grad_layout, grad_E)
    # Over what the loop has stored there: the loop compares no indices.
    if SOFTCAP != 0:
        bent = t / SOFTCAP
        if TEMPERED:
            bent = bent / inverse
        target = target * (1.0 - bent * bent)
    # Another thread of this program has stored the loop's value there, which must not come after this one.
    tl.debug_barrier()
    store_grad(grad_ptr, label, (label >= 0) & (label < vocab), grad_layout, target)


@triton.jit
def row_terms_kernel(
    logits_ptr,  # [T, V]
    labels_ptr,  # [T, NUM] int64, over the whole vocabulary; ascending in a row
    keep_ptr,  # [T] bool, or None
    inverse_ptr,  # [T] inverse temperatures, or None
    m_ptr, s_ptr,  # [T]
    t_ptr,  # [T, NUM]
    z_sum_ptr, e_ptr,  # [T], or None
    vocab_start, vocab, layout,
    SOFTCAP: tl.constexpr, NUM: tl.constexpr, N: tl.constexpr, LEFT_OUT: tl.constexpr, BLOCK_V: tl.constexpr,
    L: tl.constexpr, W: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """Terms of one row: program (row). Those of an empty piece for an ignored row."""
    row = tl.program_id(0).to(tl.int64)
    end = tl.where(is_ignored(keep_ptr, row), 0, vocab)
    row_ptr = logits_ptr + row_start(row, layout)
    inverse = 1.0
    if inverse_ptr is not None:
        inverse = tl.load(inverse_ptr + row)
    m, s, t, z_sum, e = row_terms(
        row_ptr, end, labels_ptr + row * NUM, vocab_start, layout, inverse, m_ptr.dtype.element_ty, SOFTCAP,
        inverse_ptr is not None, z_sum_ptr is not None, e_ptr is not None, "evict_first", NUM, N, LEFT_OUT, BLOCK_V, L,
        W, ALIKE,
    )  # fmt: skip
    store_terms(row, m, s, t, z_sum, e, m_ptr, s_ptr, t_ptr, z_sum_ptr, e_ptr, NUM, N)


@triton.jit
def row_grad_kernel(
    grad_ptr,  # [T, V]; may be the logits
    logits_ptr,  # [T, V]
    labels_ptr,  # [T, NUM] int64, over the whole vocabulary
    keep_ptr,  # [T] bool, or None
    inverse_ptr,  # [T] inverse temperatures, or None
    m_ptr,  # [T]
    t_ptr,  # [T, NUM]
    scale_ptr,  # [T]
    target_ptr,  # [T, NUM]
    uniform_ptr, slope_ptr,  # [T], or None
    factor_ptr,  # scalar, of all coefficients, or None
    vocab_start, vocab, grad_layout, layout,
    SOFTCAP: tl.constexpr, NUM: tl.constexpr, N: tl.constexpr, HELD: tl.constexpr, BLOCK_V: tl.constexpr,
    L: tl.constexpr, W: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """Gradient of one row: program (row)."""
    dtype: tl.constexpr = m_ptr.dtype.element_ty
    factor = load_factor(factor_ptr, dtype)
    if is_there(factor, HELD):
        return
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row_start(row, layout)
    grad_ptr += row_start(row, grad_layout)
    if is_ignored(keep_ptr, row):
        store_zeros(grad_ptr, vocab, grad_layout, BLOCK_V, W, ALIKE)
        return
    label = load_labels(labels_ptr + row * NUM, vocab_start, NUM, N)
    inverse = 1.0
    if inverse_ptr is not None:
        inverse = tl.load(inverse_ptr + row)
    uniform = 0.0
    if uniform_ptr is not None:
        uniform = tl.load(uniform_ptr + row) * factor
    slope = 0.0
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + row) * factor
    write_row_grad(
        grad_ptr, row_ptr, vocab, label, grad_layout, layout, inverse, tl.load(m_ptr + row),
        load_of_targets(t_ptr, row, NUM, N), tl.load(scale_ptr + row) * factor,
        load_of_targets(target_ptr, row, NUM, N) * factor, uniform, slope, dtype, SOFTCAP, inverse_ptr is not None,
        uniform_ptr is not None, slope_ptr is not None, BLOCK_V, W, ALIKE,
    )  # fmt: skip


@triton.jit
def row_kernel(
    grad_ptr,  # [T, V]; may be the logits
    logits_ptr,  # [T, V]
    labels_ptr,  # [T] int64, over the whole vocabulary
    keep_ptr,  # [T] bool, or None
    inverse_ptr,  # [T] inverse temperatures, or None
    coef_ptr,  # [T] factor of each row's loss
    m_ptr, s_ptr, t_ptr,  # [T]
    z_sum_ptr, e_ptr,  # [T], or None
    scale_ptr, target_ptr,  # [T]
    uniform_ptr,  # [T], or None
    told_ptr,  # [T, TOLD, PIECES] bits, UNTOLD; or None for one piece
    num_classes,  # of all pieces of the vocabulary
    vocab_start, vocab, grad_layout, layout,
    SOFTCAP: tl.constexpr, LABEL_SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, PIECES: tl.constexpr,
    P: tl.constexpr, PIECE_V: tl.constexpr, TELL_ONLY: tl.constexpr, BLOCK_V: tl.constexpr, L: tl.constexpr,
    W: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """Terms and gradient of one row, and the gradient's coefficients: program (row, piece).

    A coefficient of 0 gives a gradient of 0, whatever the row holds.
    """
    row, piece, first, columns = piece_of_row(vocab, PIECE_V, PIECES)
    dtype: tl.constexpr = m_ptr.dtype.element_ty
    ignored = is_ignored(keep_ptr, row)
    row_ptr = logits_ptr + row_start(row, layout) + first.to(tl.int64) * layout.stride_v
    grad_ptr += row_start(row, grad_layout) + first.to(tl.int64) * grad_layout.stride_v
    vocab_start += first
    coef = tl.load(coef_ptr + row)
    inverse = 1.0
    if inverse_ptr is not None:
        inverse = tl.load(inverse_ptr + row)
    m, s, t, z_sum, e = row_terms(
        row_ptr, tl.where(ignored, 0, columns), labels_ptr + row, vocab_start, layout, inverse, dtype, SOFTCAP,
        inverse_ptr is not None, z_sum_ptr is not None, e_ptr is not None, "evict_last", 1, 1, False, BLOCK_V, L, W,
        ALIKE,
    )  # fmt: skip
    if PIECES > 1:
        told_ptr += row * (TOLD * PIECES)
        tell_terms(told_ptr, m, s, t, z_sum, e, piece, z_sum_ptr is not None, e_ptr is not None, PIECES)
        if TELL_ONLY:
            return
        m, s, t, z_sum, e = told_terms(told_ptr, z_sum, e, dtype, z_sum_ptr is not None, e_ptr is not None, PIECES, P)
    scale, target, uniform = cross_entropy_coefficients(
        only(seen(m, s)), only(s), t, coef, num_classes, LABEL_SMOOTHING, Z_LOSS
    )
    if piece == 0:
        store_terms(row, m, s, t, z_sum, e, m_ptr, s_ptr, t_ptr, z_sum_ptr, e_ptr, 1, 1)
        tl.store(scale_ptr + row, scale)
        tl.store(target_ptr + row, only(target))
        if uniform_ptr is not None:
            tl.store(uniform_ptr + row, uniform)
    if ignored | (coef == 0):
        store_zeros(grad_ptr, columns, grad_layout, BLOCK_V, W, ALIKE)
        return
    write_row_grad(
        grad_ptr, row_ptr, columns, load_labels(labels_ptr + row, vocab_start, 1, 1), grad_layout, layout, inverse,
        only(seen(m, s)), t, scale, target, uniform, 0.0, dtype, SOFTCAP, inverse_ptr is not None, LABEL_SMOOTHING != 0,
        False, BLOCK_V, W, ALIKE,
    )  # fmt: skip
