"""The kernels of `torch:triton`. Launches are in `launch`, sizes in `sizes`.

Terms of a row live in LANES independent lanes until the end of the row, so that the loop over the vocabulary holds no
barrier and one rescaling serves UNROLL logits. The formulas are those of `loss_core.row_terms`; every difference is
taken from the maximum, and a probability is exp(z - m) * (1 / s), never exp(z - lse).

Offsets are 64-bit throughout: a row begins where T * V may be beyond 2^31, and so may a strided column be.
"""

# T = tokens, V = vocabulary (of this rank), K = UNROLL, L = LANES; BLOCK_V = K * L columns

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# 1 / GAP_UNIT of `row_terms`.
GAP_FACTOR = tl.constexpr(2.0**-20)


# --- terms of rows


@triton.jit
def finite(m):
    """The maximum to subtract: 0 in place of -inf."""
    # -inf minus -inf is NaN: an empty piece must stay the identity.
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def moved(m, s, new_m):
    """Sum s of exp(z - m), relative to another maximum."""
    return s * tl.exp(m - finite(new_m))


@triton.jit
def combine(m_a, s_a, m_b, s_b):
    """(m, s) of two pieces as one; see `row_terms.combine`."""
    m = tl.maximum(m_a, m_b)
    return m, moved(m_a, s_a, m) + moved(m_b, s_b, m)


@triton.jit
def extend(m, s, z_KL):
    """`combine` of each lane's terms with the K logits that come to it."""
    new_m = tl.maximum(m, tl.max(z_KL, 0))
    return new_m, moved(m, s, new_m) + tl.sum(tl.exp(z_KL - finite(new_m)[None, :]), 0)


@triton.jit
def fold(m_L, s_L):
    """`combine` over all lanes."""
    m = tl.max(m_L, 0)
    return m, tl.sum(moved(m_L, s_L, m), 0)


@triton.jit
def cross_entropy_coefficients(s, upstream, num_classes, LABEL_SMOOTHING: tl.constexpr):
    """(scale, target, uniform) of a row's gradient; mirrors `row_terms.cross_entropy_coefficients`.

    `uniform` is used only where the loss needs z_sum.
    """
    return upstream / s, upstream * (LABEL_SMOOTHING - 1.0), upstream * LABEL_SMOOTHING / num_classes


# --- terms of pairs of rows


@triton.jit
def pair_moved(m_t, s_t, a, m_s, s_s, new_m_t, new_m_s):
    """(s_t, a, s_s) relative to other maxima; see `row_terms._moved`."""
    shift_t, shift_s = m_t - finite(new_m_t), m_s - finite(new_m_s)
    scale_t = tl.exp(shift_t)
    s_t = s_t * scale_t
    # Weight 0 times an infinite shift must be 0: such a piece holds no teacher probability.
    shifted = tl.where(s_t == 0, 0.0, s_t * GAP_FACTOR * (shift_t - shift_s))
    return s_t, tl.where(scale_t == 0, 0.0, a * scale_t) + shifted, s_s * tl.exp(shift_s)


@triton.jit
def combine_pairs(m_t_a, s_t_a, a_a, m_s_a, s_s_a, m_t_b, s_t_b, a_b, m_s_b, s_s_b):
    """As `combine`, for pairs; see `row_terms.combine_pairs`."""
    m_t, m_s = tl.maximum(m_t_a, m_t_b), tl.maximum(m_s_a, m_s_b)
    s_t_a, a_a, s_s_a = pair_moved(m_t_a, s_t_a, a_a, m_s_a, s_s_a, m_t, m_s)
    s_t_b, a_b, s_s_b = pair_moved(m_t_b, s_t_b, a_b, m_s_b, s_s_b, m_t, m_s)
    return m_t, s_t_a + s_t_b, a_a + a_b, m_s, s_s_a + s_s_b


@triton.jit
def extend_pairs(m_t, s_t, a, m_s, s_s, zt_KL, zs_KL):
    """`combine_pairs` of each lane's terms with the K pairs of logits that come to it."""
    new_m_t, new_m_s = tl.maximum(m_t, tl.max(zt_KL, 0)), tl.maximum(m_s, tl.max(zs_KL, 0))
    s_t, a, s_s = pair_moved(m_t, s_t, a, m_s, s_s, new_m_t, new_m_s)
    zt_KL = zt_KL - finite(new_m_t)[None, :]
    zs_KL = zs_KL - finite(new_m_s)[None, :]
    e_KL = tl.exp(zt_KL)
    # A class that the teacher rules out weighs nothing, even where its gap is inf or NaN.
    gap_KL = tl.where(e_KL == 0, 0.0, (zt_KL - zs_KL) * GAP_FACTOR)
    return new_m_t, s_t + tl.sum(e_KL, 0), a + tl.sum(e_KL * gap_KL, 0), new_m_s, s_s + tl.sum(tl.exp(zs_KL), 0)


@triton.jit
def fold_pairs(m_t_L, s_t_L, a_L, m_s_L, s_s_L):
    """`combine_pairs` over all lanes."""
    m_t, m_s = tl.max(m_t_L, 0), tl.max(m_s_L, 0)
    s_t_L, a_L, s_s_L = pair_moved(m_t_L, s_t_L, a_L, m_s_L, s_s_L, m_t, m_s)
    return m_t, tl.sum(s_t_L, 0), tl.sum(a_L, 0), m_s, tl.sum(s_s_L, 0)


# --- memory


@triton.jit
def row_start(row, layout):
    """Offset of a row in elements; `row` is int64 and counts in C order, `layout` is a `launch.Layout`."""
    offset = row * 0
    for dim in tl.static_range(len(layout.sizes)):
        offset += (row % layout.sizes[dim]) * layout.strides[dim]
        row = row // layout.sizes[dim]
    return offset + row * layout.strides[len(layout.sizes)]


@triton.jit
def load_logits(row_ptr, offs_v, mask_v, layout, dtype: tl.constexpr, EVICT: tl.constexpr):
    """A block of a row, -inf outside of it.

    EVICT says what the L2 cache does with it: "evict_last" where the row will be read once more at once,
    "evict_first" where it was read for the last time, "" where neither is known.
    """
    ptrs = row_ptr + offs_v.to(tl.int64) * layout.stride_v
    return tl.load(ptrs, mask=mask_v, other=float("-inf"), eviction_policy=EVICT).to(dtype)


@triton.jit
def store_grad_block(row_ptr, offs_v, mask_v, layout, grad):
    """A block of a row of a gradient, in the dtype that is stored there."""
    ptrs = row_ptr + offs_v.to(tl.int64) * layout.stride_v
    tl.store(ptrs, rounded(grad, row_ptr.dtype.element_ty), mask=mask_v)


@triton.jit
def store_zeros(row_ptr, begin, end, layout, BLOCK_V: tl.constexpr):
    """Gradient of an ignored row: not a product with 0, its logits may be inf or NaN and are not even read."""
    for start in range(begin, end, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        store_grad_block(row_ptr, offs_v, offs_v < end, layout, tl.zeros([BLOCK_V], tl.float32))


@triton.jit
def is_ignored(keep_ptr, row):
    """Whether a row is to be ignored: never where keep_ptr is None."""
    if keep_ptr is None:
        ignored = tl.full([], False, tl.int1)
    else:
        ignored = tl.load(keep_ptr + row) == 0
    return ignored


@triton.jit
def is_one(ptr):
    """Whether a scalar in memory is exactly 1: never where ptr is None."""
    if ptr is None:
        one = tl.full([], False, tl.int1)
    else:
        one = tl.load(ptr) == 1
    return one


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x in the dtype that is stored, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        # GPUs round; Triton's interpreter cuts off. With this carry first, cutting off is rounding.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def tanh(x):
    """tanh to a few ulp, in float32 and in float64."""
    # Triton has none of its own for every target. 1 - 2 / (e + 1) cancels near 0; there a continued fraction,
    # of which seven levels are exact to 3e-16 below 1/2, takes its place.
    size = tl.abs(x)
    square = x * x
    above = 135135.0 + square * (17325.0 + square * (378.0 + square))
    below = 135135.0 + square * (62370.0 + square * (3150.0 + square * 28.0))
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.5, x * (above / below), tl.where(x < 0, -far, far))


# --- cross entropy


@triton.jit
def row_terms(
    row_ptr, begin, end, label, layout, dtype: tl.constexpr, SOFTCAP: tl.constexpr, Z_SUM: tl.constexpr,
    EVICT: tl.constexpr, BLOCK_V: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """(m, s, t, z_sum) of the columns [begin, end) of a row; z_sum is 0 without Z_SUM."""
    LANES: tl.constexpr = BLOCK_V // UNROLL
    owned = (label >= begin) & (label < end)
    # Before the loop: where a gradient follows, it may be written into the same memory.
    t = tl.load(row_ptr + label * layout.stride_v, mask=owned, other=float("-inf")).to(dtype)
    if SOFTCAP != 0:
        t = tl.where(owned, SOFTCAP * tanh(t / SOFTCAP), float("-inf"))
    m = tl.full([LANES], float("-inf"), dtype)
    s = tl.zeros([LANES], dtype)
    z_sum = tl.zeros([LANES], dtype)
    for start in range(begin, end, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < end
        z = load_logits(row_ptr, offs_v, mask_v, layout, dtype, EVICT)
        if SOFTCAP != 0:
            z = tl.where(mask_v, SOFTCAP * tanh(z / SOFTCAP), float("-inf"))
        if Z_SUM:
            z_sum += tl.sum(tl.reshape(tl.where(mask_v, z, 0.0), [UNROLL, LANES]), 0)
        m, s = extend(m, s, tl.reshape(z, [UNROLL, LANES]))
    row_m, row_s = fold(m, s)
    return row_m, row_s, t, tl.sum(z_sum, 0)


@triton.jit
def write_row_grad(
    grad_ptr, row_ptr, begin, end, label, grad_layout, layout, m, t, scale, target, uniform, dtype: tl.constexpr,
    SOFTCAP: tl.constexpr, UNIFORM: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradient of the columns [begin, end) of a row: exp(z - m) * scale - uniform, plus target at the label's.

    All of it times the softcap's slope. Each logit is read before its gradient is written, which may be over it.
    """
    base = finite(m)
    for start in range(begin, end, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < end
        z = load_logits(row_ptr, offs_v, mask_v, layout, dtype, "evict_first")
        if SOFTCAP != 0:
            bent = tanh(z / SOFTCAP)
            z = SOFTCAP * bent
        grad = tl.exp(z - base) * scale
        if UNIFORM:
            grad = grad - uniform
        if SOFTCAP != 0:
            grad = grad * (1.0 - bent * bent)
        store_grad_block(grad_ptr, offs_v, mask_v, grad_layout, grad)
    # From t itself, so that the element is rounded once and the loop compares no indices.
    grad = tl.exp(t - base) * scale + target
    if UNIFORM:
        grad = grad - uniform
    if SOFTCAP != 0:
        bent = t / SOFTCAP
        grad = grad * (1.0 - bent * bent)
    # Another thread of this program has stored the loop's value there, which must not come after this one.
    tl.debug_barrier()
    owned = (label >= begin) & (label < end)
    store_grad_block(grad_ptr, label, owned, grad_layout, grad)


@triton.jit
def row_terms_kernel(
    logits_ptr,  # [T, V]
    labels_ptr,  # [T] int64, over the whole vocabulary
    keep_ptr,  # [T] bool, or None
    m_ptr, s_ptr, t_ptr,  # [T, parts]
    z_sum_ptr,  # [T, parts], or None
    vocab_start, vocab, part, layout,
    SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Terms of one part of one row: program (row, part). Those of an empty piece for an ignored row."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, vocab)
    end = tl.where(is_ignored(keep_ptr, row), begin, end)
    row_ptr = logits_ptr + row_start(row, layout)
    label = tl.load(labels_ptr + row) - vocab_start
    m, s, t, z_sum = row_terms(
        row_ptr, begin, end, label, layout, m_ptr.dtype.element_ty, SOFTCAP, z_sum_ptr is not None, "", BLOCK_V, UNROLL
    )
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(m_ptr + at, m)
    tl.store(s_ptr + at, s)
    tl.store(t_ptr + at, t)
    if z_sum_ptr is not None:
        tl.store(z_sum_ptr + at, z_sum)


@triton.jit
def row_fold_kernel(
    m_parts_ptr, s_parts_ptr, t_parts_ptr, z_sum_parts_ptr,  # [T, parts]; the last may be None
    m_ptr, s_ptr, t_ptr, z_sum_ptr,  # [T]
    parts, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """Terms of a row from those of its parts: program (row)."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_PARTS)
    mask = offs < parts
    at = row * parts + offs
    m, s = fold(
        tl.load(m_parts_ptr + at, mask=mask, other=float("-inf")), tl.load(s_parts_ptr + at, mask=mask, other=0.0)
    )
    tl.store(m_ptr + row, m)
    tl.store(s_ptr + row, s)
    tl.store(t_ptr + row, tl.max(tl.load(t_parts_ptr + at, mask=mask, other=float("-inf")), 0))
    if z_sum_ptr is not None:
        tl.store(z_sum_ptr + row, tl.sum(tl.load(z_sum_parts_ptr + at, mask=mask, other=0.0), 0))


@triton.jit
def row_grad_kernel(
    grad_ptr,  # [T, V]; may be the logits
    logits_ptr,  # [T, V]
    labels_ptr,  # [T] int64, over the whole vocabulary
    keep_ptr,  # [T] bool, or None
    m_ptr, t_ptr, scale_ptr, target_ptr,  # [T]
    uniform_ptr,  # [T], or None
    unless_one_ptr,  # scalar, or None; where it is 1, the gradient is there already
    vocab_start, vocab, part, grad_layout, layout,
    SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradient of one part of one row: program (row, part)."""
    if is_one(unless_one_ptr):
        return
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, vocab)
    row_ptr = logits_ptr + row_start(row, layout)
    grad_ptr += row_start(row, grad_layout)
    if is_ignored(keep_ptr, row):
        store_zeros(grad_ptr, begin, end, grad_layout, BLOCK_V)
        return
    label = tl.load(labels_ptr + row) - vocab_start
    uniform = 0.0
    if uniform_ptr is not None:
        uniform = tl.load(uniform_ptr + row)
    write_row_grad(
        grad_ptr, row_ptr, begin, end, label, grad_layout, layout, tl.load(m_ptr + row), tl.load(t_ptr + row),
        tl.load(scale_ptr + row), tl.load(target_ptr + row), uniform, m_ptr.dtype.element_ty, SOFTCAP,
        uniform_ptr is not None, BLOCK_V,
    )  # fmt: skip


@triton.jit
def row_kernel(
    grad_ptr,  # [T, V]; may be the logits
    logits_ptr,  # [T, V]
    labels_ptr,  # [T] int64, over the whole vocabulary
    keep_ptr,  # [T] bool, or None
    coef_ptr,  # [T] factor of each row's loss
    m_ptr, s_ptr, t_ptr,  # [T]
    z_sum_ptr,  # [T], or None
    num_classes,  # of all pieces of the vocabulary
    vocab_start, vocab, grad_layout, layout,
    SOFTCAP: tl.constexpr, LABEL_SMOOTHING: tl.constexpr, BLOCK_V: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Terms and gradient of one row: program (row). A coefficient of 0 gives a gradient of 0, whatever the row holds.

    The second read of the row follows at once on the first and finds it in the L2 cache.
    """
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = m_ptr.dtype.element_ty
    ignored = is_ignored(keep_ptr, row)
    end = tl.where(ignored, 0, vocab)
    row_ptr = logits_ptr + row_start(row, layout)
    grad_ptr += row_start(row, grad_layout)
    label = tl.load(labels_ptr + row) - vocab_start
    m, s, t, z_sum = row_terms(
        row_ptr, 0, end, label, layout, dtype, SOFTCAP, z_sum_ptr is not None, "evict_last", BLOCK_V, UNROLL
    )
    tl.store(m_ptr + row, m)
    tl.store(s_ptr + row, s)
    tl.store(t_ptr + row, t)
    if z_sum_ptr is not None:
        tl.store(z_sum_ptr + row, z_sum)
    coef = tl.load(coef_ptr + row)
    if ignored | (coef == 0):
        store_zeros(grad_ptr, 0, vocab, grad_layout, BLOCK_V)
        return
    scale, target, uniform = cross_entropy_coefficients(s, coef, num_classes, LABEL_SMOOTHING)
    # The sum of all logits has the same gradient for each: a loss with z_sum has a uniform part.
    write_row_grad(
        grad_ptr, row_ptr, 0, vocab, label, grad_layout, layout, m, t, scale, target, uniform, dtype, SOFTCAP,
        z_sum_ptr is not None, BLOCK_V,
    )  # fmt: skip


# --- distillation. `inverse_temperature` is fp64: as a Python float it would arrive in float32, too coarse for float64.


@triton.jit
def pair_terms(
    student_ptr, teacher_ptr, begin, end, factor, s_layout, t_layout, dtype: tl.constexpr, EVICT: tl.constexpr,
    BLOCK_V: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """(m_t, s_t, a, m_s, s_s) of the columns [begin, end) of a pair of rows."""
    LANES: tl.constexpr = BLOCK_V // UNROLL
    m_t = tl.full([LANES], float("-inf"), dtype)
    s_t = tl.zeros([LANES], dtype)
    a = tl.zeros([LANES], dtype)
    m_s = tl.full([LANES], float("-inf"), dtype)
    s_s = tl.zeros([LANES], dtype)
    for start in range(begin, end, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < end
        zt = load_logits(teacher_ptr, offs_v, mask_v, t_layout, dtype, EVICT) * factor
        zs = load_logits(student_ptr, offs_v, mask_v, s_layout, dtype, EVICT) * factor
        zt_KL = tl.reshape(zt, [UNROLL, LANES])
        m_t, s_t, a, m_s, s_s = extend_pairs(m_t, s_t, a, m_s, s_s, zt_KL, tl.reshape(zs, [UNROLL, LANES]))
    return fold_pairs(m_t, s_t, a, m_s, s_s)


@triton.jit
def write_pair_grad(
    grad_ptr, student_ptr, teacher_ptr, begin, end, factor, grad_layout, s_layout, t_layout, m_t, s_t, m_s, s_s, kl,
    coef, dtype: tl.constexpr, OF_TEACHER: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradient of coef * KL by the student's logits, or by the teacher's, of the columns [begin, end)."""
    base_t, base_s = finite(m_t), finite(m_s)
    scale_t, scale_s = coef / s_t, coef / s_s
    if OF_TEACHER:
        centre = tl.log(s_t) - tl.log(s_s) + kl  # `row_terms.kl_centre`
    for start in range(begin, end, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < end
        zt = load_logits(teacher_ptr, offs_v, mask_v, t_layout, dtype, "evict_first") * factor - base_t
        zs = load_logits(student_ptr, offs_v, mask_v, s_layout, dtype, "evict_first") * factor - base_s
        e_t = tl.exp(zt)
        if OF_TEACHER:
            grad = tl.where(e_t == 0, 0.0, (zt - zs) - centre) * e_t * scale_t
        else:
            grad = tl.exp(zs) * scale_s - e_t * scale_t
        store_grad_block(grad_ptr, offs_v, mask_v, grad_layout, grad)


@triton.jit
def pair_terms_kernel(
    student_ptr, teacher_ptr,  # [T, V]
    keep_ptr,  # [T] bool, or None
    m_t_ptr, s_t_ptr, a_ptr, m_s_ptr, s_s_ptr,  # [T, parts]
    inverse_temperature: "fp64",  # type: ignore[name-defined]  # noqa: F821
    vocab, part, s_layout, t_layout,
    BLOCK_V: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Terms of one part of one pair of rows: program (row, part). Those of an empty piece for an ignored row."""
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = m_t_ptr.dtype.element_ty
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, vocab)
    end = tl.where(is_ignored(keep_ptr, row), begin, end)
    student_ptr += row_start(row, s_layout)
    teacher_ptr += row_start(row, t_layout)
    factor = tl.full([], inverse_temperature, dtype)
    m_t, s_t, a, m_s, s_s = pair_terms(
        student_ptr, teacher_ptr, begin, end, factor, s_layout, t_layout, dtype, "", BLOCK_V, UNROLL
    )
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(m_t_ptr + at, m_t)
    tl.store(s_t_ptr + at, s_t)
    tl.store(a_ptr + at, a)
    tl.store(m_s_ptr + at, m_s)
    tl.store(s_s_ptr + at, s_s)


@triton.jit
def pair_fold_kernel(
    m_t_parts_ptr, s_t_parts_ptr, a_parts_ptr, m_s_parts_ptr, s_s_parts_ptr,  # [T, parts]
    m_t_ptr, s_t_ptr, a_ptr, m_s_ptr, s_s_ptr,  # [T]
    parts, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """Terms of a pair of rows from those of its parts: program (row)."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_PARTS)
    mask = offs < parts
    at = row * parts + offs
    m_t, s_t, a, m_s, s_s = fold_pairs(
        tl.load(m_t_parts_ptr + at, mask=mask, other=float("-inf")),
        tl.load(s_t_parts_ptr + at, mask=mask, other=0.0),
        tl.load(a_parts_ptr + at, mask=mask, other=0.0),
        tl.load(m_s_parts_ptr + at, mask=mask, other=float("-inf")),
        tl.load(s_s_parts_ptr + at, mask=mask, other=0.0),
    )
    tl.store(m_t_ptr + row, m_t)
    tl.store(s_t_ptr + row, s_t)
    tl.store(a_ptr + row, a)
    tl.store(m_s_ptr + row, m_s)
    tl.store(s_s_ptr + row, s_s)


@triton.jit
def pair_grad_kernel(
    grad_ptr,  # [T, V]
    student_ptr, teacher_ptr,  # [T, V]
    keep_ptr,  # [T] bool, or None
    m_t_ptr, s_t_ptr, m_s_ptr, s_s_ptr, kl_ptr, coef_ptr,  # [T]
    unless_one_ptr,  # scalar, or None; where it is 1, the gradient is there already
    inverse_temperature: "fp64",  # type: ignore[name-defined]  # noqa: F821
    vocab, part, grad_layout, s_layout, t_layout,
    OF_TEACHER: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradient of coef * KL by the student's logits, or by the teacher's, for one part of one pair of rows."""
    if is_one(unless_one_ptr):
        return
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = m_t_ptr.dtype.element_ty
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, vocab)
    grad_ptr += row_start(row, grad_layout)
    if is_ignored(keep_ptr, row):
        store_zeros(grad_ptr, begin, end, grad_layout, BLOCK_V)
        return
    student_ptr += row_start(row, s_layout)
    teacher_ptr += row_start(row, t_layout)
    factor = tl.full([], inverse_temperature, dtype)
    write_pair_grad(
        grad_ptr, student_ptr, teacher_ptr, begin, end, factor, grad_layout, s_layout, t_layout,
        tl.load(m_t_ptr + row), tl.load(s_t_ptr + row), tl.load(m_s_ptr + row), tl.load(s_s_ptr + row),
        tl.load(kl_ptr + row), tl.load(coef_ptr + row), dtype, OF_TEACHER, BLOCK_V,
    )  # fmt: skip


@triton.jit
def pair_kernel(
    grad_ptr,  # [T, V]
    student_ptr, teacher_ptr,  # [T, V]
    keep_ptr,  # [T] bool, or None
    coef_ptr,  # [T] factor of each row's loss
    m_t_ptr, s_t_ptr, a_ptr, m_s_ptr, s_s_ptr,  # [T]
    inverse_temperature: "fp64",  # type: ignore[name-defined]  # noqa: F821
    vocab, grad_layout, s_layout, t_layout,
    BLOCK_V: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Terms and the student's gradient of one pair of rows: program (row). See `row_kernel`."""
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = m_t_ptr.dtype.element_ty
    ignored = is_ignored(keep_ptr, row)
    end = tl.where(ignored, 0, vocab)
    grad_ptr += row_start(row, grad_layout)
    student_ptr += row_start(row, s_layout)
    teacher_ptr += row_start(row, t_layout)
    factor = tl.full([], inverse_temperature, dtype)
    m_t, s_t, a, m_s, s_s = pair_terms(
        student_ptr, teacher_ptr, 0, end, factor, s_layout, t_layout, dtype, "evict_last", BLOCK_V, UNROLL
    )
    tl.store(m_t_ptr + row, m_t)
    tl.store(s_t_ptr + row, s_t)
    tl.store(a_ptr + row, a)
    tl.store(m_s_ptr + row, m_s)
    tl.store(s_s_ptr + row, s_s)
    coef = tl.load(coef_ptr + row)
    if ignored | (coef == 0):
        store_zeros(grad_ptr, 0, vocab, grad_layout, BLOCK_V)
        return
    write_pair_grad(
        grad_ptr, student_ptr, teacher_ptr, 0, vocab, factor, grad_layout, s_layout, t_layout, m_t, s_t, m_s, s_s,
        0.0, coef, dtype, False, BLOCK_V,
    )  # fmt: skip
