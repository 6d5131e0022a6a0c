"""Expected results of a call: loss and gradients by definition in float64, and the error that rounding explains.

The definition of each loss is in its own file in this folder.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.losses.bounds.sensitivity import estimated_errors
from loss_core.losses.definition import Arrays, Floats, OracleResult, need_definition


def evaluate(config: Any, arrays: Arrays, upstream: NDArray[Any] | None = None) -> OracleResult:
    """Loss and all gradients of one call, in float64.

    Args:
        config: of a loss that has a definition.
        arrays: keyword arguments of the loss's forward; their values are treated as exact.
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
        config: as for `evaluate`.
        arrays: as for `evaluate`.
        upstream: as for `evaluate`.
        expected: the result of `evaluate`.
        dtype: dtype of the floating inputs, and so of the gradients.
        product_dtype: dtype to which a fused loss rounds the logits' gradient for its matrix products (tensor cores
            take 16-bit operands); None if it is the compute dtype.
    """
    definition = need_definition(config)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        if definition.error_bound is not None:
            return definition.error_bound(config, arrays, expected, dtype, upstream, product_dtype)
        return estimated_errors(definition, config, arrays, expected, dtype, upstream)
