"""Terms of rows and of pairs of rows: the formulas of `loss_core.row_terms` for a block of logits.

Every difference is taken from the maximum, and a probability is exp(z - m) * (1 / s), never exp(z - lse).
"""

# a block is [K, L, W]: K vectors of W columns for each of L lanes (threads)

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

# 1 / GAP_UNIT of `row_terms`.
GAP_FACTOR = tl.constexpr(2.0**-20)


# --- of rows


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
    """Sum e of exp(z - m) * (z - m), relative to another maximum; mirrors `row_terms.rows._rescaled_e`."""
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


# --- of pairs of rows. Maxima and gaps are those of the logits as they lie; `rate` is log2 e / temperature, so
# that 2^((z - m) rate) costs what exp(z - m) does.


@triton.jit
def pair_moved(m_t, s_t, a, m_s, s_s, new_m_t, new_m_s, rate):
    """(s_t, a, s_s) relative to other maxima; see `row_terms.pairs._rescaled`."""
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
