"""The error beside each time: loss and gradients of a smaller call of the same loss, against float64.

The vocabulary stays as it is, tokens and hidden size are reduced until the oracle takes a second or two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core import oracle
from loss_core.bench_job import GRADS, Job, kind_of, make_inputs
from loss_core.bench_report import BenchRow
from loss_core.dtypes import round_to
from loss_core.tolerance import allowances, share_of_allowance


class Judge:
    """The oracle's answer for one call, made once, and the comparison of each implementation with it.

    Args:
        job: the measured call.
        folder: where the processes leave their results.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        self.job = job.reduced()
        self.file = str(folder / "results.npz")
        config = self.job.loss_config()
        tiles, labels = make_inputs(self.job)
        arrays: dict[str, Any] = {name: round_to(tile.full(), job.dtype) for name, tile in tiles.items()}
        arrays["labels"] = labels
        self._expected = oracle.evaluate(config, arrays)
        # Matrix engines take 16-bit operands, so an implementation may round the logits' gradient to them.
        narrow = job.dtype if kind_of(config) == "fused" and job.dtype in ("bfloat16", "float16") else None
        self._allowed = allowances(config, arrays, self._expected, job.dtype, product_dtype=narrow)
        self._names = () if job.forward_only else GRADS[kind_of(config)]

    def judge(self, row: BenchRow) -> None:
        """Fill in a row's errors from the results in `file`."""
        with np.load(self.file) as results:
            got = {name: np.asarray(results[name]) for name in ("loss", *self._names)}
        expected = {"loss": self._expected.loss, **{name: self._expected.grads[name] for name in self._names}}
        row.error_shape = self.job.shape
        row.loss_error = relative(got["loss"], expected["loss"])
        row.grad_error = max((relative(got[name], expected[name]) for name in self._names), default=None)
        row.share = max(
            float("inf")
            if got[name].shape != expected[name].shape
            else float(np.max(share_of_allowance(got[name], expected[name], self._allowed[name], row.dtype)))
            for name in got
        )


def relative(got: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """||got - expected|| / ||expected||; inf where something is not a number, or of another shape."""
    if got.shape != expected.shape:
        return float("inf")
    size = float(np.linalg.norm(expected))
    error = float(np.linalg.norm(got - expected))
    return (error / size if size else error) if np.isfinite(error) else float("inf")
