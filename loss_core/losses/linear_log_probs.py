"""Log-probabilities and entropies of logits h @ W.T + b; see `log_probs`."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, H = hidden

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.dtypes import compute_format
from loss_core.losses.bounds.products import product_errors, raw_logits
from loss_core.losses.bounds.rounding import finite, stored
from loss_core.losses.definition import LABELS, Argument, Arrays, Floats, LossDef, Oracle, OracleResult
from loss_core.losses.heads import over_heads
from loss_core.losses.linear_cross_entropy import BIAS, BIAS_RECIPE, HEADS
from loss_core.losses.log_probs import (
    RANDOM_FIELDS,
    RECIPES,
    TEMPERATURE,
    of_tokens,
    reshaped,
    results_of,
    token_errors,
)
from loss_core.losses.log_probs import oracle as oracle_of_logits
from loss_core.losses.lower import lower_products
from loss_core.losses.reduction import kept_tokens

oracle: Oracle[OracleResult] = over_heads(oracle_of_logits, HEADS)


def error_bound(
    config: Any, arrays: Arrays, expected: OracleResult, dtype: str, upstream: NDArray[Any] | None, product_dtype: Any
) -> dict[str, Floats]:
    """As log-probabilities over logits, with products before and after as in the fused cross entropy."""
    keep_T, inner = kept_tokens(arrays, config.ignore_index), compute_format(dtype)
    raw_TV, err_raw_TV = raw_logits(arrays, keep_T, inner.u)
    err_RT, err_TV = token_errors(config, raw_TV, np.max(err_raw_TV, axis=-1), arrays, upstream, inner)
    grad_TV = finite(of_tokens(config, raw_TV, arrays, upstream).grad_TV)
    result = {"loss": stored(finite(expected.loss), reshaped(config, err_RT, arrays), inner)}
    return result | product_errors(arrays, expected, grad_TV, err_TV, keep_T, dtype, product_dtype)


DEFINITION = LossDef(
    "linear_log_probs",
    (Argument("hidden_states", ("T", "H")), Argument("lm_weight", ("V", "H")), LABELS, TEMPERATURE, BIAS),
    oracle,
    error_bound,
    (*RECIPES, BIAS_RECIPE),
    random_fields=RANDOM_FIELDS,
    reduction=lambda config: "none",
    results=results_of,
    products=1,
    lower=lower_products(oracle_of_logits, HEADS),
    row_numbers=4,
)
