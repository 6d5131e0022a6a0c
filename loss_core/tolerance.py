"""The allowance: how far a correct implementation may be from the float64 oracle, derived, not chosen.

To first order in u, the unit roundoff of the arithmetic inside (float32, or float64 for float64
inputs). The bound holds for every backward-stable way to compute these losses (with or without
centring on the maximum, any order of summation), so one number serves all kernels. Each constant
has its derivation beside it; none was fitted.

Inputs are rounded to the tested dtype before they reach the oracle, so that dtype's own rounding
enters only where a result is stored in it.
"""

# T = tokens, V = vocabulary, H = hidden. rel_* relative, err_* absolute errors, both bounds.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.config import FusedLinearCEConfig, KDLossConfig, LossConfig
from loss_core.dtypes import FloatFormat, compute_format, float_format
from loss_core.oracle import Arrays, Floats, OracleResult, log_softmax, reduce_tokens, softcap

# A sum of n terms in any order is off by at most (n - 1) u sum|x| (Higham, Accuracy and Stability,
# eq. 4.4), and by sum_growth sqrt(n) u sum|x| with probability 1 - 2 exp(-sum_growth^2 / 2)
# (Higham & Mary 2019, SIAM J. Sci. Comput. 41, Theorem 2.4): 6 leaves 3e-8.
SUM_GROWTH = 6.0

# exp and log as the platforms give them: CUDA's expf is within 2 ulp = 4 u, so is the exp2.approx under Triton's exp,
# XLA's and SLEEF's are within 1 ulp.
EXP_ULPS = 6.0

# Roundings of exp's argument -r, each of which moves the result by the factor u r: the subtraction z - m, and where
# exp is made as exp2(x log2 e), as by Triton and by CUDA's __expf, that product and log2 e itself (0.22 u off in
# float32, 0.13 u in float64).
EXP_ARGUMENT_ROUNDINGS = 2.25
LOG_ULPS = 4.0

# tanh likewise (CUDA: 2 ulp), plus the division by c before and the product with c after it.
TANH_ULPS = 6.0

# A token's coefficient is upstream * weight / count: three roundings, and one for applying it.
COEF_ROUNDINGS = 4.0


def sum_growth(n: int) -> float:
    """Factor of u sum|x| that bounds the rounding of a sum of n terms."""
    return float(min(n, SUM_GROWTH * np.sqrt(n)))


def allowances(
    config: LossConfig,
    arrays: Arrays,
    expected: OracleResult,
    dtype: str,
    *,
    upstream: NDArray[Any] | None = None,
    product_dtype: str | None = None,
) -> dict[str, Floats]:
    """Largest error that rounding explains, elementwise, for "loss" and each gradient.

    Args:
        config, arrays, upstream: as they were given to the oracle.
        expected: the oracle's result.
        dtype: dtype of the floating inputs, and so of the gradients.
        product_dtype: dtype in which the fused loss hands the logits' gradient to its matrix products
            (matrix engines take 16-bit operands); None when that is the dtype of the arithmetic.
    """
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        if isinstance(config, KDLossConfig):
            return _distillation(config, arrays, expected, dtype, upstream)
        if isinstance(config, FusedLinearCEConfig):
            return _fused_linear(config, arrays, expected, dtype, upstream, product_dtype)
        return _cross_entropy(config, arrays, expected, dtype, upstream)


def share_of_allowance(got: Floats, expected: Floats, allowed: Floats, dtype: str) -> Floats:
    """|got - expected| / allowed, elementwise: above 1 is a failure, inf where one is not a number."""
    top = float_format(dtype).max
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.abs(got - expected)
        share = np.where(error == 0, 0.0, error / allowed)
        same = (np.isnan(got) & np.isnan(expected)) | (got == expected)
        # A result beyond the format's range may be stored as infinity.
        overflow = np.isinf(got) & (np.sign(got) == np.sign(expected)) & (np.abs(expected) + allowed >= top)
        return np.where(same | overflow, 0.0, np.where(np.isnan(share), np.inf, share))


@dataclass(frozen=True)
class _Softmax:
    """Softmax of given logits, and how far a computed one may be off."""

    z_TV: Floats
    log_p_TV: Floats
    p_TV: Floats
    lse_T: Floats
    err_p_TV: Floats
    err_lse_T: Floats


def _finite(values: Floats) -> Floats:
    return np.where(np.isfinite(values), values, 0.0)


def _softmax(z_TV: Floats, err_z_T: Floats, inner: FloatFormat) -> _Softmax:
    """Rounding of the log-sum-exp and of each probability.

    With r = max z - z the argument of exp is off by EXP_ARGUMENT_ROUNDINGS u r, so that e^-r is off by the
    factor u (EXP_ARGUMENT_ROUNDINGS r + EXP_ULPS); the sum averages these with the weights p and adds its
    own growth (more than a running sum's rescalings add: one exp and one product for each block of columns).
    The log-sum-exp is then rounded as log s, and as m + log s. A probability computed as exp(z - lse)
    sees lse's error once more. Errors of z itself shift numerator and sum: twice err_z. A probability
    below the normal range may be flushed to 0.
    """
    u = inner.u
    log_p_TV = log_softmax(z_TV)
    p_TV = np.exp(log_p_TV)
    m_T = np.max(z_TV, axis=-1)
    lse_T = _finite(m_T - np.max(log_p_TV, axis=-1))
    r_TV = _finite(m_T[:, None] - z_TV)
    off_TV = EXP_ARGUMENT_ROUNDINGS * r_TV
    rel_s_T = u * (np.sum(_finite(p_TV * off_TV), axis=-1) + EXP_ULPS + sum_growth(z_TV.shape[-1]))
    log_s_T = _finite(np.abs(lse_T - m_T))
    err_lse_T = err_z_T + rel_s_T + u * (LOG_ULPS * log_s_T + np.abs(_finite(m_T)) + 2 * np.abs(lse_T))
    rel_p_TV = u * (off_TV + EXP_ULPS + 2) + (err_z_T + err_lse_T)[:, None]
    return _Softmax(z_TV, log_p_TV, p_TV, lse_T, rel_p_TV * p_TV + inner.near_zero, err_lse_T)


def _stored(grad: Floats, error: Floats, fmt: FloatFormat) -> Floats:
    """Adds the one rounding of a stored result, and what is lost near 0."""
    return np.asarray(error + fmt.u * (np.abs(grad) + error) + fmt.near_zero)


def _token_errors(sm: _Softmax, labels_T: NDArray[Any], expected: OracleResult, err_z_T: Floats, u: float) -> Floats:
    """Error of each token's cross entropy: of lse, of the target's logit, of their difference."""
    vocab = sm.z_TV.shape[-1]
    rows = np.arange(labels_T.size)
    target_T = _finite(sm.z_TV[rows, np.clip(labels_T.astype(np.int64), 0, vocab - 1)])
    loss_T = np.abs(_finite(expected.token_loss_T))
    err_T = sm.err_lse_T + err_z_T + u * (np.abs(target_T) + 2 * loss_T)
    return np.where(expected.keep_T, err_T, 0.0)


def _result_errors(
    config: LossConfig,
    arrays: Arrays,
    expected: OracleResult,
    err_T: Floats,
    dtype: str,
    upstream: NDArray[Any] | None,
) -> dict[str, Floats]:
    """Errors of the reduced loss and of the gradient of loss_weights, from each token's error."""
    fmt, u = float_format(dtype), compute_format(dtype).u
    out = fmt if not getattr(config, "fp32_upcast", True) else compute_format(dtype)
    _, scale_T, _ = reduce_tokens(config, arrays, expected.token_loss_T, expected.keep_T, None)
    if expected.loss.ndim or getattr(config, "reduction", None) == "none":
        return {"loss": _stored(_finite(expected.loss), err_T.reshape(expected.loss.shape), out)}
    terms_T = np.abs(_finite(scale_T * expected.token_loss_T))
    error = np.sum(np.abs(scale_T) * err_T) + u * (sum_growth(err_T.size) + COEF_ROUNDINGS) * np.sum(terms_T)
    result = {"loss": _stored(_finite(expected.loss), error, out)}
    if "loss_weights" in expected.grads:
        grad = expected.grads["loss_weights"]
        _, unit_T, _ = reduce_tokens(
            config, {**arrays, "loss_weights": np.ones(grad.shape)}, expected.token_loss_T, expected.keep_T, upstream
        )
        error = (np.abs(unit_T) * err_T).reshape(grad.shape) + COEF_ROUNDINGS * u * np.abs(_finite(grad))
        result["loss_weights"] = _stored(_finite(grad), error, fmt)
    return result


def _onehot_errors(sm: _Softmax, labels_T: NDArray[Any], coef_T: Floats, inner: FloatFormat) -> tuple[Floats, Floats]:
    """coef (p - onehot), and its error."""
    dz_TV = sm.p_TV.copy()
    rows = np.flatnonzero(coef_T != 0)
    inside = (labels_T[rows] >= 0) & (labels_T[rows] < dz_TV.shape[-1])
    dz_TV[rows[inside], labels_T[rows[inside]].astype(np.int64)] -= 1
    error_TV = sm.err_p_TV + inner.u * (1 + COEF_ROUNDINGS) * np.abs(dz_TV)
    coef_T1 = np.abs(coef_T)[:, None]
    error_TV = np.where(coef_T1 == 0, 0.0, coef_T1 * error_TV + inner.near_zero)
    return np.where(coef_T1 == 0, 0.0, coef_T[:, None] * dz_TV), _finite(error_TV)


def _cross_entropy(
    config: LossConfig, arrays: Arrays, expected: OracleResult, dtype: str, upstream: NDArray[Any] | None
) -> dict[str, Floats]:
    fmt, u = float_format(dtype), compute_format(dtype).u
    logits = np.asarray(arrays["logits"], np.float64)
    labels_T = np.asarray(arrays["labels"]).reshape(-1)
    zero_T = np.zeros(labels_T.size)
    sm = _softmax(_kept_rows(logits, expected), zero_T, compute_format(dtype))
    result = _result_errors(config, arrays, expected, _token_errors(sm, labels_T, expected, zero_T, u), dtype, upstream)
    _, error_TV = _onehot_errors(sm, labels_T, expected.coef_T, compute_format(dtype))
    grad = expected.grads["logits"]
    result["logits"] = _zero_where_ignored(_stored(_finite(grad), error_TV.reshape(grad.shape), fmt), expected)
    return result


def _kept_rows(logits: Floats, expected: OracleResult) -> Floats:
    return np.where(expected.keep_T[:, None], logits.reshape(-1, logits.shape[-1]), 0.0)


def _zero_where_ignored(error: Floats, expected: OracleResult) -> Floats:
    """An ignored token's gradient is exactly 0: no allowance at all."""
    keep = expected.keep_T.reshape(error.shape[:-1])
    return np.where(keep[..., None], error, 0.0)


def _fused_linear(
    config: FusedLinearCEConfig,
    arrays: Arrays,
    expected: OracleResult,
    dtype: str,
    upstream: NDArray[Any] | None,
    product_dtype: str | None,
) -> dict[str, Floats]:
    """As cross entropy, with products before and after.

    A logit is a sum of H products: sum_growth(H) u |h| |W|. The softcap adds its own roundings, and
    its slope 1 - tanh^2 moves by 2 err / c. Each gradient is a sum over V (or T) of products whose
    left factor carries the error of the logits' gradient.
    """
    fmt, u = float_format(dtype), compute_format(dtype).u
    hidden = np.asarray(arrays["hidden_states"], np.float64)
    h_TH = _kept_rows(hidden, expected)
    w_VH = np.asarray(arrays["lm_weight"], np.float64)
    labels_T = np.asarray(arrays["labels"]).reshape(-1)
    err_raw_T = np.max(sum_growth(h_TH.shape[1]) * u * (np.abs(h_TH) @ np.abs(w_VH).T), axis=-1)
    raw_TV = h_TH @ w_VH.T
    cap = float(config.logit_softcapping)
    z_TV, slope_TV = softcap(raw_TV, cap)
    err_z_T = err_raw_T + (TANH_ULPS * u * np.max(np.abs(raw_TV), axis=-1) if cap else 0.0)
    sm = _softmax(z_TV, err_z_T, compute_format(dtype))
    result = _result_errors(
        config, arrays, expected, _token_errors(sm, labels_T, expected, err_z_T, u), dtype, upstream
    )
    dz_TV, err_dz_TV = _onehot_errors(sm, labels_T, expected.coef_T, compute_format(dtype))
    if cap:
        err_slope_TV = 2 * err_raw_T[:, None] / cap + 2 * TANH_ULPS * u
        err_dz_TV = err_dz_TV * slope_TV + np.abs(dz_TV) * err_slope_TV
        dz_TV = dz_TV * slope_TV
    if product_dtype is not None:
        operand = float_format(product_dtype)
        # Rounding of the operand, and what is lost near 0.
        err_dz_TV = err_dz_TV + operand.u * np.abs(dz_TV) + np.where(dz_TV != 0, operand.near_zero, 0.0)
    size_TV = np.abs(dz_TV)
    num_tokens, vocab = size_TV.shape
    # Each term of a sum may be flushed to 0 as well.
    flushed = compute_format(dtype).near_zero
    err_h_TH = (err_dz_TV + sum_growth(vocab) * u * size_TV) @ np.abs(w_VH) + vocab * flushed
    err_w_VH = (err_dz_TV + sum_growth(num_tokens) * u * size_TV).T @ np.abs(h_TH) + num_tokens * flushed
    grad = expected.grads["hidden_states"]
    result["hidden_states"] = _zero_where_ignored(_stored(_finite(grad), err_h_TH.reshape(grad.shape), fmt), expected)
    result["lm_weight"] = _stored(_finite(expected.grads["lm_weight"]), err_w_VH, fmt)
    return result


def _distillation(
    config: KDLossConfig, arrays: Arrays, expected: OracleResult, dtype: str, upstream: NDArray[Any] | None
) -> dict[str, Floats]:
    """KL = sum p_t d, with d = log p_t - log p_s: errors of the weights p_t times |z_t - z_s|, and of d."""
    fmt, u = float_format(dtype), compute_format(dtype).u
    temp = float(config.temperature)
    zs_TV = _kept_rows(np.asarray(arrays["student_logits"], np.float64), expected) / temp
    zt_TV = _kept_rows(np.asarray(arrays["teacher_logits"], np.float64), expected) / temp
    top_s_T, top_t_T = (np.max(np.abs(_finite(z_TV)), axis=-1) for z_TV in (zs_TV, zt_TV))
    # z / T: the reciprocal and the product are each rounded once.
    scaled = 2 * u if temp != 1 else 0.0
    student = _softmax(zs_TV, scaled * top_s_T, compute_format(dtype))
    teacher = _softmax(zt_TV, scaled * top_t_T, compute_format(dtype))
    pt_TV = teacher.p_TV
    d_TV = np.where(pt_TV == 0, 0.0, teacher.log_p_TV - student.log_p_TV)
    gap_TV = np.where(pt_TV == 0, 0.0, _finite(zt_TV - zs_TV))
    kl_T = np.sum(_finite(pt_TV * d_TV), axis=-1)
    # Each log-probability is z - lse: both lse's errors, both scalings, and the rounding of the difference.
    err_d_T = student.err_lse_T + teacher.err_lse_T + (2 * u + scaled) * (top_s_T + top_t_T)
    weighted_TV = pt_TV * np.abs(gap_TV)
    err_kl_T = (
        err_d_T
        + np.sum(_finite(teacher.err_p_TV * np.abs(gap_TV) + sum_growth(pt_TV.shape[-1]) * u * weighted_TV), axis=-1)
        + 2 * u * (np.sum(weighted_TV, axis=-1) + np.abs(student.lse_T) + np.abs(teacher.lse_T) + np.abs(kl_T))
    )
    err_T = np.where(expected.keep_T, temp**2 * (err_kl_T + 3 * u * np.abs(kl_T)), 0.0)
    result = _result_errors(config, arrays, expected, err_T, dtype, upstream)
    coef_T1 = np.abs(expected.coef_T)[:, None] * temp
    difference_TV = np.abs(student.p_TV - pt_TV)
    err_student_TV = coef_T1 * (student.err_p_TV + teacher.err_p_TV + u * (2 + COEF_ROUNDINGS) * difference_TV)
    centred_TV = np.abs(_finite(d_TV - kl_T[:, None]))
    err_teacher_TV = coef_T1 * (
        (teacher.err_p_TV + u * (2 + COEF_ROUNDINGS) * pt_TV) * centred_TV + pt_TV * (err_d_T + err_kl_T)[:, None]
    )
    for name, error_TV in (("student_logits", err_student_TV), ("teacher_logits", err_teacher_TV)):
        grad = expected.grads[name]
        stored = _stored(_finite(grad), _finite(error_TV).reshape(grad.shape), fmt)
        result[name] = _zero_where_ignored(stored, expected)
    return result
