"""Cross entropy over logits: -sum_v q_v log softmax(z)_v per token, d/dz = softmax(z) - q.

q is 1 at the label; with smoothing e it is 1 - e + e/V there and e/V elsewhere (Szegedy et al. 2016, arXiv:1512.00567,
section 7). A z-loss with factor l adds l lse^2, d/dz = 2 l lse softmax(z), with lse the log-sum-exp of z (Chowdhery et
al. 2022, arXiv:2204.02311, section 5).
"""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.dtypes import FloatFormat, compute_format, float_format
from loss_core.losses.bounds.rounding import (
    COEF_ROUNDINGS,
    TANH_ULPS,
    SoftmaxErrors,
    finite,
    log_softmax,
    softmax_errors,
    stored,
    sum_growth,
    through_softcap,
    zero_where_ignored,
)
from loss_core.losses.cases.random_fields import RANDOM_FIELDS
from loss_core.losses.definition import (
    LABELS,
    LOSS_WEIGHTS,
    MASK,
    Argument,
    Arrays,
    Floats,
    LossDef,
    Oracle,
    Upstream,
)
from loss_core.losses.metrics import result_and_metric_errors, results_of, upstream_of_loss, with_metrics
from loss_core.losses.reduction import Reduction, TokenResult, masked_rows, times_rows, valid_tokens

# (config, logits [T, V], labels [T], valid tokens [T]) -> loss of each token [T], its derivative by the logits [T, V].
# Logits of ignored rows are zeros, and the values returned for these rows are not used.
TokenLoss = Callable[[Any, Floats, NDArray[Any], NDArray[np.bool_]], tuple[Floats, Floats]]


def token_cross_entropy(
    config: Any, z_TV: Floats, labels_T: NDArray[Any], keep_T: NDArray[np.bool_]
) -> tuple[Floats, Floats]:
    """Loss per token, and its derivative by the logits; 0 where ignored, NaN for a label outside [0, V)."""
    num_tokens, vocab = z_TV.shape
    smoothing, z_loss = _option(config, "label_smoothing"), _option(config, "z_loss")
    loss_T = np.zeros(num_tokens)
    grad_TV = np.zeros((num_tokens, vocab))
    for i in np.flatnonzero(keep_T):
        label = int(labels_T[i])
        if not 0 <= label < vocab:
            loss_T[i] = grad_TV[i] = np.nan
            continue
        log_p_V = log_softmax(z_TV[i])
        loss_T[i] = -log_p_V[label]
        grad_TV[i] = np.exp(log_p_V)
        grad_TV[i, label] -= 1 - smoothing
        if smoothing:
            loss_T[i] = (1 - smoothing) * loss_T[i] - smoothing * np.mean(log_p_V)
            grad_TV[i] -= smoothing / vocab
        if z_loss:
            top = int(np.argmax(z_TV[i]))
            lse = z_TV[i, top] - log_p_V[top]
            loss_T[i] += z_loss * lse**2
            grad_TV[i] += 2 * z_loss * lse * np.exp(log_p_V)
    return loss_T, grad_TV


def softcap(z_TV: Floats, cap: float) -> tuple[Floats, Floats]:
    """c tanh(z / c) and its derivative; cap = 0 changes nothing. Source: Gemma 2 (arXiv:2408.00118), section 2."""
    if cap == 0:
        return z_TV, np.ones_like(z_TV)
    tanh = np.tanh(z_TV / cap)
    return cap * tanh, 1 - tanh**2


def _option(config: Any, name: str) -> float:
    """The value of a field that is off at 0; 0 for a config that has no such field."""
    return float(getattr(config, name, 0.0))


def reduction_of(config: Any, arrays: Arrays) -> Reduction:
    """The reduction of a call; fields and arguments of cross entropy that it lacks take their defaults."""
    return Reduction(
        getattr(config, "reduction", "sum"),
        np.shape(arrays["labels"]),
        valid_tokens(arrays, config.ignore_index),
        arrays.get("num_label_tokens"),
        arrays.get("loss_weights"),
    )


def over_logits(token_loss: TokenLoss) -> Oracle[TokenResult]:
    """The oracle of a loss over `logits` and `labels`, from its loss per token.

    Labels, mask, loss_weights, num_label_tokens, ignore_index, reduction and logit_softcapping have the same meaning as
    for cross entropy.
    """

    def oracle(config: Any, arrays: Arrays, upstream: Upstream) -> TokenResult:
        reduction = reduction_of(config, arrays)
        keep_T, logits = reduction.keep_T, arrays["logits"]
        z_TV, slope_TV = softcap(masked_rows(logits, keep_T), _option(config, "logit_softcapping"))
        labels_T, upstream = np.asarray(arrays["labels"]).reshape(-1), upstream_of_loss(config, upstream)
        loss_T, dz_TV = token_loss(config, z_TV, labels_T, keep_T)
        loss_T = np.where(keep_T, loss_T, 0.0)
        coef_T = reduction.coefficients(upstream)
        grads = reduction.weights_grad(loss_T, upstream)
        grads["logits"] = times_rows(coef_T, dz_TV * slope_TV).reshape(np.shape(logits))
        result = TokenResult(reduction.loss(loss_T), grads, loss_T, coef_T, reduction)
        return with_metrics(config, result, z_TV, labels_T)

    return oracle


oracle: Oracle[TokenResult] = over_logits(token_cross_entropy)


def error_bound(
    config: Any, arrays: Arrays, expected: TokenResult, dtype: str, upstream: Upstream, product_dtype: str | None
) -> dict[str, Floats]:
    """Rounding errors of the softcap, the softmax, each token's loss, the sum, and the stored results."""
    raw_TV, cap = masked_rows(arrays["logits"], expected.reduction.keep_T), _option(config, "logit_softcapping")
    (z_TV, slope_TV), u = softcap(raw_TV, cap), compute_format(dtype).u
    err_z_T = (TANH_ULPS * u if cap else 0.0) * np.max(np.abs(finite(raw_TV)), axis=-1)
    result, dz_TV, error_TV = logits_errors(config, z_TV, err_z_T, arrays, expected, dtype, upstream)
    _, error_TV = through_softcap(dz_TV, error_TV, slope_TV, cap, 0.0, u)
    grad = expected.grads["logits"]
    allowed = stored(finite(grad), error_TV.reshape(grad.shape), float_format(dtype))
    result["logits"] = zero_where_ignored(allowed, expected.reduction.keep_T)
    return result


def logits_errors(
    config: Any,
    z_TV: Floats,
    err_z_T: Floats,
    arrays: Arrays,
    expected: TokenResult,
    dtype: str,
    upstream: Upstream,
) -> tuple[dict[str, Floats], Floats, Floats]:
    """Error bounds of a cross entropy of logits z that are off by err_z; over logits and fused.

    Returns:
        Errors of the loss and of the gradient of loss_weights; the gradient by z [T, V]; its error.
    """
    inner = compute_format(dtype)
    labels_T = np.asarray(arrays["labels"]).reshape(-1)
    sm = softmax_errors(z_TV, err_z_T, inner)
    err_T = _token_errors(config, sm, labels_T, expected, err_z_T, inner.u)
    err_T = np.where(expected.reduction.keep_T, err_T, 0.0)
    dz_TV, err_dz_TV = _gradient_errors(config, sm, labels_T, expected.coef_T, inner)
    result = result_and_metric_errors(config, sm, labels_T, expected, err_T, err_z_T, dtype, upstream)
    return result, dz_TV, err_dz_TV


def _token_errors(
    config: Any, sm: SoftmaxErrors, labels_T: NDArray[Any], expected: TokenResult, err_z_T: Floats, u: float
) -> Floats:
    """Error of each token's loss: errors of lse, of the target's logit, and of their difference.

    Smoothing adds the errors of the mean logit (a sum and a division), of its difference to lse (all parts of the loss
    are >= 0), of two products whose factors are rounded as well, and of their sum. A z-loss l lse^2 is off by 2 l lse
    times the error of lse and by the roundings of l, of the square, of the product, and of the addition.
    """
    smoothing, z_loss = _option(config, "label_smoothing"), _option(config, "z_loss")
    rows = np.arange(labels_T.size)
    target_T = finite(sm.z_TV[rows, np.clip(labels_T.astype(np.int64), 0, sm.z_TV.shape[-1] - 1)])
    loss_T = np.abs(finite(expected.token_loss_T))
    err_T = sm.err_lse_T + err_z_T + u * (np.abs(target_T) + 2 * loss_T)
    if smoothing:
        vocab = sm.z_TV.shape[-1]
        mean_T = np.mean(np.abs(finite(sm.z_TV)), axis=-1)
        err_T = err_T + u * (smoothing * (sum_growth(vocab) + 2) * mean_T + 5 * loss_T)
    if z_loss:
        err_T = err_T + z_loss * np.abs(sm.lse_T) * (2 * sm.err_lse_T + 4 * u * np.abs(sm.lse_T))
    return np.asarray(err_T)


def _gradient_errors(
    config: Any, sm: SoftmaxErrors, labels_T: NDArray[Any], coef_T: Floats, inner: FloatFormat
) -> tuple[Floats, Floats]:
    """coef (f p - q), where f = 1 + 2 l lse for a z-loss factor l, else 1; and its error.

    Smoothing: e/V and 1 - e are rounded when computed, multiplied and added (4 each); and an implementation that
    multiplies p by the sum of q instead of 1 has the error of a sum of V terms e/V. f is off by 2 l times the error of
    lse; its two parts are rounded (l, the product) and added, and its product with p is rounded.
    """
    smoothing, z_loss = _option(config, "label_smoothing"), _option(config, "z_loss")
    factor_T1, vocab = 1 + 2 * z_loss * sm.lse_T[:, None], sm.z_TV.shape[-1]
    dz_TV = factor_T1 * sm.p_TV - smoothing / vocab
    rows = np.flatnonzero(coef_T != 0)
    inside = (labels_T[rows] >= 0) & (labels_T[rows] < vocab)
    targets = rows[inside], labels_T[rows[inside]].astype(np.int64)
    dz_TV[targets] -= 1 - smoothing
    error_TV = np.abs(factor_T1) * sm.err_p_TV + inner.u * (1 + COEF_ROUNDINGS) * np.abs(dz_TV)
    if z_loss:
        sizes_T1 = 1 + 2 * z_loss * np.abs(sm.lse_T[:, None])
        error_TV += sm.p_TV * (2 * z_loss * sm.err_lse_T[:, None] + 4 * inner.u * sizes_T1)
    if smoothing:
        error_TV += inner.u * smoothing * (4 / vocab + sum_growth(vocab) * sm.p_TV)
        error_TV[targets] += inner.u * 4 * (1 - smoothing)
    coef_T1 = np.abs(coef_T)[:, None]
    error_TV = np.where(coef_T1 == 0, 0.0, coef_T1 * error_TV + inner.near_zero)
    return np.where(coef_T1 == 0, 0.0, coef_T[:, None] * dz_TV), finite(error_TV)


COUNT = Argument("num_label_tokens", (), "count", differentiated=False, optional=True, sum_only=True)

DEFINITION = LossDef(
    "cross_entropy",
    (Argument("logits", ("T", "V")), LABELS, MASK, COUNT, LOSS_WEIGHTS),
    oracle,
    error_bound,
    random_fields=RANDOM_FIELDS,
    results=results_of,
)
