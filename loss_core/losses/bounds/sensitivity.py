"""Sensitivity of a loss to perturbed inputs: an estimated error bound, and the condition number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.dtypes import FloatFormat, compute_format, float_format
from loss_core.losses.bounds.rounding import EXP_ULPS, result_dtype, sum_growth
from loss_core.losses.definition import Arrays, Floats, LossDef, OracleResult, Upstream
from loss_core.losses.reduction import TokenResult

# Perturbations tried: an element changes by less than a tenth of its spread in all 8 with a chance of about 1e-9.
_PROBES = 8

# Roundings of a loss other than its sums: exp, log, the scalings around them, each within a few ulp.
_OTHER_ROUNDINGS = 16.0


class Sensitivity:
    """Rounding errors of the results of a call, estimated by perturbing its inputs.

    A rounding error anywhere in the computation acts like a perturbation of an input by u times its size (or by u,
    where exp turns absolute into relative errors). So the inputs are perturbed by that much, with random signs, in
    float64, and the largest change observed is scaled by the growth of rounding errors over the longest axis.

    Args:
        run: arrays -> results by name, in float64.
        arrays: the inputs; floats: names of those to perturb.
        u: unit roundoff by which they are perturbed.
        seed: of the random signs.
    """

    def __init__(
        self,
        run: Callable[[Mapping[str, NDArray[Any]]], Mapping[str, Floats]],
        arrays: Mapping[str, NDArray[Any]],
        floats: Sequence[str],
        u: float,
        seed: int = 0,
    ) -> None:
        self.reference: Mapping[str, Floats] = run(arrays)
        self._u = u
        self._growth = sum_growth(max((n for value in arrays.values() for n in value.shape), default=1))
        self._change = {name: np.zeros_like(value) for name, value in self.reference.items()}
        rng = np.random.default_rng(seed)
        for _ in range(_PROBES):
            perturbed = dict(arrays)
            for name in floats:
                signs = rng.choice([-1.0, 1.0], arrays[name].shape)
                perturbed[name] = arrays[name] + signs * u * np.maximum(np.abs(arrays[name]), 1.0)
            for name, value in run(perturbed).items():
                with np.errstate(invalid="ignore"):
                    self._change[name] = np.fmax(self._change[name], np.abs(value - self.reference[name]))

    def allowed(self, unit: float, stored: Mapping[str, FloatFormat]) -> dict[str, Floats]:
        """Largest error of each result, elementwise.

        Args:
            unit: roundoff of the arithmetic inside.
            stored: format in which each result is stored.
        """
        growth = self._growth + _OTHER_ROUNDINGS
        return {
            name: growth * (self._change[name] * (unit / self._u) + unit * np.abs(value))
            + stored[name].u * np.abs(value)
            + stored[name].near_zero
            for name, value in self.reference.items()
        }


def estimated_errors(
    definition: LossDef, config: Any, arrays: Arrays, expected: OracleResult, dtype: str, upstream: Upstream
) -> dict[str, Floats]:
    """As `LossDef.error_bound`, estimated from the oracle, for a loss without a derived bound."""

    def run(values: Mapping[str, NDArray[Any]]) -> dict[str, Floats]:
        found = definition.oracle(config, values, upstream)
        return {"loss": found.loss, **found.grads}

    floats = [a.name for a in definition.arguments if a.kind == "float" and a.name in arrays]
    u = compute_format(dtype).u
    sensitivity = Sensitivity(run, arrays, floats, u)
    stored = dict.fromkeys(sensitivity.reference, float_format(dtype))
    allowed = sensitivity.allowed(u, stored | {"loss": float_format(result_dtype(config, dtype))})
    if isinstance(expected, TokenResult):
        # Perturbations do not show cancellation: p - 1, with p nearly 1, is off by the rounding error of p.
        rows = [a.name for a in definition.arguments if a.name in expected.grads and a.dims[:1] == ("T",)]
        for name in rows:
            of_token = EXP_ULPS * u * np.abs(expected.coef_T).reshape(np.shape(arrays["labels"]))
            grad = allowed[name]
            allowed[name] = grad + of_token.reshape(of_token.shape + (1,) * (grad.ndim - of_token.ndim))
    return allowed


def condition_number(arrays: Arrays, expected: OracleResult, upstream: Upstream = None) -> float:
    """Relative componentwise condition of the loss: sum_i |x_i dL/dx_i| / |L|, over all elements x of all inputs.

    If inputs are multiplied by 1 + d_i, |d_i| <= d, the loss changes by up to this number times d |L|, to first order.
    For several results, or tokens, |L| is the sum of |upstream * result|.

    Args:
        arrays, upstream: as for `evaluate`; expected: its result.
    Returns:
        The condition number; inf if the loss is 0 and its gradient is not, NaN if both are 0.
    Source: Higham, Accuracy and Stability of Numerical Algorithms, section 1.6.
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        # 0 * inf: logits of -inf, and inf or NaN in ignored rows, have a gradient of 0.
        changes = [np.abs(np.where(grad == 0, 0.0, arrays[name] * grad)) for name, grad in expected.grads.items()]
        return float(np.divide(sum(float(np.sum(of_input)) for of_input in changes), expected.size(upstream)))
