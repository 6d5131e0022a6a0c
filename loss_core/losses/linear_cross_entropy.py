"""Cross entropy of softcap(h @ W.T + b)."""

# T = tokens (all leading dimensions of labels, flattened), n = some of them, V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.dtypes import compute_format
from loss_core.losses.bounds.products import product_errors, raw_logits
from loss_core.losses.bounds.rounding import TANH_ULPS, through_softcap
from loss_core.losses.cross_entropy import DEFINITION as OVER_LOGITS
from loss_core.losses.cross_entropy import logits_errors, reduction_of, softcap, token_cross_entropy
from loss_core.losses.definition import Argument, Arrays, Floats, Recipe, Upstream
from loss_core.losses.fused import BIAS, BIAS_RECIPE, fused_definition
from loss_core.losses.heads import Head
from loss_core.losses.metrics import upstream_of_loss
from loss_core.losses.reduction import TokenResult, times_rows

HEADS = (Head("hidden_states", "lm_weight", "logits"),)


def sampled_rows(
    config: Any, h_nH: Floats, blocks: Iterable[NDArray[Any]], arrays: Arrays, upstream: Upstream
) -> Floats:
    """Gradient of n rows of hidden states [n, H], for a call too large for the oracle.

    Args:
        blocks: the weight [V, H] in blocks of rows.
        arrays: the other arguments, of these n rows.
    """
    parts = [np.asarray(block, np.float64) for block in blocks]
    z_nV, slope_nV = softcap(np.concatenate([h_nH @ part.T for part in parts], axis=1), config.logit_softcapping)
    reduction = reduction_of(config, arrays)
    _, dz_nV = token_cross_entropy(config, z_nV, np.asarray(arrays["labels"]).reshape(-1), reduction.keep_T)
    draw_nV = times_rows(reduction.coefficients(upstream_of_loss(config, upstream)), dz_nV * slope_nV)
    dh_nH, start = np.zeros_like(h_nH), 0
    for part in parts:
        dh_nH += draw_nV[:, start : start + len(part)] @ part
        start += len(part)
    return dh_nH


def error_bound(
    config: Any, arrays: Arrays, expected: TokenResult, dtype: str, upstream: Upstream, product_dtype: str | None
) -> dict[str, Floats]:
    """As for cross entropy over logits, plus the errors of the products that compute the logits and the gradients.

    A logit is a sum of H products: sum_growth(H) u |h| |W|. The softcap adds its own roundings, and its slope
    1 - tanh^2 changes by 2 err / c. Each gradient is a sum over V (or T) of products whose left factor carries the
    error of the logits' gradient.
    """
    u, cap = compute_format(dtype).u, float(config.logit_softcapping)
    raw_TV, err_raw_TV = raw_logits(arrays, expected.reduction.keep_T, u)
    err_raw_T = np.max(err_raw_TV, axis=-1)
    z_TV, slope_TV = softcap(raw_TV, cap)
    err_z_T = err_raw_T + (TANH_ULPS * u * np.max(np.abs(raw_TV), axis=-1) if cap else 0.0)
    result, dz_TV, err_dz_TV = logits_errors(config, z_TV, err_z_T, arrays, expected, dtype, upstream)
    dz_TV, err_dz_TV = through_softcap(dz_TV, err_dz_TV, slope_TV, cap, err_raw_T, u)
    return result | product_errors(arrays, expected, dz_TV, err_dz_TV, expected.reduction.keep_T, dtype, product_dtype)


RECIPES = (
    BIAS_RECIPE,
    Recipe("many-tokens", "errors between token blocks", lead=(2, 333), vocab=67, hidden=16, scale=1.0),
    Recipe("chunks", "a shorter last chunk that is skipped or read twice", {"chunk_len": 5}, ("chunk_len",)),
    Recipe(
        "chunks-none",
        "upstream gradients or terms of another chunk",
        {"chunk_len": 7, "reduction": "none"},
        ("chunk_len",),
        extras=("upstream",),
    ),
)

DEFINITION = fused_definition(
    OVER_LOGITS,
    HEADS,
    Argument("num_valid_tokens", (), "hint", differentiated=False, optional=True),
    BIAS,
    name="linear_cross_entropy",
    error_bound=error_bound,
    recipes=RECIPES,
    sampled_rows=sampled_rows,
)
