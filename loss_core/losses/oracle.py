"""What a call must give: loss and gradients by definition in float64, and how far rounding may move them.

The definitions themselves stand in the files of the losses beside this one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.losses.bounds.sensitivity import estimated_errors
from loss_core.losses.definition import Arrays, Floats, OracleResult, need_definition


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
        return estimated_errors(definition, config, arrays, expected, dtype, upstream)
