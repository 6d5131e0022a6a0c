"""Estimates of one parameter of the formula (temperature, softcap or scale) from a system's log-probabilities."""

# N = tokens of a sample

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from loss_core.mismatch.causes import with_value
from loss_core.mismatch.hypotheses import Hypothesis, System, with_products
from loss_core.mismatch.predict.head import Formula, Products, log_probs, stored_logits, with_parameter
from loss_core.mismatch.predict.interval import Floats
from loss_core.mismatch.predict.precision import FLOAT32, PRECISIONS, Precision

# A grid of points over two or three powers of ten, then Gauss-Newton steps in the parameter's logarithm.
_GRID = 25
_STEPS = 3
# Finite difference: large relative to the roundings of a 16-bit prediction, small enough for a constant derivative.
_DIFFERENCE = 1e-2
_LARGEST_STEP = 0.3


def estimated(system: System, formula: Formula, rows: NDArray[np.intp]) -> Iterator[list[Hypothesis]]:
    """For each parameter and precision, the hypotheses to try: the estimate rounded to 2 and 3 digits, then exact.

    A parameter is skipped if its estimate does not halve the residual of the recorded formula.
    """
    starts: dict[str, float] = {}
    for precision, raw in with_products(system, (FLOAT32,), rows):
        for name, grid in _grids(formula).items():
            residual = _residual(system, raw, precision, formula, name, rows)
            starts[name] = _refined(residual, min(grid, key=lambda value: _median_size(residual(value))))
    for precision, raw in with_products(system, PRECISIONS, rows):
        for name, start in starts.items():
            residual = _residual(system, raw, precision, formula, name, rows)
            estimate = _refined(residual, start)
            if _median_size(residual(estimate)) < _median_size(residual(None)) / 2:
                values = dict.fromkeys((float(f"{estimate:.2g}"), float(f"{estimate:.3g}"), estimate))
                yield [Hypothesis(precision, with_value(formula, name, value)) for value in values]


def _grids(formula: Formula) -> dict[str, Floats]:
    grids = {"temperature": formula.temperature * np.geomspace(0.1, 10, _GRID)}
    grids["logit_softcapping"] = np.geomspace(1, 1000, _GRID)
    if formula.logit_softcapping:  # without a softcap, a scale is equivalent to a temperature
        grids["logit_scale"] = formula.logit_scale * np.geomspace(0.1, 10, _GRID)
    return grids


def _residual(
    system: System, raw: Products, precision: Precision, formula: Formula, name: str, rows: NDArray[np.intp]
) -> Callable[[float | None], Floats]:
    """Observed - predicted [N] as a function of the parameter's value; None selects the recorded value."""
    logits = stored_logits(raw, precision, formula.bias, system.hidden_TH.shape[1])

    def of(value: float | None) -> Floats:
        used = formula if value is None else with_parameter(formula, name, float(value))
        labels, observed = system.targets(used, rows)
        with np.errstate(over="ignore", invalid="ignore"):
            residual_N = observed - log_probs(logits, labels, precision, used).value
        return np.asarray(residual_N[np.isfinite(residual_N)])

    return of


def _median_size(residual_N: Floats) -> float:
    # The median is robust against a few tokens that differ for another reason.
    return float(np.median(np.abs(residual_N))) if residual_N.size else np.inf


def _refined(residual: Callable[[float | None], Floats], value: float) -> float:
    """The value that minimizes the squared residual, by Gauss-Newton steps from `value`."""
    for _ in range(_STEPS):
        here, there = residual(value), residual(value * np.exp(_DIFFERENCE))
        if here.shape != there.shape or not here.size:
            return value
        slope_N = (here - there) / _DIFFERENCE
        square = float(np.sum(slope_N**2))
        if square == 0:
            return value
        step = float(np.sum(here * slope_N)) / square
        value *= float(np.exp(np.clip(step, -_LARGEST_STEP, _LARGEST_STEP)))
    return value
