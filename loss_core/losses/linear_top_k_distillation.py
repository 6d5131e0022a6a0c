"""Distillation of logits h @ W.T + b from K log-probabilities of the teacher; see `top_k_distillation`."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, H = hidden

from __future__ import annotations

from typing import Any

import numpy as np

from loss_core.dtypes import compute_format, float_format
from loss_core.losses.bounds.products import product_errors, raw_logits
from loss_core.losses.bounds.rounding import finite, result_errors, stored, zero_where_ignored
from loss_core.losses.cases.top_k import RECIPES, likeliest_classes
from loss_core.losses.definition import Arrays, Floats, LossDef, Sizes, Upstream, draw_floats
from loss_core.losses.fused import BIAS, BIAS_RECIPE, fused_definition
from loss_core.losses.heads import Head
from loss_core.losses.reduction import TokenResult, times_rows
from loss_core.losses.top_k_distillation import DEFINITION as OVER_LOGITS
from loss_core.losses.top_k_distillation import read_teacher, scaled_errors, token_divergence, token_errors

HEADS = (Head("hidden_states", "lm_weight", "student_logits"),)


def error_bound(
    config: Any, arrays: Arrays, expected: TokenResult, dtype: str, upstream: Upstream, product_dtype: str | None
) -> dict[str, Floats]:
    """As over logits, plus the errors of the products; see `linear_cross_entropy.error_bound`."""
    keep_T, inner = expected.reduction.keep_T, compute_format(dtype)
    raw_TV, err_sum_TV = raw_logits(arrays, keep_T, inner.u)
    teacher = read_teacher(config, arrays, keep_T, raw_TV.shape[1])
    err_T, err_raw_TV, err_TK = token_errors(config, raw_TV, np.max(err_sum_TV, axis=-1), teacher, inner)
    result = result_errors(config, expected, np.where(keep_T, err_T, 0.0), dtype, upstream)
    coef_T, grad = np.abs(expected.coef_T), expected.grads["teacher_logprobs"]
    allowed = stored(finite(grad), finite(coef_T[:, None] * err_TK).reshape(grad.shape), float_format(dtype))
    result["teacher_logprobs"] = zero_where_ignored(allowed, keep_T)
    by_raw_TV = times_rows(expected.coef_T, token_divergence(config, raw_TV, teacher).by_raw_TV)
    error_TV = scaled_errors(config, err_raw_TV, coef_T, inner)
    return result | product_errors(arrays, expected, by_raw_TV, error_TV, keep_T, dtype, product_dtype)


def draw(definition: LossDef, sizes: Sizes, scale: float, rng: np.random.Generator) -> dict[str, Any]:
    """A student, and the K likeliest classes of an unrelated teacher."""
    drawn = {name: x for name, x in draw_floats(definition, sizes, scale, rng).items() if "teacher" not in name}
    # Unrelated: with a teacher close to the student, the gradient would be small next to the errors of the products.
    teacher = rng.standard_normal(sizes.shape(("T", "V"))) * scale
    return drawn | likeliest_classes(teacher, sizes.shape(("K",))[0], rng)


DEFINITION = fused_definition(
    OVER_LOGITS,
    HEADS,
    BIAS,
    name="linear_top_k_distillation",
    error_bound=error_bound,
    recipes=(*RECIPES, BIAS_RECIPE),
    draw=draw,
)
