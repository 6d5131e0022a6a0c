"""The kernels of `torch:triton`. Launches are in `launch`, sizes in `sizes`.

A program has a row of its own, or a piece of a long one, whatever the other rows of the call are. Each thread keeps
terms of its own until the end: the loops over the vocabulary hold no barrier, no shuffle and no shared memory
(`make kernels` counts).
The formulas are those of `loss_core.row_terms`; every difference is taken from the maximum, and a probability is
exp(z - m) * (1 / s), never exp(z - lse).

Where a gradient follows, logits are read twice, the second time from the last to the first: what was read last is the
likeliest to be still in a cache, and on average half of them has to be. Stores leave the cache first. A long row is
shared by several programs, so that what each reads twice stays near it: each has the terms of its piece, tells them to
the others, and waits for theirs.

Offsets are 64-bit throughout: a row begins where T * V may be beyond 2^31, and so may a strided column be.
"""

# T = tokens, V = vocabulary (of this rank), N = targets of a row, up to the next power of 2; a block is [K, L, W]: K
# vectors of W columns for each of L lanes (threads)

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

LOG2_E = tl.constexpr(1.4426950408889634)

# 1 / GAP_UNIT of `row_terms`.
GAP_FACTOR = tl.constexpr(2.0**-20)

# Numbers of a row that programs tell each other, at most.
TOLD = tl.constexpr(5)

# The bits of one that was not told yet.
UNTOLD = tl.constexpr(-1)


# --- terms of rows


@triton.jit
def exp(x):
    """e^x by the chip's own power of two; below the normal range 0, for which tl.exp would pay three instructions."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def finite(m):
    """The maximum to subtract: 0 in place of -inf."""
    # -inf minus -inf is NaN: an empty piece must stay the identity.
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def lowest(LANES: tl.constexpr, dtype: tl.constexpr):
    """Maxima of no logits yet: the least finite number, from which -inf can be subtracted in the loops."""
    return tl.full([LANES], -1.7976931348623157e308 if dtype == tl.float64 else -3.4028234663852886e38, dtype)


@triton.jit
def seen(m, s):
    """The maximum, -inf where there was no logit above -inf: what there was counts 1 in s."""
    return tl.where(s == 0, float("-inf"), m)


@triton.jit
def moved(m, s, new_m):
    """Sum s of exp(z - m), relative to another maximum."""
    return s * exp(m - new_m)


@triton.jit
def largest(z_KLW):
    """Of each lane."""
    return tl.max(tl.max(z_KLW, 2), 0)


@triton.jit
def total(x_KLW):
    """Of each lane."""
    return tl.sum(tl.sum(x_KLW, 2), 0)


@triton.jit
def each_lane(x_L):
    """To be subtracted from a block."""
    return x_L[None, :, None]


@triton.jit
def only(x_1):
    """Of the one lane that there is."""
    return tl.sum(x_1, 0)


@triton.jit
def moved_e(m, s, e, new_m):
    """Sum e of exp(z - m) * (z - m), relative to another maximum; mirrors `row_terms.rows._moved_e`."""
    scale = exp(m - new_m)
    return scale * (e + s * tl.where(scale == 0, 0.0, m - new_m))


@triton.jit
def times_exponent(e_KLW, x_KLW):
    """exp(x) * x, 0 where exp(x) is."""
    return e_KLW * tl.where(e_KLW == 0, 0.0, x_KLW)


@triton.jit
def extend(m, s, e, z_KLW, E: tl.constexpr):
    """Terms of each lane with a block that comes to it; `row_terms.combine`. Without E, e stays as it is."""
    new_m = tl.maximum(m, largest(z_KLW))
    x_KLW = z_KLW - each_lane(new_m)
    exp_KLW = exp(x_KLW)
    if E:
        e = moved_e(m, s, e, new_m) + total(times_exponent(exp_KLW, x_KLW))
    return new_m, moved(m, s, new_m) + total(exp_KLW), e


@triton.jit
def fold(m_L, s_L, e_L, E: tl.constexpr):
    """Terms of all lanes as those of one lane; `row_terms.combine`."""
    m = tl.max(m_L, 0, keep_dims=True)
    if E:
        e_L = moved_e(m_L, s_L, e_L, m)
    return m, tl.sum(moved(m_L, s_L, m), 0, keep_dims=True), tl.sum(e_L, 0, keep_dims=True)


@triton.jit
def cross_entropy_coefficients(
    m, s, t, upstream, num_classes, LABEL_SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr
):  # fmt: skip
    """(scale, target, uniform) of a row's gradient; mirrors `row_terms.CrossEntropy.coefficients`.

    `uniform` is used only where the loss needs z_sum.
    """
    scale = upstream / s
    if Z_LOSS != 0:
        scale = scale * (1.0 + 2.0 * Z_LOSS * (m + tl.log(s)))
    uniform = upstream * LABEL_SMOOTHING / num_classes
    return scale, exp(t - finite(m)) * scale + upstream * (LABEL_SMOOTHING - 1.0) - uniform, uniform


# --- terms of pairs of rows. Maxima and gaps are those of the logits as they lie; `rate` is log2 e / temperature, so
# that 2^((z - m) rate) costs what exp(z - m) does.


@triton.jit
def pair_moved(m_t, s_t, a, m_s, s_s, new_m_t, new_m_s, rate):
    """(s_t, a, s_s) relative to other maxima; see `row_terms.pairs._moved`."""
    shift_t, shift_s = m_t - new_m_t, m_s - new_m_s
    scale_t = tl.exp2(shift_t * rate)
    s_t = s_t * scale_t
    # Weight 0 times an infinite shift must be 0: such a piece holds no teacher probability.
    shifted = tl.where(s_t == 0, 0.0, s_t * GAP_FACTOR * (shift_t - shift_s))
    return s_t, tl.where(scale_t == 0, 0.0, a * scale_t) + shifted, s_s * tl.exp2(shift_s * rate)


@triton.jit
def extend_pairs(m_t, s_t, a, m_s, s_s, zt_KLW, zs_KLW, rate):
    """Terms of each lane with a pair of blocks that comes to it; `row_terms.combine_pairs`."""
    new_m_t, new_m_s = tl.maximum(m_t, largest(zt_KLW)), tl.maximum(m_s, largest(zs_KLW))
    s_t, a, s_s = pair_moved(m_t, s_t, a, m_s, s_s, new_m_t, new_m_s, rate)
    zt_KLW = zt_KLW - each_lane(new_m_t)
    zs_KLW = zs_KLW - each_lane(new_m_s)
    e_KLW = tl.exp2(zt_KLW * rate)
    # A class that the teacher rules out weighs nothing, even where its gap is inf or NaN.
    gap_KLW = tl.where(e_KLW == 0, 0.0, (zt_KLW - zs_KLW) * GAP_FACTOR)
    s_s += total(tl.exp2(zs_KLW * rate))
    return new_m_t, s_t + total(e_KLW), a + total(e_KLW * gap_KLW), new_m_s, s_s


@triton.jit
def fold_pairs(m_t_L, s_t_L, a_L, m_s_L, s_s_L, rate):
    """Terms of all lanes as those of one lane; `row_terms.combine_pairs`."""
    m_t, m_s = tl.max(m_t_L, 0, keep_dims=True), tl.max(m_s_L, 0, keep_dims=True)
    s_t_L, a_L, s_s_L = pair_moved(m_t_L, s_t_L, a_L, m_s_L, s_s_L, m_t, m_s, rate)
    s_t, s_s = tl.sum(s_t_L, 0, keep_dims=True), tl.sum(s_s_L, 0, keep_dims=True)
    return m_t, s_t, tl.sum(a_L, 0, keep_dims=True), m_s, s_s


@triton.jit
def mixture_logs(log_ratio, log_share_t, log_share_s):
    """log(p_t / M) and log(p_s / M); mirrors `row_terms.mixture_logs`."""
    x = log_ratio + (log_share_t - log_share_s)
    common = tl.log(1.0 + exp(-tl.abs(x)))
    return tl.minimum(x, 0.0) - common - log_share_t, tl.minimum(-x, 0.0) - common - log_share_s


# --- rows that several programs share


@triton.jit
def piece_of_row(vocab, PIECE_V: tl.constexpr, PIECES: tl.constexpr):
    """(row, piece, its first column, its columns) of this program. A row's programs stand side by side."""
    program = tl.program_id(0)
    piece = program % PIECES
    first = piece * PIECE_V
    columns = vocab
    if PIECES > 1:
        columns = tl.minimum(vocab - first, PIECE_V)
    return (program // PIECES).to(tl.int64), piece, first, columns


@triton.jit
def tell(told_ptr, number: tl.constexpr, x, piece, PIECES: tl.constexpr):
    """Let the other programs of the row see a number of this piece; told_ptr is where those of the row begin."""
    bits = x.to(told_ptr.dtype.element_ty, bitcast=True)
    # A NaN that came with a logit may have these bits.
    bits = tl.where(bits == UNTOLD, UNTOLD - 1, bits)
    tl.atomic_xchg(told_ptr + (number * PIECES + piece).to(tl.int64), bits, sem="relaxed")


@triton.jit
def told(told_ptr, number: tl.constexpr, nothing_P, PIECES: tl.constexpr):
    """[P] a number of every piece of the row, once all have told it; behind the last of them nothing_P.

    Programs start in the order of their number, so that those of a row which wait are few, and those waited for run.
    """
    P: tl.constexpr = nothing_P.shape[0]
    pieces = tl.arange(0, P)
    ptrs = told_ptr + (number * PIECES + pieces).to(tl.int64)
    bits = tl.load(ptrs, mask=pieces < PIECES, other=0, volatile=True)
    while tl.max((bits == UNTOLD).to(tl.int32), 0) > 0:
        bits = tl.load(ptrs, mask=pieces < PIECES, other=0, volatile=True)
    return tl.where(pieces < PIECES, bits.to(nothing_P.dtype, bitcast=True), nothing_P)


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
def whole_vectors(row_ptr, vocab, W: tl.constexpr, ALIKE: tl.constexpr):
    """(head, body): columns before the first vector that is aligned, and columns of whole vectors from there on.

    A row of 50,257 begins anywhere: without this its loads would be of one column each. Where the tensors of a call do
    not begin their rows ALIKE, what is aligned in one is not in another: then all columns are the body.
    """
    if ALIKE:
        item_bytes: tl.constexpr = row_ptr.dtype.element_ty.primitive_bitwidth // 8
        place = row_ptr.to(tl.int64) // item_bytes
        head = tl.minimum(((-place) & (W - 1)).to(tl.int32), vocab)
        body = tl.multiple_of((vocab - head) // W * W, W)
    else:
        head = 0
        body = vocab
    return head, body


@triton.jit
def edge_columns(head, body, W: tl.constexpr):
    """Columns before and behind the body, and more: those below `vocab` are real."""
    offs = tl.arange(0, 2 * W)
    return tl.where(offs < head, offs, offs + body)


@triton.jit
def body_start(row_ptr, head, layout, ALIKE: tl.constexpr):
    """Where the body of a row begins."""
    ptr = row_ptr + head.to(tl.int64) * layout.stride_v
    if ALIKE:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def load_logits(ptr, offs_v, mask_v, layout, dtype: tl.constexpr, EVICT: tl.constexpr):
    """Columns of a row, -inf outside of it.

    EVICT says what the L2 cache does with them: "evict_last" where they will be read once more at once,
    "evict_first" where they were read for the last time.
    """
    ptrs = ptr + offs_v.to(tl.int64) * layout.stride_v
    return tl.load(ptrs, mask=mask_v, other=float("-inf"), eviction_policy=EVICT).to(dtype)


@triton.jit
def store_grad(ptr, offs_v, mask_v, layout, grad):
    """Columns of a row of a gradient, in the dtype that is stored there."""
    ptrs = ptr + offs_v.to(tl.int64) * layout.stride_v
    tl.store(ptrs, rounded(grad, ptr.dtype.element_ty), mask=mask_v, eviction_policy="evict_first")


@triton.jit
def store_zeros(row_ptr, vocab, layout, BLOCK_V: tl.constexpr, W: tl.constexpr, ALIKE: tl.constexpr):
    """Gradient of an ignored row: not a product with 0, its logits may be inf or NaN and are not even read."""
    head, body = whole_vectors(row_ptr, vocab, W, ALIKE)
    body_ptr = body_start(row_ptr, head, layout, ALIKE)
    for start in range(0, body, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        store_grad(body_ptr, offs_v, offs_v < body, layout, tl.zeros([BLOCK_V], tl.float32))
    if body < vocab:
        edge = edge_columns(head, body, W)
        store_grad(row_ptr, edge, edge < vocab, layout, tl.zeros([2 * W], tl.float32))


@triton.jit
def is_ignored(keep_ptr, row):
    """Whether a row is to be ignored: never where keep_ptr is None."""
    if keep_ptr is None:
        ignored = tl.full([], False, tl.int1)
    else:
        ignored = tl.load(keep_ptr + row) == 0
    return ignored


@triton.jit
def load_factor(ptr, dtype: tl.constexpr):
    """A scalar in memory, 1 where ptr is None."""
    if ptr is None:
        factor = tl.full([], 1.0, dtype)
    else:
        factor = tl.load(ptr).to(dtype)
    return factor


@triton.jit
def is_there(factor, HELD: tl.constexpr):
    """Whether a gradient is to be left as it lies: where it is HELD for a factor of 1, and the factor is 1."""
    if HELD:
        there = factor == 1
    else:
        there = tl.full([], False, tl.int1)
    return there


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


# --- distillation. `inverse_temperature` is fp64: as a Python float it would arrive in float32, too coarse for float64.


@triton.jit
def pair_terms(
    student_ptr, teacher_ptr, vocab, rate, s_layout, t_layout, dtype: tl.constexpr, EVICT: tl.constexpr,
    BLOCK_V: tl.constexpr, L: tl.constexpr, W: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """(m_t, s_t, a, m_s, s_s), each [1], of a pair of rows or a piece, of logits as they lie; m as in `row_terms`."""
    K: tl.constexpr = BLOCK_V // (L * W)
    head, body = whole_vectors(student_ptr, vocab, W, ALIKE)
    body_t, body_s = body_start(teacher_ptr, head, t_layout, ALIKE), body_start(student_ptr, head, s_layout, ALIKE)
    m_t = lowest(L, dtype)
    s_t = tl.zeros([L], dtype)
    a = tl.zeros([L], dtype)
    m_s = lowest(L, dtype)
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
def store_pair_terms(row, m_t, s_t, a, m_s, s_s, factor, m_t_ptr, s_t_ptr, a_ptr, m_s_ptr, s_s_ptr):
    """Terms of a pair of rows, as `pair_terms` has them, with maxima and gaps of the logits times factor."""
    tl.store(m_t_ptr + row, only(seen(m_t, s_t)) * factor)
    tl.store(s_t_ptr + row, only(s_t))
    tl.store(a_ptr + row, only(a) * factor)
    tl.store(m_s_ptr + row, only(seen(m_s, s_s)) * factor)
    tl.store(s_s_ptr + row, only(s_s))


@triton.jit
def mixture_sums(zt, zs, base_t, base_s, offset, log_share_t, log_share_s, rate):
    """Of each class, exp(z - m) log(p / M) of teacher and student."""
    zt, zs = zt - base_t, zs - base_s
    e_t, e_s = tl.exp2(zt * rate), tl.exp2(zs * rate)
    log_t, log_s = mixture_logs((zt - zs) * (rate / LOG2_E) - offset, log_share_t, log_share_s)
    return e_t * tl.where(e_t == 0, 0.0, log_t), e_s * tl.where(e_s == 0, 0.0, log_s)


@triton.jit
def pair_grad(
    zt, zs, base_t, base_s, scale_t, scale_s, offset, kl, log_share_t, log_share_s, rate, OF_TEACHER: tl.constexpr,
    MIXTURE: tl.constexpr,
):  # fmt: skip
    """Gradient by the student's logits, or by the teacher's; see `KernelSet.pair_grad`."""
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
    BLOCK_V: tl.constexpr, W: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """`pair_grad` of a pair of rows; m as in `pair_terms`."""
    base_t, base_s, scale_t, scale_s = finite(m_t), finite(m_s), coef / s_t, coef / s_s
    offset = tl.log(s_t) - tl.log(s_s)  # `row_terms.log_ratio_offset`
    head, body = whole_vectors(student_ptr, vocab, W, ALIKE)
    body_t, body_s = body_start(teacher_ptr, head, t_layout, ALIKE), body_start(student_ptr, head, s_layout, ALIKE)
    to_ptr = body_start(grad_ptr, head, grad_layout, ALIKE)
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
    BLOCK_V: tl.constexpr, L: tl.constexpr, W: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """Terms of one pair of rows: program (row). Those of an empty piece for an ignored row."""
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = m_t_ptr.dtype.element_ty
    end = tl.where(is_ignored(keep_ptr, row), 0, vocab)
    student_ptr += row_start(row, s_layout)
    teacher_ptr += row_start(row, t_layout)
    factor = tl.full([], inverse_temperature, dtype)
    rate = tl.full([], inverse_temperature * LOG2_E, dtype)
    m_t, s_t, a, m_s, s_s = pair_terms(
        student_ptr, teacher_ptr, end, rate, s_layout, t_layout, dtype, "evict_first", BLOCK_V, L, W, ALIKE
    )
    store_pair_terms(row, m_t, s_t, a, m_s, s_s, factor, m_t_ptr, s_t_ptr, a_ptr, m_s_ptr, s_s_ptr)


@triton.jit
def pair_mixture_kernel(
    student_ptr, teacher_ptr,  # [T, V]
    keep_ptr,  # [T] bool, or None
    m_t_ptr, s_t_ptr, m_s_ptr, s_s_ptr,  # [T]
    kl_t_ptr, kl_s_ptr,  # [T]
    inverse_temperature: "fp64",  # type: ignore[name-defined]  # noqa: F821
    log_share_t: "fp64", log_share_s: "fp64",  # type: ignore[name-defined]  # noqa: F821
    vocab, s_layout, t_layout,
    BLOCK_V: tl.constexpr, L: tl.constexpr, W: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """Sums of one pair of rows against their mixture: program (row). 0 for an ignored row."""
    K: tl.constexpr = BLOCK_V // (L * W)
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = m_t_ptr.dtype.element_ty
    end = tl.where(is_ignored(keep_ptr, row), 0, vocab)
    student_ptr += row_start(row, s_layout)
    teacher_ptr += row_start(row, t_layout)
    factor = tl.full([], inverse_temperature, dtype)
    rate = tl.full([], inverse_temperature * LOG2_E, dtype)
    share_t, share_s = tl.full([], log_share_t, dtype), tl.full([], log_share_s, dtype)
    base_t, base_s = finite(tl.load(m_t_ptr + row)) / factor, finite(tl.load(m_s_ptr + row)) / factor
    s_t, s_s = tl.load(s_t_ptr + row), tl.load(s_s_ptr + row)
    offset = tl.log(s_t) - tl.log(s_s)  # `row_terms.log_ratio_offset`
    head, body = whole_vectors(student_ptr, end, W, ALIKE)
    body_t, body_s = body_start(teacher_ptr, head, t_layout, ALIKE), body_start(student_ptr, head, s_layout, ALIKE)
    kl_t = tl.zeros([L], dtype)
    kl_s = tl.zeros([L], dtype)
    for start in range(0, body, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < body
        zt = load_logits(body_t, offs_v, mask_v, t_layout, dtype, "evict_first")
        zs = load_logits(body_s, offs_v, mask_v, s_layout, dtype, "evict_first")
        of_t, of_s = mixture_sums(zt, zs, base_t, base_s, offset, share_t, share_s, rate)
        kl_t += total(tl.reshape(of_t, [K, L, W]))
        kl_s += total(tl.reshape(of_s, [K, L, W]))
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
    factor_ptr,  # scalar, of all coefficients, or None
    inverse_temperature: "fp64",  # type: ignore[name-defined]  # noqa: F821
    log_share_t: "fp64", log_share_s: "fp64",  # type: ignore[name-defined]  # noqa: F821
    vocab, grad_layout, s_layout, t_layout,
    OF_TEACHER: tl.constexpr, MIXTURE: tl.constexpr, HELD: tl.constexpr, BLOCK_V: tl.constexpr, L: tl.constexpr,
    W: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """`pair_grad` for one pair of rows: program (row)."""
    dtype: tl.constexpr = m_t_ptr.dtype.element_ty
    factor = load_factor(factor_ptr, dtype)
    if is_there(factor, HELD):
        return
    row = tl.program_id(0).to(tl.int64)
    grad_ptr += row_start(row, grad_layout)
    if is_ignored(keep_ptr, row):
        store_zeros(grad_ptr, vocab, grad_layout, BLOCK_V, W, ALIKE)
        return
    student_ptr += row_start(row, s_layout)
    teacher_ptr += row_start(row, t_layout)
    inverse = tl.full([], inverse_temperature, dtype)
    rate = tl.full([], inverse_temperature * LOG2_E, dtype)
    write_pair_grad(
        grad_ptr, student_ptr, teacher_ptr, vocab, rate, grad_layout, s_layout, t_layout,
        tl.load(m_t_ptr + row) / inverse, tl.load(s_t_ptr + row), tl.load(m_s_ptr + row) / inverse,
        tl.load(s_s_ptr + row), tl.load(kl_ptr + row), tl.load(coef_ptr + row) * factor,
        tl.full([], log_share_t, dtype), tl.full([], log_share_s, dtype), dtype, OF_TEACHER, MIXTURE, BLOCK_V, W, ALIKE,
    )  # fmt: skip


@triton.jit
def pair_kernel(
    grad_ptr,  # [T, V]
    student_ptr, teacher_ptr,  # [T, V]
    keep_ptr,  # [T] bool, or None
    coef_ptr,  # [T] factor of each row's loss
    m_t_ptr, s_t_ptr, a_ptr, m_s_ptr, s_s_ptr,  # [T]
    told_ptr,  # [T, TOLD, PIECES] bits, UNTOLD; or None for one piece
    inverse_temperature: "fp64",  # type: ignore[name-defined]  # noqa: F821
    vocab, grad_layout, s_layout, t_layout,
    PIECES: tl.constexpr, P: tl.constexpr, PIECE_V: tl.constexpr, TELL_ONLY: tl.constexpr, BLOCK_V: tl.constexpr,
    L: tl.constexpr, W: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """Terms and the student's gradient of one pair of rows: program (row, piece). See `row_kernel`."""
    row, piece, first, columns = piece_of_row(vocab, PIECE_V, PIECES)
    dtype: tl.constexpr = m_t_ptr.dtype.element_ty
    ignored = is_ignored(keep_ptr, row)
    grad_ptr += row_start(row, grad_layout) + first.to(tl.int64) * grad_layout.stride_v
    student_ptr += row_start(row, s_layout) + first.to(tl.int64) * s_layout.stride_v
    teacher_ptr += row_start(row, t_layout) + first.to(tl.int64) * t_layout.stride_v
    coef = tl.load(coef_ptr + row)
    factor = tl.full([], inverse_temperature, dtype)
    rate = tl.full([], inverse_temperature * LOG2_E, dtype)
    m_t, s_t, a, m_s, s_s = pair_terms(
        student_ptr, teacher_ptr, tl.where(ignored, 0, columns), rate, s_layout, t_layout, dtype, "evict_last", BLOCK_V,
        L, W, ALIKE,
    )  # fmt: skip
    if PIECES > 1:
        told_ptr += row * (TOLD * PIECES)
        tell(told_ptr, 0, only(m_t), piece, PIECES)
        tell(told_ptr, 1, only(s_t), piece, PIECES)
        tell(told_ptr, 2, only(a), piece, PIECES)
        tell(told_ptr, 3, only(m_s), piece, PIECES)
        tell(told_ptr, 4, only(s_s), piece, PIECES)
        if TELL_ONLY:
            return
        no_logit, zeros = lowest(P, dtype), tl.zeros([P], dtype)
        m_t, s_t, a, m_s, s_s = fold_pairs(
            told(told_ptr, 0, no_logit, PIECES), told(told_ptr, 1, zeros, PIECES), told(told_ptr, 2, zeros, PIECES),
            told(told_ptr, 3, no_logit, PIECES), told(told_ptr, 4, zeros, PIECES), rate,
        )  # fmt: skip
    if piece == 0:
        store_pair_terms(row, m_t, s_t, a, m_s, s_s, factor, m_t_ptr, s_t_ptr, a_ptr, m_s_ptr, s_s_ptr)
    if ignored | (coef == 0):
        store_zeros(grad_ptr, columns, grad_layout, BLOCK_V, W, ALIKE)
        return
    write_pair_grad(
        grad_ptr, student_ptr, teacher_ptr, columns, rate, grad_layout, s_layout, t_layout, only(seen(m_t, s_t)),
        only(s_t), only(seen(m_s, s_s)), only(s_s), 0.0, coef, 0.0, 0.0, dtype, False, False, BLOCK_V, W, ALIKE,
    )  # fmt: skip


# --- gradients of products


@triton.jit
def scaled_kernel(
    out_ptr, x_ptr,  # [N]
    factor_ptr,  # scalar
    count,  # N
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out = x * factor, rounded to out's dtype: program (block)."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < count, eviction_policy="evict_first")
    grad = x * tl.load(factor_ptr).to(x.dtype)
    tl.store(out_ptr + offs, rounded(grad, out_ptr.dtype.element_ty), mask=offs < count)
