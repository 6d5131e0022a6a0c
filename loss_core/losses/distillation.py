"""Knowledge distillation: KL(teacher || student) at temperature T, times T^2.

    loss     = T^2 sum_v p(z_t/T) (log p(z_t/T) - log p(z_s/T)),  p = softmax
    dL/dz_s  = T (p_s - p_t)
    dL/dz_t  = T p_t ((log p_t - log p_s) - KL)

Source: Hinton et al. 2015 (arXiv:1503.02531), section 2.
"""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary; the temperature is `temp`

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.dtypes import compute_format, float_format
from loss_core.losses.definition import Argument, Arrays, Floats, LossDef, Recipe, Sizes
from loss_core.losses.reduction import Reduction, TokenResult, kept_rows, kept_tokens, times_rows
from loss_core.losses.rounding import (
    COEF_ROUNDINGS,
    finite,
    log_softmax,
    result_errors,
    softmax_errors,
    stored,
    sum_growth,
    zero_where_ignored,
)


def oracle(config: Any, arrays: Arrays, upstream: NDArray[Any] | None) -> TokenResult:
    """Loss, and the gradients of both logits. Labels only say which tokens are ignored."""
    shape, temp = np.shape(arrays["student_logits"]), float(config.temperature)
    keep_T = kept_tokens(arrays, config.ignore_index)
    count = arrays.get("num_batch_labels")
    reduction = Reduction("mean" if count is None else "sum", np.shape(arrays["labels"]), keep_T, count)
    log_ps_TV = log_softmax(kept_rows(arrays["student_logits"], keep_T) / temp)
    log_pt_TV = log_softmax(kept_rows(arrays["teacher_logits"], keep_T) / temp)
    ps_TV, pt_TV = np.exp(log_ps_TV), np.exp(log_pt_TV)
    ratio_TV = np.where(pt_TV == 0, 0.0, log_pt_TV - log_ps_TV)
    kl_T = np.sum(pt_TV * ratio_TV, axis=-1)
    loss_T = np.where(keep_T, temp**2 * kl_T, 0.0)
    coef_T = reduction.coefficients(upstream)
    # Where the loss is not a number, neither is its gradient.
    known_T1 = np.where(np.isnan(kl_T), np.nan, 1.0)[:, None]
    student_TV = known_T1 * temp * (ps_TV - pt_TV)
    teacher_TV = known_T1 * np.where(pt_TV == 0, 0.0, temp * pt_TV * (ratio_TV - kl_T[:, None]))
    grads = {
        "student_logits": times_rows(coef_T, student_TV).reshape(shape),
        "teacher_logits": times_rows(coef_T, teacher_TV).reshape(shape),
    }
    return TokenResult(reduction.loss(loss_T), grads, loss_T, coef_T, reduction)


def error_bound(
    config: Any, arrays: Arrays, expected: TokenResult, dtype: str, upstream: NDArray[Any] | None, product_dtype: Any
) -> dict[str, Floats]:
    """KL = sum p_t d, with d = log p_t - log p_s: errors of the weights p_t times |z_t - z_s|, and of d."""
    fmt, inner = float_format(dtype), compute_format(dtype)
    u, temp = inner.u, float(config.temperature)
    zs_TV = kept_rows(arrays["student_logits"], expected.reduction.keep_T) / temp
    zt_TV = kept_rows(arrays["teacher_logits"], expected.reduction.keep_T) / temp
    top_s_T, top_t_T = (np.max(np.abs(finite(z_TV)), axis=-1) for z_TV in (zs_TV, zt_TV))
    # z / T: the reciprocal and the product are each rounded once.
    scaled = 2 * u if temp != 1 else 0.0
    student = softmax_errors(zs_TV, scaled * top_s_T, inner)
    teacher = softmax_errors(zt_TV, scaled * top_t_T, inner)
    pt_TV = teacher.p_TV
    d_TV = np.where(pt_TV == 0, 0.0, teacher.log_p_TV - student.log_p_TV)
    gap_TV = np.where(pt_TV == 0, 0.0, finite(zt_TV - zs_TV))
    kl_T = np.sum(finite(pt_TV * d_TV), axis=-1)
    # Each log-probability is z - lse: both lse's errors, both scalings, and the rounding of the difference.
    err_d_T = student.err_lse_T + teacher.err_lse_T + (2 * u + scaled) * (top_s_T + top_t_T)
    weighted_TV = pt_TV * np.abs(gap_TV)
    err_kl_T = (
        err_d_T
        + np.sum(finite(teacher.err_p_TV * np.abs(gap_TV) + sum_growth(pt_TV.shape[-1]) * u * weighted_TV), axis=-1)
        + 2 * u * (np.sum(weighted_TV, axis=-1) + np.abs(student.lse_T) + np.abs(teacher.lse_T) + np.abs(kl_T))
    )
    err_T = np.where(expected.reduction.keep_T, temp**2 * (err_kl_T + 3 * u * np.abs(kl_T)), 0.0)
    result = result_errors(config, expected, err_T, dtype, upstream)
    coef_T1 = np.abs(expected.coef_T)[:, None] * temp
    difference_TV = np.abs(student.p_TV - pt_TV)
    err_student_TV = coef_T1 * (student.err_p_TV + teacher.err_p_TV + u * (2 + COEF_ROUNDINGS) * difference_TV)
    centred_TV = np.abs(finite(d_TV - kl_T[:, None]))
    err_teacher_TV = coef_T1 * (
        (teacher.err_p_TV + u * (2 + COEF_ROUNDINGS) * pt_TV) * centred_TV + pt_TV * (err_d_T + err_kl_T)[:, None]
    )
    for name, error_TV in (("student_logits", err_student_TV), ("teacher_logits", err_teacher_TV)):
        grad = expected.grads[name]
        allowed = stored(finite(grad), finite(error_TV).reshape(grad.shape), fmt)
        result[name] = zero_where_ignored(allowed, expected.reduction.keep_T)
    return result


def near_logits(definition: LossDef, sizes: Sizes, scale: float, rng: np.random.Generator) -> dict[str, Floats]:
    """A teacher that is a disturbed student: two unrelated distributions would have nothing but a large KL."""
    shape = sizes.shape(("T", "V"))
    student = rng.standard_normal(shape) * scale
    return {"student_logits": student, "teacher_logits": student + rng.standard_normal(shape) * scale / 2}


def _same_logits(drawn: Any) -> None:
    drawn.arrays["teacher_logits"] = drawn.arrays["student_logits"].copy()


def _no_classes(drawn: Any) -> None:
    labels = drawn.arrays["labels"]
    others = drawn.rng.choice([-1, drawn.recipe.vocab, 2**31 - 1, -(2**31)], labels.shape)
    drawn.arrays["labels"] = np.where(labels == drawn.ignore_index, labels, others)


RECIPES = (
    Recipe("many-tokens-kd", "errors between row blocks", {"chunk_size": 5}),
    Recipe("temperature", "a missing T^2, or a T in the wrong place", {"temperature": 2.5}),
    Recipe("cold", "a temperature below 1", {"temperature": 0.5}, extras=("count",)),
    Recipe(
        "no-classes", "a label compared with the classes, which only says whether its token counts", change=_no_classes
    ),
    Recipe("same-logits", "a divergence of equal distributions that is not 0", change=_same_logits),
)

DEFINITION = LossDef(
    "distillation",
    (
        Argument("student_logits", ("T", "V")),
        Argument("teacher_logits", ("T", "V"), trained=False),
        Argument("labels", ("T",), "mark", differentiated=False),
        Argument("num_batch_labels", (), "count", differentiated=False, optional=True),
    ),
    oracle,
    error_bound,
    RECIPES,
    draw=near_logits,
    random_fields={
        "ignore_index": lambda rng: int(rng.choice([-100, -1, 0, 2])),
        "temperature": lambda rng: float(rng.choice([0.5, 1.0, 2.0, 4.0])),
        "chunk_size": lambda rng: int(rng.choice([0, 1, 3])),
        "fp32_upcast": lambda rng: bool(rng.random() < 0.7),
    },
    reduction=lambda config: "mean",
    row_numbers=5,
)
