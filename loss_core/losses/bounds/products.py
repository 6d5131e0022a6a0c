"""Errors of the matrix products of a fused linear loss: of its logits, and of the gradients by their operands."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, H = hidden

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from loss_core.dtypes import compute_format, float_format
from loss_core.losses.bounds.rounding import finite, stored, sum_growth, zero_where_ignored
from loss_core.losses.definition import Arrays, Floats, OracleResult
from loss_core.losses.reduction import masked_rows


def head_of(arrays: Arrays, keep_T: NDArray[np.bool_], of: str = "") -> tuple[Floats, Floats]:
    """Hidden states [T, H] with zeros in ignored rows, and weight [V, H].

    Args:
        of: prefix of both argument names.
    """
    return masked_rows(arrays[f"{of}hidden_states"], keep_T), np.asarray(arrays[f"{of}lm_weight"], np.float64)


def raw_logits(arrays: Arrays, keep_T: NDArray[np.bool_], u: float, of: str = "") -> tuple[Floats, Floats]:
    """h @ W.T + b, with zeros in ignored rows of h, and the error of these sums of H + 1 terms; both [T, V]."""
    h_TH, w_VH = head_of(arrays, keep_T, of)
    bias_V = np.asarray(arrays.get("lm_bias", 0.0), np.float64)
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
    """Errors of the gradients of hidden states, weight and bias, from the error of the gradient by raw logits."""
    fmt, inner = float_format(dtype), compute_format(dtype)
    u, (h_TH, w_VH) = inner.u, head_of(arrays, keep_T, of)
    of_hidden, of_weight = f"{of}hidden_states", f"{of}lm_weight"
    if product_dtype is not None:
        operand = float_format(product_dtype)
        # Rounding of the operand, and its flush to 0 near 0.
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
