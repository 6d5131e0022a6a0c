"""Cross entropy of softcap(h @ W.T + b)."""

# T = tokens (all leading dimensions of labels, flattened), n = some of them, V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.dtypes import compute_format, float_format
from loss_core.losses.cross_entropy import (
    COUNT,
    RANDOM_FIELDS,
    logits_errors,
    reduction_of,
    softcap,
    through_softcap,
    token_cross_entropy,
)
from loss_core.losses.cross_entropy import oracle as oracle_of_logits
from loss_core.losses.definition import LABELS, LOSS_WEIGHTS, Argument, Arrays, Floats, LossDef, OracleResult, Recipe
from loss_core.losses.heads import Head, over_heads
from loss_core.losses.lower import lower_products
from loss_core.losses.metrics import results_of, upstream_of_loss
from loss_core.losses.reduction import TokenResult, kept_rows, times_rows
from loss_core.losses.rounding import (
    TANH_ULPS,
    finite,
    stored,
    sum_growth,
    zero_where_ignored,
)

HEADS = (Head("hidden_states", "lm_weight", "logits"),)

oracle = over_heads(oracle_of_logits, HEADS)


def bias_of(arrays: Arrays) -> Floats:
    """The bias of the head [V], or 0."""
    return np.asarray(arrays.get("lm_bias", 0.0), np.float64)


def sampled_rows(
    config: Any, h_nH: Floats, blocks: Iterable[NDArray[Any]], arrays: Arrays, upstream: NDArray[Any] | None
) -> Floats:
    """Gradient of some rows of hidden states [n, H] of a call too large for the oracle.

    Args:
        blocks: the weight, some rows at a time; gone through twice.
        arrays: the other arguments, of these rows.
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
    config: Any,
    arrays: Arrays,
    expected: TokenResult,
    dtype: str,
    upstream: NDArray[Any] | None,
    product_dtype: str | None,
) -> dict[str, Floats]:
    """As cross entropy, with products before and after.

    A logit is a sum of H products: sum_growth(H) u |h| |W|. The softcap adds its own roundings, and
    its slope 1 - tanh^2 moves by 2 err / c. Each gradient is a sum over V (or T) of products whose
    left factor carries the error of the logits' gradient.
    """
    u, cap = compute_format(dtype).u, float(config.logit_softcapping)
    raw_TV, err_raw_TV = raw_logits(arrays, expected.reduction.keep_T, u)
    err_raw_T = np.max(err_raw_TV, axis=-1)
    z_TV, slope_TV = softcap(raw_TV, cap)
    err_z_T = err_raw_T + (TANH_ULPS * u * np.max(np.abs(raw_TV), axis=-1) if cap else 0.0)
    result, dz_TV, err_dz_TV = logits_errors(config, z_TV, err_z_T, arrays, expected, dtype, upstream)
    dz_TV, err_dz_TV = through_softcap(dz_TV, err_dz_TV, slope_TV, cap, err_raw_T, u)
    return result | product_errors(arrays, expected, dz_TV, err_dz_TV, expected.reduction.keep_T, dtype, product_dtype)


def head_of(arrays: Arrays, keep_T: NDArray[np.bool_], of: str = "") -> tuple[Floats, Floats]:
    """Hidden states [T, H] with zeros in ignored rows, and weight [V, H].

    Args:
        of: what the names of both begin with.
    """
    return kept_rows(arrays[f"{of}hidden_states"], keep_T), np.asarray(arrays[f"{of}lm_weight"], np.float64)


def raw_logits(arrays: Arrays, keep_T: NDArray[np.bool_], u: float, of: str = "") -> tuple[Floats, Floats]:
    """h @ W.T + b with zeros for ignored rows of h, and the error of each of these sums of H + 1 terms; [T, V] both."""
    h_TH, w_VH = head_of(arrays, keep_T, of)
    bias_V = bias_of(arrays)
    sizes_TV = np.abs(h_TH) @ np.abs(w_VH).T + np.abs(bias_V)
    return h_TH @ w_VH.T + bias_V, sum_growth(h_TH.shape[1] + 1) * u * sizes_TV


def product_errors(
    arrays: Arrays,
    expected: OracleResult,
    dz_TV: Floats,
    err_dz_TV: Floats,
    keep_T: NDArray[np.bool_],
    dtype: str,
    product_dtype: str | None,
    of: str = "",
) -> dict[str, Floats]:
    """Errors of the gradients of hidden states, weight and bias, from that of the gradient by the raw logits."""
    fmt, inner = float_format(dtype), compute_format(dtype)
    u, (h_TH, w_VH) = inner.u, head_of(arrays, keep_T, of)
    of_hidden, of_weight = f"{of}hidden_states", f"{of}lm_weight"
    if product_dtype is not None:
        operand = float_format(product_dtype)
        # Rounding of the operand, and what is lost near 0.
        err_dz_TV = err_dz_TV + operand.u * np.abs(dz_TV) + np.where(dz_TV != 0, operand.near_zero, 0.0)
    size_TV = np.abs(dz_TV)
    num_tokens, vocab = size_TV.shape
    # Each term of a sum may be flushed to 0 as well.
    err_h_TH = (err_dz_TV + sum_growth(vocab) * u * size_TV) @ np.abs(w_VH) + vocab * inner.near_zero
    err_w_VH = (err_dz_TV + sum_growth(num_tokens) * u * size_TV).T @ np.abs(h_TH) + num_tokens * inner.near_zero
    grad = expected.grads[of_hidden]
    allowed = stored(finite(grad), err_h_TH.reshape(grad.shape), fmt)
    result = {
        of_hidden: zero_where_ignored(allowed, keep_T),
        of_weight: stored(finite(expected.grads[of_weight]), err_w_VH, fmt),
    }
    if "lm_bias" in arrays:
        err_b_V = np.sum(err_dz_TV + sum_growth(num_tokens) * u * size_TV, axis=0) + num_tokens * inner.near_zero
        result["lm_bias"] = stored(finite(expected.grads["lm_bias"]), err_b_V, fmt)
    return result


BIAS = Argument("lm_bias", ("V",), optional=True)

RECIPES = (
    Recipe("bias", "a bias left out, or without a gradient", extras=("lm_bias", "upstream")),
    Recipe("many-tokens", "errors between token blocks", lead=(2, 333), vocab=67, hidden=16, scale=1.0),
    Recipe("chunks", "a last chunk that is shorter, left out or read twice", {"chunk_len": 5}, ("chunk_len",)),
    Recipe(
        "chunks-none",
        "upstream gradients or terms of another chunk",
        {"chunk_len": 7, "reduction": "none"},
        ("chunk_len",),
        extras=("upstream",),
    ),
)

DEFINITION = LossDef(
    "linear_cross_entropy",
    (
        Argument("hidden_states", ("T", "H")),
        Argument("lm_weight", ("V", "H")),
        LABELS,
        COUNT,
        LOSS_WEIGHTS,
        Argument("num_valid_tokens", (), "hint", differentiated=False, optional=True),
        BIAS,
    ),
    oracle,
    error_bound,
    RECIPES,
    random_fields=RANDOM_FIELDS | {"chunk_len": lambda rng: int(rng.choice([1, 3, 64, 512]))},
    products=1,
    lower=lower_products(oracle_of_logits, HEADS),
    results=results_of,
    sampled_rows=sampled_rows,
)
