"""What a call must give: loss and gradients by definition in float64, and how far rounding may move them.

The definitions themselves stand in the files of the losses beside this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.dtypes import compute_format, float_format
from loss_core.losses.definition import Arrays, Floats, LossDef, OracleResult, need_definition
from loss_core.losses.probing import Sensitivity
from loss_core.losses.reduction import TokenResult
from loss_core.losses.rounding import EXP_ULPS, result_dtype


def evaluate(config: Any, arrays: Arrays, upstream: NDArray[Any] | None = None) -> OracleResult:
    """Loss and every gradient of one call.

    Args:
        config: of a loss that has a definition.
        arrays: keyword arguments of the loss's forward; the values are taken as exact.
        upstream: derivative of the caller's objective by the result; None for ones.
    Raises:
        TypeError: there is no definition for this config.
    """
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        return need_definition(config).oracle(config, arrays, upstream)


def allowances(
    config: Any,
    arrays: Arrays,
    expected: OracleResult,
    dtype: str,
    *,
    upstream: NDArray[Any] | None = None,
    product_dtype: str | None = None,
) -> dict[str, Floats]:
    """Largest error that rounding explains, elementwise, for "loss" and each gradient.

    Args:
        config: as it was given to the oracle.
        arrays: as they were given to the oracle.
        upstream: as it was given to the oracle.
        expected: the oracle's result.
        dtype: dtype of the floating inputs, and so of the gradients.
        product_dtype: dtype in which the fused loss hands the logits' gradient to its matrix products
            (matrix engines take 16-bit operands); None when that is the dtype of the arithmetic.
    """
    definition = need_definition(config)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        if definition.error_bound is not None:
            return definition.error_bound(config, arrays, expected, dtype, upstream, product_dtype)
        return _estimated(definition, config, arrays, expected, dtype, upstream)


def _estimated(
    definition: LossDef, config: Any, arrays: Arrays, expected: OracleResult, dtype: str, upstream: NDArray[Any] | None
) -> dict[str, Floats]:
    """A bound read off the oracle, for a loss that has no derived one."""

    def run(values: Mapping[str, NDArray[Any]]) -> dict[str, Floats]:
        found = definition.oracle(config, values, upstream)
        return {"loss": found.loss, **found.grads}

    floats = [a.name for a in definition.arguments if a.kind == "float" and a.name in arrays]
    u = compute_format(dtype).u
    sensitivity = Sensitivity(run, arrays, floats, u)
    stored = dict.fromkeys(sensitivity.reference, float_format(dtype))
    allowed = sensitivity.allowed(u, stored | {"loss": float_format(result_dtype(config, dtype))})
    if isinstance(expected, TokenResult):
        # A disturbance does not show what cancels: p - 1, where p is nearly 1, is off by the rounding of p.
        rows = [a.name for a in definition.arguments if a.name in expected.grads and a.dims[:1] == ("T",)]
        for name in rows:
            of_token = EXP_ULPS * u * np.abs(expected.coef_T).reshape(np.shape(arrays["labels"]))
            grad = allowed[name]
            allowed[name] = grad + of_token.reshape(of_token.shape + (1,) * (grad.ndim - of_token.ndim))
    return allowed


def error_ratio(got: Floats, expected: Floats, allowed: Floats, dtype: str) -> Floats:
    """|got - expected| / allowed, elementwise: above 1 is a failure, inf where one is not a number."""
    top = float_format(dtype).max
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.abs(got - expected)
        ratio = np.where(error == 0, 0.0, error / allowed)
        same = (np.isnan(got) & np.isnan(expected)) | (got == expected)
        # A result beyond the format's range may be stored as infinity.
        overflow = np.isinf(got) & (np.sign(got) == np.sign(expected)) & (np.abs(expected) + allowed >= top)
        return np.where(same | overflow, 0.0, np.where(np.isnan(ratio), np.inf, ratio))
