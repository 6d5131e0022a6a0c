"""How much a loss magnifies what its inputs are off by."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.losses.definition import Arrays, OracleResult


def condition_number(arrays: Arrays, expected: OracleResult, upstream: NDArray[Any] | None = None) -> float:
    """Relative componentwise condition of the loss: sum_i |x_i dL/dx_i| / |L|, over all elements x of all inputs.

    Inputs that are off by the factors 1 + d_i, |d_i| <= d, move the loss by up to this number times d, to first order:
    an ill-conditioned loss is off by more than its arithmetic is. Of several results, or of tokens, |L| is the sum of
    their sizes, each times its upstream gradient.

    Args:
        arrays, upstream: as for `evaluate`; expected: its result.
    Returns:
        The number; inf where the loss is 0 and its gradient is not, NaN where both are.
    Source: Higham, Accuracy and Stability of Numerical Algorithms, section 1.6.
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        # A logit of -inf has a gradient of 0, and what an ignored row holds moves nothing.
        moved = [np.abs(np.where(grad == 0, 0.0, arrays[name] * grad)) for name, grad in expected.grads.items()]
        return float(np.divide(sum(float(np.sum(of_input)) for of_input in moved), expected.size(upstream)))
