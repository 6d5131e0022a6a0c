"""Loss and gradients by definition, dense, in float64 NumPy: what every backend is judged against.

Shares no code with what it judges (not even `row_stats`), and favours the textbook form over speed.

The definitions, per token with logits z, label y and temperature T:

    p(z)  = softmax(z)                          CE = -log p(z)[y]
    KD    = T^2 * sum_v p(z_t/T) (log p(z_t/T) - log p(z_s/T))
    fused = CE of softcap(h @ W.T),             softcap(z) = c tanh(z / c)

    dCE/dz   = p - onehot(y)
    dKD/dz_s = T (p_s - p_t)
    dKD/dz_t = T p_t ((log p_t - log p_s) - KL)

Source of the KD loss: Hinton et al. 2015 (arXiv:1503.02531), section 2; of the softcap: Gemma 2
(arXiv:2408.00118), section 2.
"""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.config import (
    FusedLinearCEConfig,
    KDLossConfig,
    LossConfig,
    MaskedCrossEntropyConfig,
    TEParallelCEConfig,
)

Floats = NDArray[np.float64]
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class OracleResult:
    """Loss and gradients in float64.

    Attributes:
        loss: scalar, or the shape of labels for reduction="none".
        grads: gradient by argument name, of the argument's shape.
        token_loss_T: loss of each token before reduction, 0 where ignored.
        keep_T: which tokens count.
        coef_T: derivative of the result, times upstream, by each token's loss.
    """

    loss: Floats
    grads: dict[str, Floats]
    token_loss_T: Floats
    keep_T: NDArray[np.bool_]
    coef_T: Floats


def evaluate(config: LossConfig, arrays: Arrays, upstream: NDArray[Any] | None = None) -> OracleResult:
    """Loss and every gradient of one call.

    Args:
        config: one of the four typed configs (or a subclass of one).
        arrays: keyword arguments of the loss's forward; the values are taken as exact.
        upstream: derivative of the caller's objective by the result; None for ones.
    Raises:
        TypeError: there is no definition here for this config.
    """
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        if isinstance(config, MaskedCrossEntropyConfig | TEParallelCEConfig):
            return _cross_entropy(config, arrays, upstream)
        if isinstance(config, FusedLinearCEConfig):
            return _fused_linear(config, arrays, upstream)
        if isinstance(config, KDLossConfig):
            return _distillation(config, arrays, upstream)
    raise TypeError(f"The oracle has no definition for {type(config).__name__}; use loss_core.check.compare instead.")


def has_definition(config: LossConfig) -> bool:
    """Whether `evaluate` knows this config."""
    ours = MaskedCrossEntropyConfig | TEParallelCEConfig | FusedLinearCEConfig | KDLossConfig
    return isinstance(config, ours)


def log_softmax(z_TV: Floats) -> Floats:
    """log softmax over the last axis."""
    m_T1 = np.max(z_TV, axis=-1, keepdims=True)
    return np.asarray((z_TV - m_T1) - np.log(np.sum(np.exp(z_TV - m_T1), axis=-1, keepdims=True)))


def softcap(z_TV: Floats, cap: float) -> tuple[Floats, Floats]:
    """c tanh(z / c) and its derivative; cap = 0 changes nothing."""
    if cap == 0:
        return z_TV, np.ones_like(z_TV)
    tanh = np.tanh(z_TV / cap)
    return cap * tanh, 1 - tanh**2


def kept_tokens(arrays: Arrays, ignore_index: int) -> NDArray[np.bool_]:
    """Which tokens count: label is not ignore_index, and mask is not 0 there."""
    labels = np.asarray(arrays["labels"])
    keep = labels != ignore_index
    mask = arrays.get("mask")
    if mask is not None:
        keep = keep & np.broadcast_to(np.asarray(mask) != 0, labels.shape)
    return np.asarray(keep.reshape(-1))


def _token_cross_entropy(z_TV: Floats, labels_T: NDArray[Any], keep_T: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Loss per token, and its derivative by the logits; 0 where ignored."""
    num_tokens, vocab = z_TV.shape
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
        grad_TV[i, label] -= 1
    return loss_T, grad_TV


def reduce_tokens(
    config: Any, arrays: Arrays, loss_T: Floats, keep_T: NDArray[np.bool_], upstream: NDArray[Any] | None
) -> tuple[Floats, Floats, dict[str, Floats]]:
    """The result, its derivative (times upstream) by each token's loss, and the gradient of loss_weights."""
    labels_shape = np.asarray(arrays["labels"]).shape
    count_name = "num_batch_labels" if isinstance(config, KDLossConfig) else "num_label_tokens"
    count = arrays.get(count_name)
    weights = arrays.get("loss_weights")
    weights_T = np.ones(loss_T.shape) if weights is None else np.asarray(weights, np.float64).reshape(-1)
    if isinstance(config, KDLossConfig):
        reduction = "mean" if count is None else "sum"
    else:
        reduction = config.reduction
    up = np.ones(labels_shape if reduction == "none" else ()) if upstream is None else np.asarray(upstream, np.float64)

    kept = int(keep_T.sum())
    if reduction == "none":
        return loss_T.reshape(labels_shape), np.where(keep_T, up.reshape(-1), 0.0), {}
    if reduction == "mean":
        scale = 1.0 / kept if kept else 0.0
    elif count is None:
        scale = 1.0
    else:
        scale = 1.0 / float(count) if float(count) != 0 else 0.0
    coef_T = np.where(keep_T, weights_T * scale * up, 0.0)
    # A scale of 0 stands for "no tokens": the loss is 0 whatever the tokens hold.
    loss = np.asarray(np.sum(np.where(keep_T, weights_T * loss_T, 0.0)) * scale) if scale else np.zeros(())
    grads = {} if weights is None else {"loss_weights": (loss_T * scale * up).reshape(np.shape(weights))}
    return loss, coef_T, grads


def _times_rows(coef_T: Floats, grad_TV: Floats) -> Floats:
    """coef * grad, with a coefficient of 0 giving exactly 0."""
    return np.where(coef_T[:, None] == 0, 0.0, coef_T[:, None] * grad_TV)


def _cross_entropy(config: Any, arrays: Arrays, upstream: NDArray[Any] | None) -> OracleResult:
    logits = np.asarray(arrays["logits"], np.float64)
    z_TV = logits.reshape(-1, logits.shape[-1])
    keep_T = kept_tokens(arrays, config.ignore_index)
    loss_T, dz_TV = _token_cross_entropy(z_TV, np.asarray(arrays["labels"]).reshape(-1), keep_T)
    loss, coef_T, grads = reduce_tokens(config, arrays, loss_T, keep_T, upstream)
    grads["logits"] = _times_rows(coef_T, dz_TV).reshape(logits.shape)
    return OracleResult(loss, grads, loss_T, keep_T, coef_T)


def _fused_linear(config: FusedLinearCEConfig, arrays: Arrays, upstream: NDArray[Any] | None) -> OracleResult:
    hidden = np.asarray(arrays["hidden_states"], np.float64)
    weight_VH = np.asarray(arrays["lm_weight"], np.float64)
    keep_T = kept_tokens(arrays, config.ignore_index)
    # What an ignored position holds must not matter, not even a NaN.
    h_TH = np.where(keep_T[:, None], hidden.reshape(-1, hidden.shape[-1]), 0.0)
    z_TV, slope_TV = softcap(h_TH @ weight_VH.T, config.logit_softcapping)
    loss_T, dz_TV = _token_cross_entropy(z_TV, np.asarray(arrays["labels"]).reshape(-1), keep_T)
    loss, coef_T, grads = reduce_tokens(config, arrays, loss_T, keep_T, upstream)
    draw_TV = _times_rows(coef_T, dz_TV * slope_TV)
    grads["hidden_states"] = (draw_TV @ weight_VH).reshape(hidden.shape)
    grads["lm_weight"] = draw_TV.T @ h_TH
    return OracleResult(loss, grads, loss_T, keep_T, coef_T)


def _distillation(config: KDLossConfig, arrays: Arrays, upstream: NDArray[Any] | None) -> OracleResult:
    student = np.asarray(arrays["student_logits"], np.float64)
    shape, vocab = student.shape, student.shape[-1]
    temp = float(config.temperature)
    keep_T = kept_tokens(arrays, config.ignore_index)
    zs_TV = np.where(keep_T[:, None], student.reshape(-1, vocab), 0.0) / temp
    zt_TV = np.where(keep_T[:, None], np.asarray(arrays["teacher_logits"], np.float64).reshape(-1, vocab), 0.0) / temp
    log_ps_TV, log_pt_TV = log_softmax(zs_TV), log_softmax(zt_TV)
    ps_TV, pt_TV = np.exp(log_ps_TV), np.exp(log_pt_TV)
    ratio_TV = np.where(pt_TV == 0, 0.0, log_pt_TV - log_ps_TV)
    kl_T = np.sum(pt_TV * ratio_TV, axis=-1)
    labels_T = np.asarray(arrays["labels"]).reshape(-1)
    kl_T = np.where((labels_T < 0) | (labels_T >= vocab), np.nan, kl_T)
    loss_T = np.where(keep_T, temp**2 * kl_T, 0.0)
    loss, coef_T, grads = reduce_tokens(config, arrays, loss_T, keep_T, upstream)
    known_T1 = np.where(np.isnan(kl_T), np.nan, 1.0)[:, None]
    grads["student_logits"] = _times_rows(coef_T, temp * (ps_TV - pt_TV) * known_T1).reshape(shape)
    teacher_TV = known_T1 * np.where(pt_TV == 0, 0.0, temp * pt_TV * (ratio_TV - kl_T[:, None]))
    grads["teacher_logits"] = _times_rows(coef_T, teacher_TV).reshape(shape)
    return OracleResult(loss, grads, loss_T, keep_T, coef_T)
