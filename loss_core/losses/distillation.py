"""Knowledge distillation: a divergence of student and teacher at temperature T, times T^2.

With p = softmax(z / T) and M = beta p_t + (1 - beta) p_s, and 0 log 0 = 0:

    forward_kl  D = KL(p_t || p_s) = sum_v p_t (log p_t - log p_s)
                dD/dz_s = (p_s - p_t) / T            dD/dz_t = p_t ((log p_t - log p_s) - D) / T
    reverse_kl  the same with the roles exchanged
    jsd         D = beta KL(p_t || M) + (1 - beta) KL(p_s || M)
                dD/dz_t = beta p_t (log(p_t / M) - KL(p_t || M)) / T, and dD/dz_s likewise with 1 - beta and p_s;
                for beta = 0 it is forward_kl, for beta = 1 reverse_kl

Sources: Hinton et al. 2015 (arXiv:1503.02531), section 2; Agarwal et al. 2024 (arXiv:2306.13649), equation 1.
"""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary; the temperature is `temp`

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from loss_core.dtypes import FloatFormat, compute_format, float_format
from loss_core.losses.bounds.rounding import (
    COEF_ROUNDINGS,
    EXP_ARGUMENT_ROUNDINGS,
    EXP_ULPS,
    LOG_ULPS,
    SoftmaxErrors,
    finite,
    log_softmax,
    result_errors,
    softmax_errors,
    stored,
    sum_growth,
    zero_where_ignored,
)
from loss_core.losses.cases.random_fields import RANDOM_FIELDS
from loss_core.losses.definition import Argument, Arrays, Floats, LossDef, Recipe, Sizes, Upstream
from loss_core.losses.reduction import Reduction, TokenResult, masked_rows, times_rows, valid_tokens


def oracle(config: Any, arrays: Arrays, upstream: Upstream) -> TokenResult:
    """Loss, and the gradients of both logits and of the weights. Labels only mark ignored tokens."""
    shape, temp = np.shape(arrays["student_logits"]), float(config.temperature)
    reduction = reduction_of(config, arrays)
    zs_TV, zt_TV = (masked_rows(arrays[name], reduction.keep_T) / temp for name in ("student_logits", "teacher_logits"))
    d_T, by_student_TV, by_teacher_TV = token_divergence(beta_of(config), zs_TV, zt_TV)
    loss_T = np.where(reduction.keep_T, temp**2 * d_T, 0.0)
    coef_T = reduction.coefficients(upstream)
    grads = reduction.weights_grad(loss_T, upstream)
    grads["student_logits"] = times_rows(coef_T, temp * by_student_TV).reshape(shape)
    grads["teacher_logits"] = times_rows(coef_T, temp * by_teacher_TV).reshape(shape)
    return TokenResult(reduction.loss(loss_T), grads, loss_T, coef_T, reduction)


def reduction_of(config: Any, arrays: Arrays) -> Reduction:
    """Sum divided by the count, or the mean over valid tokens without a count."""
    count, shape = arrays.get("num_batch_labels"), np.shape(arrays["labels"])
    kind = "mean" if count is None else "sum"
    return Reduction(kind, shape, valid_tokens(arrays, config.ignore_index), count, arrays.get("loss_weights"))


def beta_of(config: Any) -> float:
    """The divergence as the beta of jsd: 0 is forward_kl, 1 is reverse_kl."""
    return {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": float(config.beta)}[config.divergence]


def token_divergence(beta: float, zs_TV: Floats, zt_TV: Floats) -> tuple[Floats, Floats, Floats]:
    """D of each token [T], and its derivatives by student's and teacher's z [T, V]."""
    if beta == 1:
        d_T, by_teacher_TV, by_student_TV = token_divergence(0.0, zt_TV, zs_TV)
        return d_T, by_student_TV, by_teacher_TV
    log_ps_TV, log_pt_TV = log_softmax(zs_TV), log_softmax(zt_TV)
    ps_TV, pt_TV = np.exp(log_ps_TV), np.exp(log_pt_TV)
    if beta == 0:
        d_T, by_teacher_TV = _kl(pt_TV, log_pt_TV - log_ps_TV)
        by_student_TV = ps_TV - pt_TV
    else:
        log_m_TV = np.logaddexp(np.log(beta) + log_pt_TV, np.log1p(-beta) + log_ps_TV)
        (kl_s_T, by_student_TV), (kl_t_T, by_teacher_TV) = (
            _kl(p_TV, log_p_TV - log_m_TV) for p_TV, log_p_TV in ((ps_TV, log_ps_TV), (pt_TV, log_pt_TV))
        )
        d_T = beta * kl_t_T + (1 - beta) * kl_s_T
        by_student_TV, by_teacher_TV = (1 - beta) * by_student_TV, beta * by_teacher_TV
    # Where the divergence is NaN, so is its gradient.
    nan_T1 = np.where(np.isnan(d_T), np.nan, 1.0)[:, None]
    return d_T, nan_T1 * by_student_TV, nan_T1 * by_teacher_TV


def _kl(p_TV: Floats, log_ratio_TV: Floats) -> tuple[Floats, Floats]:
    """KL = sum p log_ratio, and p (log_ratio - KL); terms with p = 0 are 0."""
    log_ratio_TV = np.where(p_TV == 0, 0.0, log_ratio_TV)
    kl_T = np.sum(p_TV * log_ratio_TV, axis=-1)
    return kl_T, np.where(p_TV == 0, 0.0, p_TV * (log_ratio_TV - kl_T[:, None]))


def error_bound(
    config: Any, arrays: Arrays, expected: TokenResult, dtype: str, upstream: Upstream, product_dtype: str | None
) -> dict[str, Floats]:
    """Rounding errors of the divergence, its derivatives, the sum, and the stored results."""
    fmt, inner, temp = float_format(dtype), compute_format(dtype), float(config.temperature)
    # z / T: the reciprocal and the product are each rounded once.
    scaled = 2 * inner.u if temp != 1 else 0.0

    def of(name: str) -> Side:
        z_TV = masked_rows(arrays[name], expected.reduction.keep_T) / temp
        return side(z_TV, scaled * np.max(np.abs(finite(z_TV)), axis=-1), inner)

    student, teacher = of("student_logits"), of("teacher_logits")
    err_d_T, *err_by_TV = divergence_errors(beta_of(config), student, teacher, inner.u)
    d_T = np.abs(finite(expected.token_loss_T)) / temp**2
    err_T = np.where(expected.reduction.keep_T, temp**2 * (err_d_T + 3 * inner.u * d_T), 0.0)
    result = result_errors(config, expected, err_T, dtype, upstream)
    coef_T1 = np.abs(expected.coef_T)[:, None] * temp
    for name, error_TV in zip(("student_logits", "teacher_logits"), err_by_TV, strict=True):
        grad = expected.grads[name]
        allowed = stored(finite(grad), finite(coef_T1 * error_TV).reshape(grad.shape), fmt)
        result[name] = zero_where_ignored(allowed, expected.reduction.keep_T)
    return result


class Side(NamedTuple):
    """One of two distributions: its softmax, the error of its z [T], and max |z| [T]."""

    sm: SoftmaxErrors
    err_z_T: Floats
    max_z_T: Floats


def side(z_TV: Floats, err_z_T: Floats, inner: FloatFormat) -> Side:
    """The errors of a distribution whose z are off by err_z."""
    return Side(softmax_errors(z_TV, err_z_T, inner), err_z_T, np.max(np.abs(finite(z_TV)), axis=-1))


def divergence_errors(beta: float, student: Side, teacher: Side, u: float) -> tuple[Floats, Floats, Floats]:
    """Errors of D [T], and of its derivatives by student's and teacher's z [T, V], including the coefficient's."""
    if beta == 0:
        return _kl_errors(student, teacher, u)
    if beta == 1:
        err_d_T, err_teacher_TV, err_student_TV = _kl_errors(teacher, student, u)
        return err_d_T, err_student_TV, err_teacher_TV
    return _jsd_errors(beta, student, teacher, u)


def _err_log_ratio(student: Side, teacher: Side, u: float) -> Floats:
    """Each log-probability is z - lse: the errors of both lse, of both z, and the rounding of the difference."""
    err_lse_T = student.sm.err_lse_T + teacher.sm.err_lse_T
    return np.asarray(err_lse_T + student.err_z_T + teacher.err_z_T + 2 * u * (student.max_z_T + teacher.max_z_T))


def _kl_errors(student: Side, teacher: Side, u: float) -> tuple[Floats, Floats, Floats]:
    """KL = sum p_t d with d = log p_t - log p_s: errors of the weights p_t times |z_t - z_s|, and errors of d."""
    (sm_s, *_), (sm_t, *_) = student, teacher
    pt_TV = sm_t.p_TV
    d_TV = np.where(pt_TV == 0, 0.0, sm_t.log_p_TV - sm_s.log_p_TV)
    gap_TV = np.abs(np.where(pt_TV == 0, 0.0, finite(sm_t.z_TV - sm_s.z_TV)))
    kl_T = np.sum(finite(pt_TV * d_TV), axis=-1)
    err_d_T = _err_log_ratio(student, teacher, u)
    weighted_TV = pt_TV * gap_TV
    err_kl_T = (
        err_d_T
        + np.sum(finite(sm_t.err_p_TV * gap_TV + sum_growth(pt_TV.shape[-1]) * u * weighted_TV), axis=-1)
        + 2 * u * (np.sum(weighted_TV, axis=-1) + np.abs(sm_s.lse_T) + np.abs(sm_t.lse_T) + np.abs(kl_T))
    )
    difference_TV = np.abs(sm_s.p_TV - pt_TV)
    err_student_TV = sm_s.err_p_TV + sm_t.err_p_TV + u * (2 + COEF_ROUNDINGS) * difference_TV
    centred_TV = np.abs(finite(d_TV - kl_T[:, None]))
    weight_TV = sm_t.err_p_TV + u * (2 + COEF_ROUNDINGS) * pt_TV
    return err_kl_T, err_student_TV, weight_TV * centred_TV + pt_TV * (err_d_T + err_kl_T)[:, None]


def _jsd_errors(beta: float, student: Side, teacher: Side, u: float) -> tuple[Floats, Floats, Floats]:
    """Each KL(p || M) = sum p x with x = log p - log M: errors of the weights p times |x|, and errors of x.

    Whether x is computed from log p_t - log p_s, or from log p and a log M that lies between the two, log-probabilities
    enter twice. In addition: an exp, the rounding of its argument (r e^-r <= 0.4), the log of a sum that is at most 2,
    the logarithms of beta and 1 - beta (rounded, added, subtracted), and x. Beta and 1 - beta are rounded, and so are
    the products with them.
    """
    log_shares = abs(np.log(beta)) + abs(np.log1p(-beta))
    log_m_TV = np.logaddexp(np.log(beta) + teacher.sm.log_p_TV, np.log1p(-beta) + student.sm.log_p_TV)
    fixed = EXP_ULPS + EXP_ARGUMENT_ROUNDINGS * 0.4 + LOG_ULPS * np.log(2) + 3 * log_shares
    err_logs_T1 = 2 * _err_log_ratio(student, teacher, u)[:, None]
    err_T, err_by_TV = np.zeros(len(log_m_TV)), []
    for (sm, *_), share in ((student, 1 - beta), (teacher, beta)):
        x_TV = finite(sm.log_p_TV - log_m_TV)
        kl_T = np.sum(sm.p_TV * x_TV, axis=-1)
        err_x_TV = err_logs_T1 + u * (fixed + 2 * np.abs(x_TV))
        summed = (2 + sum_growth(x_TV.shape[-1])) * u
        err_kl_T = np.sum((sm.err_p_TV + summed * sm.p_TV) * np.abs(x_TV) + sm.p_TV * err_x_TV, axis=-1)
        err_T = err_T + share * (err_kl_T + 4 * u * np.abs(kl_T))
        weight_TV = sm.err_p_TV + u * (4 + COEF_ROUNDINGS) * sm.p_TV
        centred_TV = np.abs(x_TV - kl_T[:, None])
        err_by_TV.append(share * (weight_TV * centred_TV + sm.p_TV * (err_x_TV + err_kl_T[:, None])))
    return err_T, err_by_TV[0], err_by_TV[1]


def near_logits(definition: LossDef, sizes: Sizes, scale: float, rng: np.random.Generator) -> dict[str, Floats]:
    """Teacher logits are perturbed student logits: two unrelated distributions would only ever have a large KL."""
    shape = sizes.shape(("T", "V"))
    student = rng.standard_normal(shape) * scale
    return {"student_logits": student, "teacher_logits": student + rng.standard_normal(shape) * scale / 2}


def _same_logits(drawn: Any) -> None:
    drawn.arrays["teacher_logits"] = drawn.arrays["student_logits"].copy()


def _mask_half(*names: str) -> Callable[[Any], None]:
    """A change that sets half of the classes of these logits to -inf, but never the first."""

    def change(drawn: Any) -> None:
        for name in names:
            banned = drawn.rng.random(drawn.arrays[name].shape) < 0.5
            banned[..., 0] = False
            drawn.arrays[name] = np.where(banned, -np.inf, drawn.arrays[name])

    return change


def _invalid_labels(drawn: Any) -> None:
    labels = drawn.arrays["labels"]
    others = drawn.rng.choice([-1, drawn.recipe.vocab, 2**31 - 1, -(2**31)], labels.shape)
    drawn.arrays["labels"] = np.where(labels == drawn.ignore_index, labels, others)


# Arguments of every distillation in addition to student and teacher.
TOKEN_ARGUMENTS = (
    Argument("labels", ("T",), "mark", differentiated=False),
    Argument("num_batch_labels", (), "count", differentiated=False, optional=True),
    Argument("loss_weights", ("T",), optional=True, with_count=True),
)

_REVERSE: dict[str, Any] = {"divergence": "reverse_kl"}
_JSD: dict[str, Any] = {"divergence": "jsd"}

RECIPES = (
    Recipe("many-tokens-kd", "errors between row blocks", {"chunk_size": 5}),
    Recipe("temperature", "a missing T^2, or a T in the wrong place", {"temperature": 2.5}),
    Recipe("cold", "a temperature below 1", {"temperature": 0.5}, extras=("count",)),
    Recipe("no-classes", "labels used as classes, where they only mark ignored tokens", change=_invalid_labels),
    Recipe("same-logits", "a divergence of equal distributions that is not 0", change=_same_logits),
    Recipe("ruled-out", "NaN from -inf in the teacher's logits alone", change=_mask_half("teacher_logits")),
    Recipe(
        "reverse",
        "roles exchanged in the loss, but not in a gradient",
        _REVERSE | {"temperature": 2.0},
        extras=("loss_weights", "count", "upstream"),
    ),
    Recipe("reverse-ruled-out", "NaN from -inf in the student's logits", _REVERSE, change=_mask_half("student_logits")),
    Recipe(
        "jsd",
        "the shares of teacher and student exchanged",
        _JSD | {"beta": 0.2, "temperature": 2.0, "chunk_size": 5},
        extras=("loss_weights", "count", "upstream"),
    ),
    Recipe("jsd-same-logits", "a mixture of equal distributions that is another one", _JSD, change=_same_logits),
    Recipe(
        "jsd-ruled-out",
        "NaN from -inf in the logits of one or of both",
        _JSD,
        change=_mask_half("student_logits", "teacher_logits"),
    ),
    Recipe("jsd-huge-logits", "overflow of a ratio of probabilities", _JSD | {"beta": 0.9}, scale=1e4),
)

DEFINITION = LossDef(
    "distillation",
    (
        Argument("student_logits", ("T", "V")),
        Argument("teacher_logits", ("T", "V"), trained=False),
        *TOKEN_ARGUMENTS,
    ),
    oracle,
    error_bound,
    RECIPES,
    draw=near_logits,
    random_fields=RANDOM_FIELDS,
    reduction=lambda config: "mean",
    row_numbers=5,
)
