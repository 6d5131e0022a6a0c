"""A number of the formula that would explain a system: temperature, softcap or scale, estimated in one dimension."""

# N = tokens of a sample

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from loss_core.mismatch.causes import changed
from loss_core.mismatch.hypotheses import Hypothesis, System, each_product
from loss_core.mismatch.predict.head import Formula, Products, log_probs, stored_logits, with_number
from loss_core.mismatch.predict.interval import Floats
from loss_core.mismatch.predict.precision import FLOAT32, PRECISIONS, Precision

# Steps of the search: of a grid over two or three powers of ten, then of Gauss-Newton in the number's logarithm.
_GRID = 25
_STEPS = 3
# Large against the roundings of a 16-bit prediction, small against a change of the derivative.
_DIFFERENCE = 1e-2
_LARGEST_STEP = 0.3


def estimated(system: System, formula: Formula, rows: NDArray[np.intp]) -> Iterator[list[Hypothesis]]:
    """For each number and precision, the hypotheses to try, with the roundest value first.

    A number that leaves more than half of the recorded formula's residual is not tried: it is not the cause.
    """
    starts: dict[str, float] = {}
    for precision, raw in each_product(system, (FLOAT32,), rows):
        for name, grid in _grids(formula).items():
            residual = _residual(system, raw, precision, formula, name, rows)
            starts[name] = _refined(residual, min(grid, key=lambda number: _size(residual(number))))
    for precision, raw in each_product(system, PRECISIONS, rows):
        for name, start in starts.items():
            residual = _residual(system, raw, precision, formula, name, rows)
            value = _refined(residual, start)
            if _size(residual(value)) < _size(residual(None)) / 2:
                values = dict.fromkeys((float(f"{value:.2g}"), float(f"{value:.3g}"), value))
                yield [Hypothesis(precision, changed(formula, name, number)) for number in values]


def _grids(formula: Formula) -> dict[str, Floats]:
    grids = {"temperature": formula.temperature * np.geomspace(0.1, 10, _GRID)}
    grids["logit_softcapping"] = np.geomspace(1, 1000, _GRID)
    if formula.logit_softcapping:  # without a softcap a scale is a temperature
        grids["logit_scale"] = formula.logit_scale * np.geomspace(0.1, 10, _GRID)
    return grids


def _residual(
    system: System, raw: Products, precision: Precision, formula: Formula, name: str, rows: NDArray[np.intp]
) -> Callable[[float | None], Floats]:
    """Observed less predicted [N], as a function of the number; None for the recorded one."""
    logits = stored_logits(raw, precision, formula.bias, system.hidden_TH.shape[1])

    def of(value: float | None) -> Floats:
        used = formula if value is None else with_number(formula, name, float(value))
        labels, observed = system.targets(used, rows)
        with np.errstate(over="ignore", invalid="ignore"):
            residual_N = observed - log_probs(logits, labels, precision, used).value
        return np.asarray(residual_N[np.isfinite(residual_N)])

    return of


def _size(residual_N: Floats) -> float:
    # The median: a few tokens that differ for another reason must not decide.
    return float(np.median(np.abs(residual_N))) if residual_N.size else np.inf


def _refined(residual: Callable[[float | None], Floats], value: float) -> float:
    """The number that leaves the least sum of squares, from one nearby."""
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
