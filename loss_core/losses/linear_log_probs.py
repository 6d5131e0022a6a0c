"""Log-probabilities and entropies of logits h @ W.T + b; see `log_probs`."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, H = hidden

from __future__ import annotations

from typing import Any

import numpy as np

from loss_core.dtypes import compute_format
from loss_core.losses.bounds.products import product_errors, raw_logits
from loss_core.losses.bounds.rounding import finite, stored
from loss_core.losses.definition import Arrays, Floats, OracleResult, Upstream
from loss_core.losses.fused import BIAS, BIAS_RECIPE, fused_definition
from loss_core.losses.linear_cross_entropy import HEADS
from loss_core.losses.log_probs import DEFINITION as OVER_LOGITS
from loss_core.losses.log_probs import RECIPES, reshaped, token_errors, token_results
from loss_core.losses.reduction import valid_tokens


def error_bound(
    config: Any, arrays: Arrays, expected: OracleResult, dtype: str, upstream: Upstream, product_dtype: str | None
) -> dict[str, Floats]:
    """As for log-probabilities over logits, plus the errors of the products; see `linear_cross_entropy.error_bound`."""
    keep_T, inner = valid_tokens(arrays, config.ignore_index), compute_format(dtype)
    raw_TV, err_raw_TV = raw_logits(arrays, keep_T, inner.u)
    err_RT, err_TV = token_errors(config, raw_TV, np.max(err_raw_TV, axis=-1), arrays, upstream, inner)
    grad_TV = finite(token_results(config, raw_TV, arrays, upstream).grad_TV)
    result = {"loss": stored(finite(expected.loss), reshaped(config, err_RT, arrays), inner)}
    return result | product_errors(arrays, expected, grad_TV, err_TV, keep_T, dtype, product_dtype)


DEFINITION = fused_definition(
    OVER_LOGITS, HEADS, BIAS, name="linear_log_probs", error_bound=error_bound, recipes=(*RECIPES, BIAS_RECIPE)
)
