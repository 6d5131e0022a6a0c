"""Distillation from K log-probabilities of a teacher, of logits h @ W.T + b; see `top_k_distillation`."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, H = hidden

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.dtypes import compute_format, float_format
from loss_core.losses.definition import TOP_K, Argument, Arrays, Floats, LossDef, Recipe, Sizes, draw_floats
from loss_core.losses.distillation import reduction_of
from loss_core.losses.linear_cross_entropy import BIAS, bias_of, product_errors, raw_logits
from loss_core.losses.reduction import TokenResult, kept_rows, times_rows
from loss_core.losses.rounding import finite, result_errors, stored, zero_where_ignored
from loss_core.losses.top_k_cases import RANDOM_FIELDS, RECIPES, of_teacher
from loss_core.losses.top_k_distillation import LABELS, TEACHER, WEIGHTS, of_tokens, teacher_of, token_errors


def oracle(config: Any, arrays: Arrays, upstream: NDArray[Any] | None) -> TokenResult:
    """Loss, and the gradients of hidden states, weight, bias, teacher's log-probabilities and weights."""
    reduction = reduction_of(config, arrays)
    keep_T = reduction.keep_T
    h_TH, w_VH = kept_rows(arrays["hidden_states"], keep_T), np.asarray(arrays["lm_weight"], np.float64)
    found = of_tokens(config, h_TH @ w_VH.T + bias_of(arrays), teacher_of(config, arrays, keep_T, len(w_VH)))
    loss_T, coef_T = np.where(keep_T, found.loss_T, 0.0), reduction.coefficients(upstream)
    grads = reduction.weights_grad(loss_T, upstream)
    by_raw_TV = times_rows(coef_T, found.by_raw_TV)
    grads["hidden_states"] = (by_raw_TV @ w_VH).reshape(np.shape(arrays["hidden_states"]))
    grads["lm_weight"] = by_raw_TV.T @ h_TH
    grads["teacher_logprobs"] = times_rows(coef_T, found.by_teacher_TK).reshape(np.shape(arrays["teacher_logprobs"]))
    if "lm_bias" in arrays:
        grads["lm_bias"] = by_raw_TV.sum(0)
    return TokenResult(reduction.loss(loss_T), grads, loss_T, coef_T, reduction)


def error_bound(
    config: Any, arrays: Arrays, expected: TokenResult, dtype: str, upstream: NDArray[Any] | None, product_dtype: Any
) -> dict[str, Floats]:
    """As over logits, with products before and after as in the fused cross entropy."""
    keep_T, inner = expected.reduction.keep_T, compute_format(dtype)
    raw_TV, err_sum_TV = raw_logits(arrays, keep_T, inner.u)
    teacher = teacher_of(config, arrays, keep_T, raw_TV.shape[1])
    err_T, err_raw_TV, err_TK = token_errors(config, raw_TV, np.max(err_sum_TV, axis=-1), teacher, inner)
    result = result_errors(config, expected, np.where(keep_T, err_T, 0.0), dtype, upstream)
    coef_T1, grad = np.abs(expected.coef_T)[:, None], expected.grads["teacher_logprobs"]
    allowed = stored(finite(grad), finite(coef_T1 * err_TK).reshape(grad.shape), float_format(dtype))
    result["teacher_logprobs"] = zero_where_ignored(allowed, keep_T)
    by_raw_TV = times_rows(expected.coef_T, of_tokens(config, raw_TV, teacher).by_raw_TV)
    return result | product_errors(arrays, expected, by_raw_TV, coef_T1 * err_raw_TV, keep_T, dtype, product_dtype)


def draw(definition: LossDef, sizes: Sizes, scale: float, rng: np.random.Generator) -> dict[str, Any]:
    """A student, and the likeliest classes of a teacher."""
    drawn = {name: x for name, x in draw_floats(definition, sizes, scale, rng).items() if "teacher" not in name}
    # Of its own: beside the errors of the products, the small gradient of a near one would prove little.
    teacher = rng.standard_normal(sizes.shape(("T", "V"))) * scale
    return drawn | of_teacher(teacher, sizes.shape(("K",))[0], rng)


DEFINITION = LossDef(
    "linear_top_k_distillation",
    (
        Argument("hidden_states", ("T", "H")),
        Argument("lm_weight", ("V", "H")),
        *TEACHER,
        LABELS,
        *WEIGHTS,
        BIAS,
    ),
    oracle,
    error_bound,
    (*RECIPES, Recipe("bias", "a bias left out, or without a gradient", extras=("lm_bias", "upstream"))),
    draw=draw,
    random_fields=RANDOM_FIELDS,
    reduction=lambda config: "mean",
    products=1,
    row_numbers=2 + TOP_K,
)
