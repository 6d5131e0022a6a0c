"""The kernels of `torch:triton`. Launches, sizes and checks are in `triton_launch.py`.

A row state lives in LANES independent lanes until the end of the row, so that the loop over the
vocabulary holds no barrier and one rescaling serves UNROLL logits. The formulas are those of
`loss_core.row_stats`; every difference is taken from the maximum, and a probability is
exp(z - m) * (1 / s), never exp(z - lse).

Offsets are 64-bit throughout: a row begins where T * V may be beyond 2^31, and so may a strided column be.
"""

# T = tokens, V = vocabulary (of this rank), K = UNROLL, L = LANES; BLOCK_V = K * L columns

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def row_start(row, num_1, num_2, stride_0, stride_1, stride_2):
    """Offset of a row of [n0, n1, n2, V], in elements; `row` is int64 and counts in C order."""
    outer = row // num_2
    return (outer // num_1) * stride_0 + (outer % num_1) * stride_1 + (row % num_2) * stride_2


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
    """State of two pieces together; see `loss_core.row_stats.combine`."""
    m = tl.maximum(m_a, m_b)
    return m, moved(m_a, s_a, m) + moved(m_b, s_b, m)


@triton.jit
def extend(m, s, z_KL):
    """`combine` of each lane's state with the K logits that come to it."""
    new_m = tl.maximum(m, tl.max(z_KL, 0))
    return new_m, moved(m, s, new_m) + tl.sum(tl.exp(z_KL - finite(new_m)[None, :]), 0)


@triton.jit
def fold(m_L, s_L):
    """`combine` over all lanes."""
    m = tl.max(m_L, 0)
    return m, tl.sum(moved(m_L, s_L, m), 0)


@triton.jit
def kd_moved(m_t, s_t, a, m_s, s_s, new_m_t, new_m_s):
    """(s_t, a, s_s) relative to other maxima; see `loss_core.row_stats._moved`."""
    shift_t, shift_s = m_t - finite(new_m_t), m_s - finite(new_m_s)
    scale_t = tl.exp(shift_t)
    s_t = s_t * scale_t
    # Weight 0 times an infinite shift must be 0: such a piece holds no teacher probability.
    shifted = tl.where(s_t == 0, 0.0, s_t * (shift_t - shift_s))
    return s_t, tl.where(scale_t == 0, 0.0, a * scale_t) + shifted, s_s * tl.exp(shift_s)


@triton.jit
def kd_combine(m_t_a, s_t_a, a_a, m_s_a, s_s_a, m_t_b, s_t_b, a_b, m_s_b, s_s_b):
    """As `combine`, for the state of a distillation; see `loss_core.row_stats.combine_kd`."""
    m_t, m_s = tl.maximum(m_t_a, m_t_b), tl.maximum(m_s_a, m_s_b)
    s_t_a, a_a, s_s_a = kd_moved(m_t_a, s_t_a, a_a, m_s_a, s_s_a, m_t, m_s)
    s_t_b, a_b, s_s_b = kd_moved(m_t_b, s_t_b, a_b, m_s_b, s_s_b, m_t, m_s)
    return m_t, s_t_a + s_t_b, a_a + a_b, m_s, s_s_a + s_s_b


@triton.jit
def kd_extend(m_t, s_t, a, m_s, s_s, zt_KL, zs_KL):
    """`kd_combine` of each lane's state with the K pairs of logits that come to it."""
    new_m_t, new_m_s = tl.maximum(m_t, tl.max(zt_KL, 0)), tl.maximum(m_s, tl.max(zs_KL, 0))
    s_t, a, s_s = kd_moved(m_t, s_t, a, m_s, s_s, new_m_t, new_m_s)
    zt_KL = zt_KL - finite(new_m_t)[None, :]
    zs_KL = zs_KL - finite(new_m_s)[None, :]
    e_KL = tl.exp(zt_KL)
    # A class that the teacher rules out weighs nothing, even where its gap is inf or NaN.
    gap_KL = tl.where(e_KL == 0, 0.0, zt_KL - zs_KL)
    return new_m_t, s_t + tl.sum(e_KL, 0), a + tl.sum(e_KL * gap_KL, 0), new_m_s, s_s + tl.sum(tl.exp(zs_KL), 0)


@triton.jit
def kd_fold(m_t_L, s_t_L, a_L, m_s_L, s_s_L):
    """`kd_combine` over all lanes."""
    m_t, m_s = tl.max(m_t_L, 0), tl.max(m_s_L, 0)
    s_t_L, a_L, s_s_L = kd_moved(m_t_L, s_t_L, a_L, m_s_L, s_s_L, m_t, m_s)
    return m_t, tl.sum(s_t_L, 0), tl.sum(a_L, 0), m_s, tl.sum(s_s_L, 0)


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


@triton.jit
def load_logits(row_ptr, offs_v, mask_v, stride_v, dtype: tl.constexpr, EVICT: tl.constexpr):
    """A block of a row, -inf outside of it.

    EVICT says what the L2 cache does with it: "evict_last" where the row will be read once more at once,
    "evict_first" where it was read for the last time, "" where neither is known.
    """
    places = row_ptr + offs_v.to(tl.int64) * stride_v
    return tl.load(places, mask=mask_v, other=float("-inf"), eviction_policy=EVICT).to(dtype)


@triton.jit
def column_of(label, begin, end):
    """The label where it is a column of [begin, end), else -1, which is none."""
    return tl.where((label >= begin) & (label < end), label, -1)


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
def grad_places(grad_ptr, offs_v, stride_v, IN_PLACE: tl.constexpr):
    """Where a block of a gradient's row goes: next to one another, or where the logits lie."""
    if IN_PLACE:
        places = grad_ptr + offs_v.to(tl.int64) * stride_v
    else:
        places = grad_ptr + offs_v
    return places


@triton.jit
def store_zeros(grad_ptr, begin, end, stride_v, IN_PLACE: tl.constexpr, BLOCK_V: tl.constexpr):
    """Gradient of an ignored row: not a product with 0, its logits may be inf or NaN and are not even read."""
    for start in range(begin, end, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        places = grad_places(grad_ptr, offs_v, stride_v, IN_PLACE)
        tl.store(places, tl.zeros([BLOCK_V], grad_ptr.dtype.element_ty), mask=offs_v < end)


@triton.jit
def row_state(
    row_ptr, begin, end, stride_v, dtype: tl.constexpr, SOFTCAP: tl.constexpr, EVICT: tl.constexpr,
    BLOCK_V: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """(m, s) of the columns [begin, end) of a row."""
    LANES: tl.constexpr = BLOCK_V // UNROLL
    m = tl.full([LANES], float("-inf"), dtype)
    s = tl.zeros([LANES], dtype)
    for start in range(begin, end, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < end
        z = load_logits(row_ptr, offs_v, mask_v, stride_v, dtype, EVICT)
        if SOFTCAP != 0:
            z = tl.where(mask_v, SOFTCAP * tanh(z / SOFTCAP), float("-inf"))
        m, s = extend(m, s, tl.reshape(z, [UNROLL, LANES]))
    return fold(m, s)


@triton.jit
def store_grad(
    grad_ptr, row_ptr, begin, end, stride_v, label, m, s, coef, dtype: tl.constexpr, SOFTCAP: tl.constexpr,
    IN_PLACE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """coef (softmax - onehot) of the columns [begin, end) of a row, times the softcap's slope."""
    base = finite(m)
    scale = coef / s
    column = column_of(label, begin, end)
    for start in range(begin, end, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < end
        z = load_logits(row_ptr, offs_v, mask_v, stride_v, dtype, "evict_first")
        if SOFTCAP != 0:
            bent = tanh(z / SOFTCAP)
            z = SOFTCAP * bent
        grad = tl.exp(z - base) * scale
        # In the width of the columns, which 32 bits hold: a comparison of labels in 64 takes two instructions.
        grad = tl.where(offs_v == column.to(offs_v.dtype), grad - coef, grad)
        if SOFTCAP != 0:
            grad = grad * (1.0 - bent * bent)
        places = grad_places(grad_ptr, offs_v, stride_v, IN_PLACE)
        tl.store(places, rounded(grad, grad_ptr.dtype.element_ty), mask=mask_v)


@triton.jit
def cross_entropy_stats_kernel(
    logits_ptr,  # [n0, n1, n2, V]
    labels_ptr,  # [T] int64, over the whole vocabulary
    m_ptr,  # [T, parts]
    s_ptr,  # [T, parts]
    t_ptr,  # [T, parts]
    vocab_start, vocab, part, num_1, num_2, stride_0, stride_1, stride_2, stride_v,
    SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Row state of one part of one row: program (row, part)."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, vocab)
    row_ptr = logits_ptr + row_start(row, num_1, num_2, stride_0, stride_1, stride_2)
    dtype: tl.constexpr = m_ptr.dtype.element_ty
    label = tl.load(labels_ptr + row) - vocab_start
    m, s = row_state(row_ptr, begin, end, stride_v, dtype, SOFTCAP, "", BLOCK_V, UNROLL)
    owned = (label >= begin) & (label < end)
    t = tl.load(row_ptr + label * stride_v, mask=owned, other=float("-inf")).to(dtype)
    if SOFTCAP != 0:
        t = tl.where(owned, SOFTCAP * tanh(t / SOFTCAP), float("-inf"))
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(m_ptr + at, m)
    tl.store(s_ptr + at, s)
    tl.store(t_ptr + at, t)


@triton.jit
def cross_entropy_fold_kernel(
    m_parts_ptr, s_parts_ptr, t_parts_ptr,  # [T, parts]
    m_ptr, s_ptr, t_ptr,  # [T]
    parts, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """Row state from those of the row's parts: program (row)."""
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


@triton.jit
def cross_entropy_grad_kernel(
    grad_ptr,  # [T, V] contiguous; the logits with IN_PLACE
    logits_ptr,  # [n0, n1, n2, V]
    labels_ptr,  # [T] int64, over the whole vocabulary
    keep_ptr,  # [T] bool
    m_ptr, s_ptr, coef_ptr,  # [T]
    upstream_ptr,  # scalar; looked at only with UNLESS_ONE
    vocab_start, vocab, part, num_1, num_2, stride_0, stride_1, stride_2, stride_v,
    UNLESS_ONE: tl.constexpr, SOFTCAP: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradient of one part of one row: program (row, part). Each logit is read before its own place is written.

    With UNLESS_ONE the coefficients are further multiplied by *upstream_ptr, and nothing at all happens where
    that is exactly 1: the gradient is there already.
    """
    row = tl.program_id(0).to(tl.int64)
    coef = tl.load(coef_ptr + row)
    if UNLESS_ONE:
        upstream = tl.load(upstream_ptr)
        if upstream == 1:
            return
        coef = coef * upstream
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, vocab)
    row_ptr = logits_ptr + row_start(row, num_1, num_2, stride_0, stride_1, stride_2)
    if IN_PLACE:
        grad_ptr = row_ptr
    else:
        grad_ptr += row * vocab
    if tl.load(keep_ptr + row) == 0:
        store_zeros(grad_ptr, begin, end, stride_v, IN_PLACE, BLOCK_V)
        return
    label = tl.load(labels_ptr + row) - vocab_start
    m, s = tl.load(m_ptr + row), tl.load(s_ptr + row)
    store_grad(
        grad_ptr, row_ptr, begin, end, stride_v, label, m, s, coef, m_ptr.dtype.element_ty, SOFTCAP, IN_PLACE, BLOCK_V
    )  # fmt: skip


@triton.jit
def cross_entropy_row_kernel(
    logits_ptr,  # [n0, n1, n2, V]
    grad_ptr,  # [T, V] contiguous; may be the logits themselves; not touched without WITH_GRAD
    labels_ptr,  # [T] int64
    keep_ptr,  # [T] bool
    coef_ptr,  # [T]
    m_ptr, s_ptr, loss_ptr,  # [T]
    vocab, num_1, num_2, stride_0, stride_1, stride_2, stride_v,
    SOFTCAP: tl.constexpr, WITH_GRAD: tl.constexpr, BLOCK_V: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Row state, loss and gradient of one row: program (row).

    The second read of the row follows at once on the first and finds it in the L2 cache.
    """
    row = tl.program_id(0).to(tl.int64)
    grad_ptr += row * vocab
    dtype: tl.constexpr = m_ptr.dtype.element_ty
    if tl.load(keep_ptr + row) == 0:
        tl.store(m_ptr + row, tl.zeros([], dtype))
        tl.store(s_ptr + row, tl.full([], 1.0, dtype))
        tl.store(loss_ptr + row, tl.zeros([], dtype))
        if WITH_GRAD:
            store_zeros(grad_ptr, 0, vocab, 1, False, BLOCK_V)
        return
    row_ptr = logits_ptr + row_start(row, num_1, num_2, stride_0, stride_1, stride_2)
    label = tl.load(labels_ptr + row)
    owned = (label >= 0) & (label < vocab)
    # Before the gradient is written, which may be into the same memory.
    t = tl.load(row_ptr + label * stride_v, mask=owned, other=float("-inf")).to(dtype)
    if SOFTCAP != 0:
        t = tl.where(owned, SOFTCAP * tanh(t / SOFTCAP), float("-inf"))
    EVICT: tl.constexpr = "evict_last" if WITH_GRAD else "evict_first"
    m, s = row_state(row_ptr, 0, vocab, stride_v, dtype, SOFTCAP, EVICT, BLOCK_V, UNROLL)
    tl.store(m_ptr + row, m)
    tl.store(s_ptr + row, s)
    tl.store(loss_ptr + row, tl.log(s) + (m - t))
    if WITH_GRAD:
        coef = tl.load(coef_ptr + row)
        store_grad(grad_ptr, row_ptr, 0, vocab, stride_v, label, m, s, coef, dtype, SOFTCAP, False, BLOCK_V)


@triton.jit
def distillation_stats_kernel(
    student_ptr, teacher_ptr,  # [n0, n1, n2, V]
    keep_ptr,  # [T] bool
    m_t_ptr, s_t_ptr, a_ptr, m_s_ptr, s_s_ptr,  # [T, parts]
    # As a Python float it would arrive in float32, too coarse for float64 logits.
    inverse_temperature: "fp64",  # type: ignore[name-defined]  # noqa: F821
    vocab, part,
    s_num_1, s_num_2, s_stride_0, s_stride_1, s_stride_2, s_stride_v,
    t_num_1, t_num_2, t_stride_0, t_stride_1, t_stride_2, t_stride_v,
    BLOCK_V: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """KDRowState of one part of one row: program (row, part). The identity for an ignored row."""
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = m_t_ptr.dtype.element_ty
    LANES: tl.constexpr = BLOCK_V // UNROLL
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, vocab)
    if tl.load(keep_ptr + row) == 0:
        end = begin
    student_ptr += row_start(row, s_num_1, s_num_2, s_stride_0, s_stride_1, s_stride_2)
    teacher_ptr += row_start(row, t_num_1, t_num_2, t_stride_0, t_stride_1, t_stride_2)
    factor = tl.full([], inverse_temperature, dtype)
    m_t = tl.full([LANES], float("-inf"), dtype)
    s_t = tl.zeros([LANES], dtype)
    a = tl.zeros([LANES], dtype)
    m_s = tl.full([LANES], float("-inf"), dtype)
    s_s = tl.zeros([LANES], dtype)
    for start in range(begin, end, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < end
        zt = load_logits(teacher_ptr, offs_v, mask_v, t_stride_v, dtype, "") * factor
        zs = load_logits(student_ptr, offs_v, mask_v, s_stride_v, dtype, "") * factor
        zt_KL = tl.reshape(zt, [UNROLL, LANES])
        m_t, s_t, a, m_s, s_s = kd_extend(m_t, s_t, a, m_s, s_s, zt_KL, tl.reshape(zs, [UNROLL, LANES]))
    m_t_row, s_t_row, a_row, m_s_row, s_s_row = kd_fold(m_t, s_t, a, m_s, s_s)
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(m_t_ptr + at, m_t_row)
    tl.store(s_t_ptr + at, s_t_row)
    tl.store(a_ptr + at, a_row)
    tl.store(m_s_ptr + at, m_s_row)
    tl.store(s_s_ptr + at, s_s_row)


@triton.jit
def distillation_fold_kernel(
    m_t_parts_ptr, s_t_parts_ptr, a_parts_ptr, m_s_parts_ptr, s_s_parts_ptr,  # [T, parts]
    m_t_ptr, s_t_ptr, a_ptr, m_s_ptr, s_s_ptr,  # [T]
    parts, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """KDRowState from those of the row's parts: program (row)."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_PARTS)
    mask = offs < parts
    at = row * parts + offs
    m_t, s_t, a, m_s, s_s = kd_fold(
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
def distillation_grad_kernel(
    grad_ptr,  # [T, V] contiguous
    student_ptr, teacher_ptr,  # [n0, n1, n2, V]
    keep_ptr,  # [T] bool
    m_t_ptr, s_t_ptr, m_s_ptr, s_s_ptr, kl_ptr, coef_ptr,  # [T]
    # As a Python float it would arrive in float32, too coarse for float64 logits.
    inverse_temperature: "fp64",  # type: ignore[name-defined]  # noqa: F821
    vocab, part,
    s_num_1, s_num_2, s_stride_0, s_stride_1, s_stride_2, s_stride_v,
    t_num_1, t_num_2, t_stride_0, t_stride_1, t_stride_2, t_stride_v,
    OF_TEACHER: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradient of coef KL by the student's logits, or by the teacher's, for one part of one row."""
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = m_t_ptr.dtype.element_ty
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, vocab)
    grad_ptr += row * vocab
    if tl.load(keep_ptr + row) == 0:
        store_zeros(grad_ptr, begin, end, 1, False, BLOCK_V)
        return
    student_ptr += row_start(row, s_num_1, s_num_2, s_stride_0, s_stride_1, s_stride_2)
    teacher_ptr += row_start(row, t_num_1, t_num_2, t_stride_0, t_stride_1, t_stride_2)
    factor = tl.full([], inverse_temperature, dtype)
    s_t, s_s = tl.load(s_t_ptr + row), tl.load(s_s_ptr + row)
    coef = tl.load(coef_ptr + row)
    base_t, base_s = finite(tl.load(m_t_ptr + row)), finite(tl.load(m_s_ptr + row))
    scale_t, scale_s = coef / s_t, coef / s_s
    centre = tl.log(s_t) - tl.log(s_s) + tl.load(kl_ptr + row)
    for start in range(begin, end, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < end
        zt = load_logits(teacher_ptr, offs_v, mask_v, t_stride_v, dtype, "") * factor - base_t
        zs = load_logits(student_ptr, offs_v, mask_v, s_stride_v, dtype, "") * factor - base_s
        e_t = tl.exp(zt)
        if OF_TEACHER:
            grad = tl.where(e_t == 0, 0.0, (zt - zs) - centre) * e_t * scale_t
        else:
            grad = tl.exp(zs) * scale_s - e_t * scale_t
        tl.store(grad_ptr + offs_v, rounded(grad, grad_ptr.dtype.element_ty), mask=mask_v)
