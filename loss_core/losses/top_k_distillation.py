"""Distillation from a teacher of which K log-probabilities per token are known, times T^2.

With q = softmax(softcap(raw) / T), p_k = exp(log p_k) of the K classes, p_tail = 1 - sum p_k (never below 0) and
q_tail the probability of all other classes together, and 0 log 0 = 0:

    D = sum_k p_k (log p_k - log q_k) + p_tail (log p_tail - log q_tail)
    dD/dz_v = W q_v - w_v,  w_v = p_k at class k, p_tail q_v / q_tail elsewhere; W = sum p_k + p_tail
    dD/dlog p_k = p_k ((log p_k - log q_k) - (log p_tail - log q_tail)), and without the second part if p_tail is 0

Without a tail, and where the K classes are all that there are, p_tail is 0 throughout; dD/dlog p_k then is
p_k (log p_k - log q_k + 1), as it is where nothing is left. Other classes that the student rules out altogether have
the gradient 0.
"""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, K = classes of the teacher; the temperature
# is `temp`

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
from loss_core.losses.distillation import OF_TOKENS, reduction_of
from loss_core.losses.reduction import TokenResult, kept_rows, times_rows


class Tokens(NamedTuple):
    """What the oracle makes of raw logits.

    Attributes:
        loss_T: T^2 D.
        by_raw_TV, by_teacher_TK: its gradients by raw logits and by log p.
    """

    loss_T: Floats
    by_raw_TV: Floats
    by_teacher_TK: Floats


class Teacher(NamedTuple):
    """The teacher of each token: zeros in ignored rows.

    Attributes:
        index_TK: its classes.
        log_p_TK, p_TK: of them.
        p_tail_T: of the others, 0 without a tail.
    """

    index_TK: NDArray[np.int64]
    log_p_TK: Floats
    p_TK: Floats
    p_tail_T: Floats


def teacher_of(config: Any, arrays: Arrays, keep_T: NDArray[np.bool_], vocab: int) -> Teacher:
    """The teacher of a call; NaN for a token with an index outside [0, V)."""
    log_p_TK = kept_rows(arrays["teacher_logprobs"], keep_T)
    index_TK = kept_rows(arrays["teacher_indices"], keep_T).astype(np.int64)
    is_class_TK = (index_TK >= 0) & (index_TK < vocab)
    log_p_TK = np.where(is_class_TK.all(-1, keepdims=True), log_p_TK, np.nan)
    # All of an ignored row would be class 0.
    index_TK = np.where(keep_T[:, None] & is_class_TK, index_TK, np.arange(index_TK.shape[1]))
    p_TK = np.exp(log_p_TK)
    with_tail = config.tail and p_TK.shape[1] < vocab
    p_tail_T = np.maximum(1 - p_TK.sum(-1), 0.0) if with_tail else np.zeros(len(p_TK))
    return Teacher(index_TK, log_p_TK, p_TK, p_tail_T)


def of_tokens(config: Any, raw_TV: Floats, teacher: Teacher) -> Tokens:
    """Loss of tokens, and its gradients."""
    temp, (index_TK, log_p_TK, p_TK, p_tail_T) = float(config.temperature), teacher
    z_TV, slope_TV = softcap(raw_TV, config.logit_softcapping)
    log_q_TV = log_softmax(z_TV / temp)
    log_q_TK = np.take_along_axis(log_q_TV, index_TK, 1)
    other_TV = others(log_q_TV, index_TK)
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
    return Tokens(temp**2 * d_T, temp * by_z_TV * slope_TV, temp**2 * by_teacher_TK)


def others(z_TV: Floats, index_TK: NDArray[np.int64]) -> Floats:
    """z of the other classes, -inf at those of the teacher."""
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
    raw_TV = kept_rows(arrays["student_logits"], keep_T)
    found = of_tokens(config, raw_TV, teacher_of(config, arrays, keep_T, raw_TV.shape[1]))
    loss_T, coef_T = np.where(keep_T, found.loss_T, 0.0), reduction.coefficients(upstream)
    grads = reduction.weights_grad(loss_T, upstream)
    grads["student_logits"] = times_rows(coef_T, found.by_raw_TV).reshape(np.shape(arrays["student_logits"]))
    grads["teacher_logprobs"] = times_rows(coef_T, found.by_teacher_TK).reshape(np.shape(arrays["teacher_logprobs"]))
    return TokenResult(reduction.loss(loss_T), grads, loss_T, coef_T, reduction)


def error_bound(
    config: Any, arrays: Arrays, expected: TokenResult, dtype: str, upstream: Upstream, product_dtype: str | None
) -> dict[str, Floats]:
    """Rounding of each token's loss, of its gradients, of the sum, and of the stored results."""
    keep_T, inner, fmt = expected.reduction.keep_T, compute_format(dtype), float_format(dtype)
    raw_TV = kept_rows(arrays["student_logits"], keep_T)
    teacher = teacher_of(config, arrays, keep_T, raw_TV.shape[1])
    err_T, err_raw_TV, err_TK = token_errors(config, raw_TV, np.zeros(len(raw_TV)), teacher, inner)
    result = result_errors(config, expected, np.where(keep_T, err_T, 0.0), dtype, upstream)
    coef_T = np.abs(expected.coef_T)
    errors = {"student_logits": with_coefficient(config, err_raw_TV, coef_T, inner)}
    errors["teacher_logprobs"] = finite(coef_T[:, None] * err_TK)
    for name, error in errors.items():
        grad = expected.grads[name]
        result[name] = zero_where_ignored(stored(finite(grad), error.reshape(grad.shape), fmt), keep_T)
    return result


def with_coefficient(config: Any, err_raw_TV: Floats, coef_T: Floats, inner: FloatFormat) -> Floats:
    """Errors of the gradient by raw logits, of those of a coefficient of 1.

    Below the normal range it may be flushed to 0, before 1 / temperature makes a normal number of it.
    """
    flushed_T = np.where(coef_T == 0, 0.0, inner.near_zero / min(float(config.temperature), 1.0))
    return finite(coef_T[:, None] * err_raw_TV) + flushed_T[:, None]


def token_errors(
    config: Any, raw_TV: Floats, err_raw_T: Floats, teacher: Teacher, inner: FloatFormat
) -> tuple[Floats, Floats, Floats]:
    """Errors of each token's loss [T], and of its gradients by raw logits, which are off by err_raw, and by log p.

    Nothing is a difference of probabilities: the others' sum is one of its own. p is off by its exp; p_tail is 1 minus
    a sum of p; and x log x moves by |d log d| at most where x moves by d < 1/2, and elsewhere by d times its slope. A
    log-probability is z minus lse, or lse of the others minus lse of all, which is a sum of the others' and of the K
    classes' exps: one exp of r = (largest z) - (that of the others) and one product more than a sum over all.
    """
    u, temp, cap = inner.u, float(config.temperature), config.logit_softcapping
    index_TK, log_p_TK, p_TK, p_tail_T = teacher
    z_TV, slope_TV = softcap(raw_TV, cap)
    err_z_T = (err_raw_T + (TANH_ULPS * u if cap else 0.0) * np.max(np.abs(finite(raw_TV)), axis=-1)) / temp
    z_TV = z_TV / temp
    # The reciprocal and the product are each rounded once.
    err_z_T = err_z_T + (2 * u if temp != 1 else 0.0) * np.max(np.abs(finite(z_TV)), axis=-1)
    sm, of_others = softmax_errors(z_TV, err_z_T, inner), softmax_errors(others(z_TV, index_TK), err_z_T, inner)
    log_q_TK = np.take_along_axis(sm.log_p_TV, index_TK, 1)
    log_q_tail_T = finite(_log_sum_exp(others(sm.log_p_TV, index_TK)))
    r_T = finite(np.max(z_TV, axis=-1) - np.max(others(z_TV, index_TK), axis=-1))
    q_tail_T = np.sum(others(sm.log_p_TV, index_TK) != -np.inf, axis=-1).astype(bool) * np.exp(log_q_tail_T)
    more_T = u * q_tail_T * (EXP_ARGUMENT_ROUNDINGS * r_T + EXP_ULPS + 2)
    err_lse_T = sm.err_lse_T + more_T
    z_TK = np.abs(finite(np.take_along_axis(z_TV, index_TK, 1)))
    err_log_q_TK = (err_lse_T + err_z_T)[:, None] + u * (3 * z_TK + 2 * np.abs(finite(log_q_TK)))
    err_tail_T = err_lse_T + of_others.err_lse_T + u * (2 * np.abs(log_q_tail_T) + 2 * r_T)

    # exp(0) is 1, and of one number the sum is itself.
    rel_p_TK = np.where(log_p_TK == 0, 0.0, u * (EXP_ULPS + EXP_ARGUMENT_ROUNDINGS * np.abs(finite(log_p_TK))))
    # Below the normal range p may be flushed to 0, before a ratio makes a normal number of it.
    err_p_TK, count = p_TK * rel_p_TK + np.where(log_p_TK == 0, 0.0, inner.near_zero), p_TK.shape[1]
    growth = sum_growth(count) if count > 1 else 0.0
    err_sum_T = np.sum(err_p_TK, axis=-1) + u * growth * np.sum(p_TK, axis=-1)
    has_tail = config.tail and count < z_TV.shape[1]
    err_p_tail_T = (err_sum_T + u * p_tail_T) * has_tail
    log_p_tail_T = finite(np.log(p_tail_T))
    ratio_TK = np.where(p_TK == 0, 0.0, finite(log_p_TK - log_q_TK))
    ratio_tail_T = np.where(p_tail_T == 0, 0.0, finite(log_p_tail_T - log_q_tail_T))

    slope_T = np.abs(np.log(np.maximum(p_tail_T - err_p_tail_T, np.finfo(np.float64).tiny))) + 1
    moved_T = err_p_tail_T * np.minimum(np.abs(finite(np.log(err_p_tail_T))), slope_T)
    err_d_T = (
        np.sum(p_TK * err_log_q_TK + err_p_TK * np.abs(ratio_TK), axis=-1)
        + p_tail_T * (err_tail_T + LOG_ULPS * u * np.abs(log_p_tail_T))
        + moved_T
        + err_p_tail_T * np.abs(log_q_tail_T)
        + u * (sum_growth(count) + 3) * (np.sum(p_TK * np.abs(ratio_TK), axis=-1) + p_tail_T * np.abs(ratio_tail_T))
    )
    d_T = np.sum(p_TK * ratio_TK, axis=-1) + p_tail_T * ratio_tail_T
    err_loss_T = temp**2 * (err_d_T + 3 * u * np.abs(d_T))

    # By z. W is a sum of p, or with a tail 1, as whoever sums gradients over all classes finds it.
    sum_T1 = (np.sum(p_TK, axis=-1) + p_tail_T)[:, None]
    err_sum_T1 = (err_sum_T + err_p_tail_T)[:, None] + u * sum_growth(z_TV.shape[-1]) * sum_T1
    q_TV, share_TV = sm.p_TV, np.where(np.isneginf(others(z_TV, index_TK)), 0.0, finite(of_others.p_TV))
    w_TV, err_w_TV = p_tail_T[:, None] * share_TV, np.zeros_like(q_TV)
    err_w_TV += p_tail_T[:, None] * finite(of_others.err_p_TV) + err_p_tail_T[:, None] * share_TV
    np.put_along_axis(w_TV, index_TK, p_TK, 1)
    np.put_along_axis(err_w_TV, index_TK, err_p_TK, 1)
    # Who makes q of the others' share and of exp(log q_tail) has the roundings of logarithms besides; the others' sum
    # cancels.
    logs_T = np.abs(sm.lse_T - finite(np.max(z_TV, axis=-1)))
    logs_T = logs_T + np.abs(of_others.lse_T - finite(np.max(others(z_TV, index_TK), axis=-1)))
    err_logs_T = u * (LOG_ULPS * logs_T + 2 * np.abs(log_q_tail_T) + 2 * r_T)
    err_q_TV = sm.err_p_TV + q_TV * (more_T + err_logs_T)[:, None]
    err_dz_TV = sum_T1 * err_q_TV + err_sum_T1 * q_TV + err_w_TV + u * (2 + COEF_ROUNDINGS) * (sum_T1 * q_TV + w_TV)
    # z / T once more, by its reciprocal.
    err_dz_TV = temp * (err_dz_TV + 2 * u * np.abs(sum_T1 * q_TV - w_TV))
    _, err_by_raw_TV = through_softcap(temp * (sum_T1 * q_TV - w_TV), err_dz_TV, slope_TV, cap, err_raw_T, u)

    # By log p. What is within rounding of 0 may be found to be 0, or as small as rounding leaves it.
    log_moved_T = np.where(
        p_tail_T >= 2 * err_p_tail_T,
        err_p_tail_T / np.maximum(p_tail_T - err_p_tail_T, np.finfo(np.float64).tiny) + LOG_ULPS * u * -log_p_tail_T,
        -log_p_tail_T + np.abs(log_q_tail_T) - np.log(u / 2) + 1,
    )
    # With a tail the lse of all classes, which both log-probabilities have been made with, cancels.
    err_ratio_TK = err_log_q_TK + (log_moved_T + err_tail_T - 2 * err_lse_T if has_tail else 0 * r_T)[:, None]
    sizes_TK = np.abs(ratio_TK) + np.abs(ratio_tail_T)[:, None] + 1
    err_by_teacher_TK = err_p_TK * sizes_TK + p_TK * (err_ratio_TK + u * (2 + COEF_ROUNDINGS) * sizes_TK)
    return err_loss_T, finite(err_by_raw_TV), temp**2 * finite(err_by_teacher_TK) + inner.near_zero


TEACHER = (
    Argument("teacher_indices", ("T", "K"), "index", differentiated=False, draw=draw_indices),
    Argument("teacher_logprobs", ("T", "K"), trained=False, draw=draw_logprobs),
)

DEFINITION = LossDef(
    "top_k_distillation",
    (Argument("student_logits", ("T", "V")), *TEACHER, *OF_TOKENS),
    oracle,
    error_bound,
    RECIPES,
    draw=near_student,
    random_fields=RANDOM_FIELDS,
    reduction=lambda config: "mean",
    row_numbers=2 + TOP_K,
)
