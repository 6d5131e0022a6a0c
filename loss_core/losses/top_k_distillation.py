"""Distillation from K log-probabilities of the teacher per token, times T^2.

With q = softmax(softcap(raw) / T), p_k = exp(log p_k) of the K classes, p_tail = 1 - sum p_k (at least 0), q_tail the
probability of all other classes together, and 0 log 0 = 0:

    D = sum_k p_k (log p_k - log q_k) + p_tail (log p_tail - log q_tail)
    dD/dz_v = W q_v - w_v,  w_v = p_k at class k, p_tail q_v / q_tail elsewhere; W = sum p_k + p_tail
    dD/dlog p_k = p_k ((log p_k - log q_k) - (log p_tail - log q_tail)), or p_k (log p_k - log q_k + 1) if p_tail is 0

Without a tail, or if the K classes are the full vocabulary, p_tail is 0 for every token. If all other classes have a
student probability of 0, their gradient is 0.
"""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, K = classes with teacher log-probabilities;
# the temperature is `temp`

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loss_core.dtypes import FloatFormat, compute_format, float_format
from loss_core.losses.bounds.rounding import (
    COEF_ROUNDINGS,
    EXP_ARGUMENT_ROUNDINGS,
    EXP_ULPS,
    LOG_ULPS,
    TANH_ULPS,
    finite,
    log_softmax,
    result_errors,
    softmax_errors,
    stored,
    sum_growth,
    through_softcap,
    zero_where_ignored,
)
from loss_core.losses.cases.random_fields import RANDOM_FIELDS
from loss_core.losses.cases.top_k import RECIPES, draw_indices, draw_logprobs, near_student
from loss_core.losses.cross_entropy import softcap
from loss_core.losses.definition import TOP_K, Argument, Arrays, Floats, LossDef, Upstream
from loss_core.losses.distillation import TOKEN_ARGUMENTS, reduction_of
from loss_core.losses.reduction import TokenResult, masked_rows, times_rows


class TokenDivergence(NamedTuple):
    """Loss of each token and its gradients.

    Attributes:
        loss_T: T^2 D.
        by_raw_TV, by_teacher_TK: gradients of the loss by raw logits and by log p.
    """

    loss_T: Floats
    by_raw_TV: Floats
    by_teacher_TK: Floats


class Teacher(NamedTuple):
    """The teacher's distribution of each token; log_p is 0 in ignored rows.

    Attributes:
        index_TK: the K classes.
        log_p_TK, p_TK: their log-probabilities and probabilities.
        p_tail_T: probability of all other classes together; 0 without a tail.
    """

    index_TK: NDArray[np.int64]
    log_p_TK: Floats
    p_TK: Floats
    p_tail_T: Floats


def read_teacher(config: Any, arrays: Arrays, keep_T: NDArray[np.bool_], vocab: int) -> Teacher:
    """The teacher of a call; log_p is NaN for a token with an index outside [0, V)."""
    log_p_TK = masked_rows(arrays["teacher_logprobs"], keep_T)
    index_TK = masked_rows(arrays["teacher_indices"], keep_T).astype(np.int64)
    is_class_TK = (index_TK >= 0) & (index_TK < vocab)
    log_p_TK = np.where(is_class_TK.all(-1, keepdims=True), log_p_TK, np.nan)
    # The zeros of an ignored row would be K times class 0; distinct classes instead.
    index_TK = np.where(keep_T[:, None] & is_class_TK, index_TK, np.arange(index_TK.shape[1]))
    p_TK = np.exp(log_p_TK)
    with_tail = config.tail and p_TK.shape[1] < vocab
    p_tail_T = np.maximum(1 - p_TK.sum(-1), 0.0) if with_tail else np.zeros(len(p_TK))
    return Teacher(index_TK, log_p_TK, p_TK, p_tail_T)


def token_divergence(config: Any, raw_TV: Floats, teacher: Teacher) -> TokenDivergence:
    """Loss of each token, and its gradients."""
    temp, (index_TK, log_p_TK, p_TK, p_tail_T) = float(config.temperature), teacher
    z_TV, slope_TV = softcap(raw_TV, config.logit_softcapping)
    log_q_TV = log_softmax(z_TV / temp)
    log_q_TK = np.take_along_axis(log_q_TV, index_TK, 1)
    other_TV = mask_targets(log_q_TV, index_TK)
    log_q_tail_T = _log_sum_exp(other_TV)
    log_p_tail_T = np.log(p_tail_T)
    ratio_tail_T = np.where(p_tail_T == 0, 0.0, log_p_tail_T - log_q_tail_T)
    ratio_TK = np.where(p_TK == 0, 0.0, log_p_TK - log_q_TK)
    d_T = np.sum(p_TK * ratio_TK, axis=-1) + p_tail_T * ratio_tail_T
    w_TV = p_tail_T[:, None] * np.where(np.isneginf(other_TV), 0.0, np.exp(other_TV - log_q_tail_T[:, None]))
    np.put_along_axis(w_TV, index_TK, p_TK, 1)
    sum_T1 = (p_TK.sum(-1) + p_tail_T)[:, None]
    by_z_TV = sum_T1 * np.exp(log_q_TV) - w_TV
    of_tail_T = np.where(p_tail_T == 0, -1.0, ratio_tail_T)
    by_teacher_TK = np.where(p_TK == 0, 0.0, p_TK * (ratio_TK - of_tail_T[:, None]))
    return TokenDivergence(temp**2 * d_T, temp * by_z_TV * slope_TV, temp**2 * by_teacher_TK)


def mask_targets(z_TV: Floats, index_TK: NDArray[np.int64]) -> Floats:
    """A copy of z with -inf at the K classes of the teacher."""
    z_TV = z_TV.copy()
    np.put_along_axis(z_TV, index_TK, -np.inf, 1)
    return z_TV


def _log_sum_exp(z_TV: Floats) -> Floats:
    m_T = np.max(z_TV, axis=-1)
    return np.asarray(m_T + np.log(np.sum(np.exp(z_TV - np.where(np.isneginf(m_T), 0.0, m_T)[:, None]), axis=-1)))


def oracle(config: Any, arrays: Arrays, upstream: Upstream) -> TokenResult:
    """Loss, and the gradients of student's logits, teacher's log-probabilities and weights."""
    reduction = reduction_of(config, arrays)
    keep_T = reduction.keep_T
    raw_TV = masked_rows(arrays["student_logits"], keep_T)
    found = token_divergence(config, raw_TV, read_teacher(config, arrays, keep_T, raw_TV.shape[1]))
    loss_T, coef_T = np.where(keep_T, found.loss_T, 0.0), reduction.coefficients(upstream)
    grads = reduction.weights_grad(loss_T, upstream)
    grads["student_logits"] = times_rows(coef_T, found.by_raw_TV).reshape(np.shape(arrays["student_logits"]))
    grads["teacher_logprobs"] = times_rows(coef_T, found.by_teacher_TK).reshape(np.shape(arrays["teacher_logprobs"]))
    return TokenResult(reduction.loss(loss_T), grads, loss_T, coef_T, reduction)


def error_bound(
    config: Any, arrays: Arrays, expected: TokenResult, dtype: str, upstream: Upstream, product_dtype: str | None
) -> dict[str, Floats]:
    """Rounding errors of each token's loss, its gradients, the sum, and the stored results."""
    keep_T, inner, fmt = expected.reduction.keep_T, compute_format(dtype), float_format(dtype)
    raw_TV = masked_rows(arrays["student_logits"], keep_T)
    teacher = read_teacher(config, arrays, keep_T, raw_TV.shape[1])
    err_T, err_raw_TV, err_TK = token_errors(config, raw_TV, np.zeros(len(raw_TV)), teacher, inner)
    result = result_errors(config, expected, np.where(keep_T, err_T, 0.0), dtype, upstream)
    coef_T = np.abs(expected.coef_T)
    errors = {"student_logits": scaled_errors(config, err_raw_TV, coef_T, inner)}
    errors["teacher_logprobs"] = finite(coef_T[:, None] * err_TK)
    for name, error in errors.items():
        grad = expected.grads[name]
        result[name] = zero_where_ignored(stored(finite(grad), error.reshape(grad.shape), fmt), keep_T)
    return result


def scaled_errors(config: Any, err_raw_TV: Floats, coef_T: Floats, inner: FloatFormat) -> Floats:
    """Errors of the gradient by raw logits, from its errors for a coefficient of 1.

    A gradient below the normal range may be flushed to 0 before 1 / temperature brings it back into the range.
    """
    flushed_T = np.where(coef_T == 0, 0.0, inner.near_zero / min(float(config.temperature), 1.0))
    return finite(coef_T[:, None] * err_raw_TV) + flushed_T[:, None]


def token_errors(
    config: Any, raw_TV: Floats, err_raw_T: Floats, teacher: Teacher, inner: FloatFormat
) -> tuple[Floats, Floats, Floats]:
    """Errors of each token's loss [T], and of its gradients by raw logits (which are off by err_raw) and by log p.

    q_tail is not a difference of probabilities: the other classes ("others") have a sum of their own. p has the error
    of its exp; p_tail is 1 minus a sum of p. If x is off by d, x log x is off by at most |d log d| for d < 1/2, and by
    d times its slope. A log-probability is z minus lse, or lse of the others minus lse of all. The latter adds the sum
    of the others to the exps of the K classes: one exp of r = (max z) - (max z of the others) and one product more than
    a sum over all.
    """
    u, temp, cap = inner.u, float(config.temperature), config.logit_softcapping
    index_TK, log_p_TK, p_TK, p_tail_T = teacher
    z_TV, slope_TV = softcap(raw_TV, cap)
    err_z_T = (err_raw_T + (TANH_ULPS * u if cap else 0.0) * np.max(np.abs(finite(raw_TV)), axis=-1)) / temp
    z_TV = z_TV / temp
    # The reciprocal and the product are each rounded once.
    err_z_T = err_z_T + (2 * u if temp != 1 else 0.0) * np.max(np.abs(finite(z_TV)), axis=-1)
    sm, of_others = softmax_errors(z_TV, err_z_T, inner), softmax_errors(mask_targets(z_TV, index_TK), err_z_T, inner)
    log_q_TK = np.take_along_axis(sm.log_p_TV, index_TK, 1)
    log_q_tail_T = finite(_log_sum_exp(mask_targets(sm.log_p_TV, index_TK)))
    r_T = finite(np.max(z_TV, axis=-1) - np.max(mask_targets(z_TV, index_TK), axis=-1))
    q_tail_T = np.sum(mask_targets(sm.log_p_TV, index_TK) != -np.inf, axis=-1).astype(bool) * np.exp(log_q_tail_T)
    more_T = u * q_tail_T * (EXP_ARGUMENT_ROUNDINGS * r_T + EXP_ULPS + 2)
    err_lse_T = sm.err_lse_T + more_T
    z_TK = np.abs(finite(np.take_along_axis(z_TV, index_TK, 1)))
    err_log_q_TK = (err_lse_T + err_z_T)[:, None] + u * (3 * z_TK + 2 * np.abs(finite(log_q_TK)))
    err_tail_T = err_lse_T + of_others.err_lse_T + u * (2 * np.abs(log_q_tail_T) + 2 * r_T)

    # exp(0) = 1 is exact, and so is a sum of one number.
    rel_p_TK = np.where(log_p_TK == 0, 0.0, u * (EXP_ULPS + EXP_ARGUMENT_ROUNDINGS * np.abs(finite(log_p_TK))))
    # A p below the normal range may be flushed to 0 before a ratio brings it back into the range.
    err_p_TK, count = p_TK * rel_p_TK + np.where(log_p_TK == 0, 0.0, inner.near_zero), p_TK.shape[1]
    growth = sum_growth(count) if count > 1 else 0.0
    err_sum_T = np.sum(err_p_TK, axis=-1) + u * growth * np.sum(p_TK, axis=-1)
    has_tail = config.tail and count < z_TV.shape[1]
    err_p_tail_T = (err_sum_T + u * p_tail_T) * has_tail
    log_p_tail_T = finite(np.log(p_tail_T))
    ratio_TK = np.where(p_TK == 0, 0.0, finite(log_p_TK - log_q_TK))
    ratio_tail_T = np.where(p_tail_T == 0, 0.0, finite(log_p_tail_T - log_q_tail_T))

    slope_T = np.abs(np.log(np.maximum(p_tail_T - err_p_tail_T, np.finfo(np.float64).tiny))) + 1
    err_p_log_p_T = err_p_tail_T * np.minimum(np.abs(finite(np.log(err_p_tail_T))), slope_T)
    err_d_T = (
        np.sum(p_TK * err_log_q_TK + err_p_TK * np.abs(ratio_TK), axis=-1)
        + p_tail_T * (err_tail_T + LOG_ULPS * u * np.abs(log_p_tail_T))
        + err_p_log_p_T
        + err_p_tail_T * np.abs(log_q_tail_T)
        + u * (sum_growth(count) + 3) * (np.sum(p_TK * np.abs(ratio_TK), axis=-1) + p_tail_T * np.abs(ratio_tail_T))
    )
    d_T = np.sum(p_TK * ratio_TK, axis=-1) + p_tail_T * ratio_tail_T
    err_loss_T = temp**2 * (err_d_T + 3 * u * np.abs(d_T))

    # By z. W is a sum of p; with a tail it is 1, which may be computed as a sum over all V classes.
    sum_T1 = (np.sum(p_TK, axis=-1) + p_tail_T)[:, None]
    err_sum_T1 = (err_sum_T + err_p_tail_T)[:, None] + u * sum_growth(z_TV.shape[-1]) * sum_T1
    q_TV, share_TV = sm.p_TV, np.where(np.isneginf(mask_targets(z_TV, index_TK)), 0.0, finite(of_others.p_TV))
    w_TV, err_w_TV = p_tail_T[:, None] * share_TV, np.zeros_like(q_TV)
    err_w_TV += p_tail_T[:, None] * finite(of_others.err_p_TV) + err_p_tail_T[:, None] * share_TV
    np.put_along_axis(w_TV, index_TK, p_TK, 1)
    np.put_along_axis(err_w_TV, index_TK, err_p_TK, 1)
    # An implementation that computes q as exp(log q_tail) times the share among the others also rounds logarithms; the
    # sum over the others cancels.
    logs_T = np.abs(sm.lse_T - finite(np.max(z_TV, axis=-1)))
    logs_T = logs_T + np.abs(of_others.lse_T - finite(np.max(mask_targets(z_TV, index_TK), axis=-1)))
    err_logs_T = u * (LOG_ULPS * logs_T + 2 * np.abs(log_q_tail_T) + 2 * r_T)
    err_q_TV = sm.err_p_TV + q_TV * (more_T + err_logs_T)[:, None]
    err_dz_TV = sum_T1 * err_q_TV + err_sum_T1 * q_TV + err_w_TV + u * (2 + COEF_ROUNDINGS) * (sum_T1 * q_TV + w_TV)
    # The gradient is multiplied by 1 / T: the reciprocal and the product are rounded.
    err_dz_TV = temp * (err_dz_TV + 2 * u * np.abs(sum_T1 * q_TV - w_TV))
    _, err_by_raw_TV = through_softcap(temp * (sum_T1 * q_TV - w_TV), err_dz_TV, slope_TV, cap, err_raw_T, u)

    # By log p. A p_tail within rounding of 0 may be computed as 0, or as any value up to its rounding error.
    err_log_p_tail_T = np.where(
        p_tail_T >= 2 * err_p_tail_T,
        err_p_tail_T / np.maximum(p_tail_T - err_p_tail_T, np.finfo(np.float64).tiny) + LOG_ULPS * u * -log_p_tail_T,
        -log_p_tail_T + np.abs(log_q_tail_T) - np.log(u / 2) + 1,
    )
    # With a tail, the lse of all classes cancels: both log-probabilities contain it.
    err_ratio_TK = err_log_q_TK + (err_log_p_tail_T + err_tail_T - 2 * err_lse_T if has_tail else 0 * r_T)[:, None]
    sizes_TK = np.abs(ratio_TK) + np.abs(ratio_tail_T)[:, None] + 1
    err_by_teacher_TK = err_p_TK * sizes_TK + p_TK * (err_ratio_TK + u * (2 + COEF_ROUNDINGS) * sizes_TK)
    return err_loss_T, finite(err_by_raw_TV), temp**2 * finite(err_by_teacher_TK) + inner.near_zero


TEACHER = (
    Argument("teacher_indices", ("T", "K"), "index", differentiated=False, draw=draw_indices),
    Argument("teacher_logprobs", ("T", "K"), trained=False, draw=draw_logprobs),
)

DEFINITION = LossDef(
    "top_k_distillation",
    (Argument("student_logits", ("T", "V")), *TEACHER, *TOKEN_ARGUMENTS),
    oracle,
    error_bound,
    RECIPES,
    draw=near_student,
    random_fields=RANDOM_FIELDS,
    reduction=lambda config: "mean",
    row_numbers=2 + TOP_K,
)
