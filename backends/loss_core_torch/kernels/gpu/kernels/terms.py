"""Terms of rows and of pairs of rows: the formulas of `loss_core.row_terms` for a block of logits.

Every difference is taken from the maximum, and a probability is exp(z - m) * (1 / s), never exp(z - lse).
"""

# a block is [K, L, W]: K vectors of W columns for each of L lanes (threads)

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

# 1 / GAP_UNIT of `row_terms`.
GAP_FACTOR = tl.constexpr(2.0**-20)


# --- rows


@triton.jit
def exp(x):
    """e^x by the hardware's 2^x: three instructions fewer than tl.exp, and 0 in place of subnormal results."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def finite(m):
    """The maximum to subtract: 0 in place of -inf."""
    # -inf minus -inf is NaN: an empty piece must stay the identity.
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def initial_max(LANES: tl.constexpr, dtype: tl.constexpr):
    """[LANES] maximum before the first logit: the lowest finite value, so that -inf minus it is -inf and not NaN."""
    return tl.full([LANES], -1.7976931348623157e308 if dtype == tl.float64 else -3.4028234663852886e38, dtype)


@triton.jit
def row_max(m, s):
    """The maximum, -inf where s is 0: a logit above -inf adds exp(0) = 1 to s when it is the maximum."""
    return tl.where(s == 0, float("-inf"), m)


@triton.jit
def rescale(m, s, new_m):
    """Sum s of exp(z - m), rescaled from the maximum m to new_m."""
    return s * exp(m - new_m)


@triton.jit
def lane_max(z_KLW):
    """[L] maximum of each lane."""
    return tl.max(tl.max(z_KLW, 2), 0)


@triton.jit
def lane_sum(x_KLW):
    """[L] sum of each lane."""
    return tl.sum(tl.sum(x_KLW, 2), 0)


@triton.jit
def over_lanes(x_L):
    """[1, L, 1], which broadcasts against a block."""
    return x_L[None, :, None]


@triton.jit
def scalar(x_1):
    """The element of a [1] tensor."""
    return tl.sum(x_1, 0)


@triton.jit
def rescale_e(m, s, e, new_m):
    """Sum e of exp(z - m) * (z - m), rescaled from the maximum m to new_m; see `row_terms.combine`."""
    scale = exp(m - new_m)
    return scale * (e + s * tl.where(scale == 0, 0.0, m - new_m))


@triton.jit
def exp_weighted(e_KLW, x_KLW):
    """exp(x) * x, 0 where exp(x) is 0."""
    return e_KLW * tl.where(e_KLW == 0, 0.0, x_KLW)


@triton.jit
def extend(m, s, e, z_KLW, HAS_E: tl.constexpr):
    """Terms of each lane, extended by a block; see `row_terms.combine`. Without HAS_E, e is returned as it is."""
    new_m = tl.maximum(m, lane_max(z_KLW))
    x_KLW = z_KLW - over_lanes(new_m)
    exp_KLW = exp(x_KLW)
    if HAS_E:
        e = rescale_e(m, s, e, new_m) + lane_sum(exp_weighted(exp_KLW, x_KLW))
    return new_m, rescale(m, s, new_m) + lane_sum(exp_KLW), e


@triton.jit
def fold(m_L, s_L, e_L, HAS_E: tl.constexpr):
    """[1] terms: those of all lanes, combined; see `row_terms.combine`."""
    m = tl.max(m_L, 0, keep_dims=True)
    if HAS_E:
        e_L = rescale_e(m_L, s_L, e_L, m)
    return m, tl.sum(rescale(m_L, s_L, m), 0, keep_dims=True), tl.sum(e_L, 0, keep_dims=True)


@triton.jit
def cross_entropy_coefficients(
    m, s, t, upstream, num_classes, LABEL_SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr
):  # fmt: skip
    """(scale, target, uniform) of a row's gradient; mirrors `row_terms.CrossEntropy.coefficients`.

    `uniform` is used only if the loss needs z_sum.
    """
    scale = upstream / s
    if Z_LOSS != 0:
        scale = scale * (1.0 + 2.0 * Z_LOSS * (m + tl.log(s)))
    uniform = upstream * LABEL_SMOOTHING / num_classes
    return scale, exp(t - finite(m)) * scale + upstream * (LABEL_SMOOTHING - 1.0) - uniform, uniform


@triton.jit
def tanh(x):
    """tanh to a few ulp, in float32 and in float64."""
    # Triton has no tanh for every target. 1 - 2 / (e^2x + 1) cancels near 0: below 1/2 a continued fraction replaces
    # it, of which seven levels are exact to 3e-16 there.
    abs_x = tl.abs(x)
    square = x * x
    numerator = 135135.0 + square * (17325.0 + square * (378.0 + square))
    denominator = 135135.0 + square * (62370.0 + square * (3150.0 + square * 28.0))
    large = 1.0 - 2.0 / (tl.exp(2.0 * abs_x) + 1.0)
    return tl.where(abs_x < 0.5, x * (numerator / denominator), tl.where(x < 0, -large, large))


# --- pairs of rows. Maxima and gaps are those of the logits before the temperature; `rate` is log2(e) / temperature, so
# that 2^((z - m) rate) costs what exp(z - m) does.


@triton.jit
def rescale_pairs(m_t, s_t, a, m_s, s_s, new_m_t, new_m_s, rate):
    """(s_t, a, s_s) rescaled to other maxima; see `row_terms.combine_pairs`."""
    shift_t, shift_s = m_t - new_m_t, m_s - new_m_s
    scale_t = tl.exp2(shift_t * rate)
    s_t = s_t * scale_t
    # 0 times an infinite shift must be 0: without teacher probability a gap has no weight.
    shifted = tl.where(s_t == 0, 0.0, s_t * GAP_FACTOR * (shift_t - shift_s))
    return s_t, tl.where(scale_t == 0, 0.0, a * scale_t) + shifted, s_s * tl.exp2(shift_s * rate)


@triton.jit
def extend_pairs(m_t, s_t, a, m_s, s_s, zt_KLW, zs_KLW, rate):
    """Terms of each lane, extended by a pair of blocks; see `row_terms.combine_pairs`."""
    new_m_t, new_m_s = tl.maximum(m_t, lane_max(zt_KLW)), tl.maximum(m_s, lane_max(zs_KLW))
    s_t, a, s_s = rescale_pairs(m_t, s_t, a, m_s, s_s, new_m_t, new_m_s, rate)
    zt_KLW = zt_KLW - over_lanes(new_m_t)
    zs_KLW = zs_KLW - over_lanes(new_m_s)
    e_KLW = tl.exp2(zt_KLW * rate)
    # A class of teacher probability 0 has no weight, even if its gap is inf or NaN.
    gap_KLW = tl.where(e_KLW == 0, 0.0, (zt_KLW - zs_KLW) * GAP_FACTOR)
    s_s += lane_sum(tl.exp2(zs_KLW * rate))
    return new_m_t, s_t + lane_sum(e_KLW), a + lane_sum(e_KLW * gap_KLW), new_m_s, s_s


@triton.jit
def fold_pairs(m_t_L, s_t_L, a_L, m_s_L, s_s_L, rate):
    """[1] terms: those of all lanes, combined; see `row_terms.combine_pairs`."""
    m_t, m_s = tl.max(m_t_L, 0, keep_dims=True), tl.max(m_s_L, 0, keep_dims=True)
    s_t_L, a_L, s_s_L = rescale_pairs(m_t_L, s_t_L, a_L, m_s_L, s_s_L, m_t, m_s, rate)
    s_t, s_s = tl.sum(s_t_L, 0, keep_dims=True), tl.sum(s_s_L, 0, keep_dims=True)
    return m_t, s_t, tl.sum(a_L, 0, keep_dims=True), m_s, s_s


@triton.jit
def mixture_logs(log_ratio, log_share_t, log_share_s):
    """log(p_t / M) and log(p_s / M); mirrors `row_terms.mixture_logs`."""
    x = log_ratio + (log_share_t - log_share_s)
    common = tl.log(1.0 + exp(-tl.abs(x)))
    return tl.minimum(x, 0.0) - common - log_share_t, tl.minimum(-x, 0.0) - common - log_share_s
