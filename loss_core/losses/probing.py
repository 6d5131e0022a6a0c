"""How far rounding may move a loss that has no derived error bound: read off the loss itself.

A rounding anywhere in the chain acts like a disturbance of an input by u times its size (or by u, where exp turns
absolute into relative errors). So the inputs are disturbed by that much, with random signs, in float64, and the
largest change seen is scaled by how roundings add up over the longest axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.dtypes import FloatFormat
from loss_core.losses.definition import Floats
from loss_core.losses.rounding import sum_growth

# Disturbances tried: the chance that an element moves less than a tenth of its spread in each of 8 is about 1e-9.
_PROBES = 8

# Roundings of a loss besides its sums: exp, log, the scalings around them, each within a few ulp.
_OTHER_ROUNDINGS = 16.0


class Sensitivity:
    """What disturbing its inputs does to the results of a call.

    Args:
        run: arrays -> results by name, in float64.
        arrays: the inputs; floats: names of those to disturb.
        u: the unit roundoff by which they are disturbed.
        seed: of the disturbances.
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
        self._moved = {name: np.zeros_like(value) for name, value in self.reference.items()}
        rng = np.random.default_rng(seed)
        for _ in range(_PROBES):
            disturbed = dict(arrays)
            for name in floats:
                signs = rng.choice([-1.0, 1.0], arrays[name].shape)
                disturbed[name] = arrays[name] + signs * u * np.maximum(np.abs(arrays[name]), 1.0)
            for name, value in run(disturbed).items():
                with np.errstate(invalid="ignore"):
                    self._moved[name] = np.fmax(self._moved[name], np.abs(value - self.reference[name]))

    def allowed(self, unit: float, stored: Mapping[str, FloatFormat]) -> dict[str, Floats]:
        """Largest error of each result, elementwise.

        Args:
            unit: roundoff of the arithmetic inside.
            stored: format in which each result is stored.
        """
        growth = self._growth + _OTHER_ROUNDINGS
        return {
            name: growth * (self._moved[name] * (unit / self._u) + unit * np.abs(value))
            + stored[name].u * np.abs(value)
            + stored[name].near_zero
            for name, value in self.reference.items()
        }
