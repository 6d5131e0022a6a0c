"""Parts of error bounds: how far a correct implementation may be from the float64 oracle, derived, not fitted.

Bounds are to first order in u, the unit roundoff of the compute dtype (float32, or float64 for float64 inputs). They
hold for every backward-stable way to compute these losses (with or without subtracting the maximum, any order of
summation), so one bound serves all kernels. The derivation of each constant is beside it.

Inputs are rounded to the tested dtype before they reach the oracle, so the rounding of that dtype enters only where a
result is stored in it.
"""

# T = tokens, V = vocabulary, H = hidden. rel_*, err_* = bounds on relative and absolute errors.

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.dtypes import FloatFormat, compute_format, float_format
from loss_core.losses.definition import Floats, Upstream
from loss_core.losses.reduction import TokenResult

# A sum of n terms in any order is off by at most (n - 1) u sum|x| (Higham, Accuracy and Stability,
# eq. 4.4), and by sum_growth sqrt(n) u sum|x| with probability 1 - 2 exp(-sum_growth^2 / 2)
# (Higham & Mary 2019, SIAM J. Sci. Comput. 41, Theorem 2.4): 6 leaves 3e-8.
SUM_GROWTH = 6.0

# exp and log of the platforms: CUDA's expf is within 2 ulp = 4 u, as is the exp2.approx that Triton's exp uses; XLA's
# and SLEEF's are within 1 ulp.
EXP_ULPS = 6.0

# Roundings of exp's argument -r, each of which changes the result by the relative error u r: the subtraction z - m, and
# where exp is computed as exp2(x log2 e), as by Triton and by CUDA's __expf, that product and log2 e itself (0.22 u off
# in float32, 0.13 u in float64).
EXP_ARGUMENT_ROUNDINGS = 2.25
LOG_ULPS = 4.0

# tanh likewise, plus the division by c before and the product with c after it. CUDA's is within 2 ulp = 4 u, XLA's on a
# CPU within 4.6 u in float32 and 7.0 u in float64 (near |x| = 20; against long double at 800,000 points, JAX 0.10.2).
TANH_ULPS = 9.0

# A token's coefficient is upstream * weight / count: three roundings, and one for the product with it.
COEF_ROUNDINGS = 4.0


def result_dtype(config: Any, dtype: str) -> str:
    """Dtype in which the loss is returned."""
    return dtype if not getattr(config, "fp32_upcast", True) else compute_format(dtype).name


def result_dtypes(config: Any, dtype: str, grads: Iterable[str]) -> dict[str, str]:
    """Dtype in which "loss" and each of these gradients are returned, by name."""
    return dict.fromkeys(grads, dtype) | {"loss": result_dtype(config, dtype)}


def log_softmax(z_TV: Floats) -> Floats:
    """log softmax over the last axis."""
    m_T1 = np.max(z_TV, axis=-1, keepdims=True)
    return np.asarray((z_TV - m_T1) - np.log(np.sum(np.exp(z_TV - m_T1), axis=-1, keepdims=True)))


def sum_growth(n: int) -> float:
    """Factor of u sum|x| that bounds the rounding error of a sum of n terms."""
    return float(min(n, SUM_GROWTH * np.sqrt(n)))


@dataclass(frozen=True)
class SoftmaxErrors:
    """Softmax of logits z, and bounds on the errors of a computed one."""

    z_TV: Floats
    log_p_TV: Floats
    p_TV: Floats
    lse_T: Floats
    err_p_TV: Floats
    err_lse_T: Floats


def finite(values: Floats) -> Floats:
    """The values, with 0 for those that are not finite."""
    return np.where(np.isfinite(values), values, 0.0)


def softmax_errors(z_TV: Floats, err_z_T: Floats, inner: FloatFormat) -> SoftmaxErrors:
    """Errors of the log-sum-exp and of each probability, for logits that are off by err_z.

    With r = max z - z, the argument of exp is off by EXP_ARGUMENT_ROUNDINGS u r, so e^-r has a relative error of
    u (EXP_ARGUMENT_ROUNDINGS r + EXP_ULPS). The sum averages these with the weights p and adds its own growth (more
    than the rescaling of a running sum adds: one exp and one product per block of columns). The log-sum-exp is then
    rounded as log s, and as m + log s. A probability computed as exp(z - lse) contains lse's error once more. Errors of
    z itself shift numerator and sum: twice err_z. A probability below the normal range may be flushed to 0.
    """
    u = inner.u
    log_p_TV = log_softmax(z_TV)
    p_TV = np.exp(log_p_TV)
    m_T = np.max(z_TV, axis=-1)
    lse_T = finite(m_T - np.max(log_p_TV, axis=-1))
    r_TV = finite(m_T[:, None] - z_TV)
    off_TV = EXP_ARGUMENT_ROUNDINGS * r_TV
    rel_s_T = u * (np.sum(finite(p_TV * off_TV), axis=-1) + EXP_ULPS + sum_growth(z_TV.shape[-1]))
    log_s_T = finite(np.abs(lse_T - m_T))
    err_lse_T = err_z_T + rel_s_T + u * (LOG_ULPS * log_s_T + np.abs(finite(m_T)) + 2 * np.abs(lse_T))
    rel_p_TV = u * (off_TV + EXP_ULPS + 2) + (err_z_T + err_lse_T)[:, None]
    return SoftmaxErrors(z_TV, log_p_TV, p_TV, lse_T, rel_p_TV * p_TV + inner.near_zero, err_lse_T)


def entropy_errors(sm: SoftmaxErrors, err_z_T: Floats, u: float) -> Floats:
    """Error of -sum p log p.

    A sum of terms p d with d = z - m or log p: each term is off by the errors of p and of d and by its own roundings;
    then lse is added.
    """
    log_p_TV, d_TV = finite(sm.log_p_TV), distances(sm)
    err_d_T1 = (sm.err_lse_T + 2 * err_z_T)[:, None]
    spread_T = np.sum(sm.p_TV * d_TV, axis=-1)
    entropy_T = -np.sum(sm.p_TV * log_p_TV, axis=-1)
    error_T = np.sum(sm.err_p_TV * d_TV + sm.p_TV * err_d_T1, axis=-1) + sm.err_lse_T
    return np.asarray(error_T + u * ((sum_growth(d_TV.shape[-1]) + 3) * spread_T + 2 * np.abs(entropy_T)))


def distances(sm: SoftmaxErrors) -> Floats:
    """max(|log p|, m - z): the size of d in `entropy_errors`, whichever of the two is used."""
    z_TV = sm.z_TV
    return np.maximum(np.abs(finite(sm.log_p_TV)), finite(np.max(z_TV, axis=-1)[:, None] - z_TV))


def through_softcap(
    dz_TV: Floats, err_dz_TV: Floats, slope_TV: Floats, cap: float, err_raw_T: Floats | float, u: float
) -> tuple[Floats, Floats]:
    """Gradient by the raw logits and its error, from those by z = softcap(raw).

    The slope 1 - tanh^2 is off by twice the error of the tanh, and by 2 err / c for raw logits that are off by err.
    """
    if cap == 0:
        return dz_TV, err_dz_TV
    err_slope_TV = 2 * np.reshape(err_raw_T, (-1, 1)) / cap + 2 * TANH_ULPS * u
    return dz_TV * slope_TV, err_dz_TV * slope_TV + np.abs(dz_TV) * err_slope_TV


def stored(grad: Floats, error: Floats, fmt: FloatFormat) -> Floats:
    """The error of a result after its rounding to fmt, which may flush it to 0 near 0."""
    return np.asarray(error + fmt.u * (np.abs(grad) + error) + fmt.near_zero)


def result_errors(
    config: Any, expected: TokenResult, err_T: Floats, dtype: str, upstream: Upstream
) -> dict[str, Floats]:
    """Errors of the reduced loss and of the gradient of loss_weights, from each token's error."""
    fmt, u = float_format(dtype), compute_format(dtype).u
    out = float_format(result_dtype(config, dtype))
    reduction = expected.reduction
    if reduction.kind == "none":
        return {"loss": stored(finite(expected.loss), err_T.reshape(expected.loss.shape), out)}
    scale_T = reduction.coefficients(None)
    terms_T = np.abs(finite(scale_T * expected.token_loss_T))
    error = np.sum(np.abs(scale_T) * err_T) + u * (sum_growth(err_T.size) + COEF_ROUNDINGS) * np.sum(terms_T)
    result = {"loss": stored(finite(expected.loss), error, out)}
    if "loss_weights" in expected.grads:
        grad = expected.grads["loss_weights"]
        unit_T = reduction.coefficients(upstream, weighted=False)
        error = (np.abs(unit_T) * err_T).reshape(grad.shape) + COEF_ROUNDINGS * u * np.abs(finite(grad))
        result["loss_weights"] = stored(finite(grad), error, fmt)
    return result


def zero_where_ignored(error: Floats, keep_T: NDArray[np.bool_]) -> Floats:
    """The error, with 0 for ignored tokens: their gradient must be exactly 0."""
    return np.where(keep_T.reshape(error.shape[:-1])[..., None], error, 0.0)
