"""Accuracy of each implementation: loss and gradients against float64.

A dense oracle at the full shape would take minutes and hundreds of gigabytes. Two smaller comparisons stand in for it:

- a reduced call, with the same vocabulary, fewer tokens and a smaller hidden size: the loss and every gradient;
- the gradient rows of a few tokens at the full shape, where a wrong block or an overflow of a 32-bit offset shows.

Two further checks of the full call need no oracle and find gross errors: the inner products of hidden states and of
weight with their gradients are equal (both are the sum of z dz), and all implementations return the same loss.
"""

# T = tokens, n = sampled tokens, V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.bench.measure.job import Job, Tiled, make_inputs, sampled_tokens
from loss_core.bench.measure.shards import Arrays, merge_ranks
from loss_core.bench.report import WRONG, BenchRow
from loss_core.dtypes import round_to
from loss_core.losses import allowances, error_ratio, evaluate
from loss_core.losses.definition import Floats

# Weight rows per block.
_BLOCK_V = 8192


class AccuracyCheck:
    """Oracle results of one call, computed once, and the comparison of each implementation with them.

    Attributes:
        job: the reduced call.
        expected: its "loss" and gradients, by name.
        expected_rows: sampled rows of the first gradient of the full call; None for forward only.
    """

    def __init__(self, job: Job) -> None:
        self.job: Job = job.reduced()
        definition, config = job.definition, self.job.loss_config()
        tiles, labels = make_inputs(self.job)
        arrays: dict[str, Any] = {name: _round_floats(tile.full(), job.dtype) for name, tile in tiles.items()}
        arrays["labels"] = labels
        exact = evaluate(config, arrays)
        # Matrix engines take 16-bit operands, so an implementation may round the logits' gradient to them.
        narrow = job.dtype if definition.products and job.dtype in ("bfloat16", "float16") else None
        self._allowed = allowances(config, arrays, exact, job.dtype, product_dtype=narrow)
        self._names = () if job.forward_only else job.trained
        self.expected: dict[str, Floats] = {"loss": exact.loss, **{name: exact.grads[name] for name in self._names}}
        self.expected_rows: Floats | None = None if job.forward_only else expected_rows(job)
        self._losses: dict[int, list[float]] = {}

    def fill_errors(self, row: BenchRow, got: Sequence[Arrays], sample: Sequence[Arrays]) -> None:
        """Set the error fields of a row to the largest error over its ranks.

        Args:
            got: loss and gradients of the reduced call, one entry per process.
            sample: `loss_core.bench.measure.processes.Prepared.sample` of the full call, one entry per process.
        """
        axes = self.job.definition.vocab_axes
        reduced, full = (merge_ranks(parts, axes, self._names) for parts in (got, sample))
        row.error_shape = self.job.shape
        row.loss_error = max(relative_error(view["loss"], self.expected["loss"]) for view in reduced)
        row.error_ratio = max(
            _ratio(view[name], value, self._allowed[name], row.dtype)
            for view in reduced
            for name, value in self.expected.items()
        )
        if self.expected_rows is not None:
            errors = [relative_error(view[name], self.expected[name]) for view in reduced for name in self._names]
            errors += [relative_error(view["rows"], self.expected_rows) for view in full]
            errors += [_inner_mismatch(view["inner"]) for view in full if "inner" in view]
            row.grad_error = max(error if np.isfinite(error) else float("inf") for error in errors)
        if full[0]["loss"].ndim == 0:
            self._losses[id(row)] = [float(view["loss"]) for view in full]

    def compare_losses(self, rows: Sequence[BenchRow]) -> None:
        """Set `loss_error` of rows whose loss of the full call is far from the median over all implementations."""
        losses = {id(row): self._losses[id(row)] for row in rows if id(row) in self._losses and not row.wrong}
        if len(losses) < 3:
            return
        middle = median(per_rank[0] for per_rank in losses.values())
        for row in rows:
            per_rank = losses.get(id(row), [middle])
            error = float(np.max(np.abs(np.array(per_rank) - middle))) / max(abs(middle), 1e-300)
            if not error <= WRONG:
                row.loss_error = error if np.isfinite(error) else float("inf")


def expected_rows(job: Job) -> NDArray[np.float64]:
    """Sampled rows of the full call's gradient with respect to its first trained argument: [n, V] or [n, H]."""
    definition, config = job.definition, job.loss_config()
    tiles, labels = make_inputs(job)
    tokens = sampled_tokens(job)
    arrays: dict[str, Any] = {"labels": labels[tokens]}
    weights: list[Tiled] = []
    for argument in definition.drawn:
        tile = tiles[argument.name]
        # float32 holds every value of a narrower dtype, and float64 inputs are drawn in float32.
        rounded = Tiled(_round_floats(tile.block, job.dtype).astype(tile.block.dtype), tile.shape)
        if argument.dims[0] == "T":
            arrays[argument.name] = rounded.rows(tokens).astype(np.float64 if argument.kind == "float" else np.int64)
        elif definition.sampled_rows is None:
            arrays[argument.name] = rounded.full()
        else:
            weights.append(rounded)
    # A mean divides by the valid tokens of the full call, not by those of the sample.
    valid = np.count_nonzero(labels[tokens] != getattr(config, "ignore_index", -100))
    results = definition.results(config)
    share = np.full(() if results == 1 else (results,), valid / job.num_valid_tokens)
    upstream = share if definition.reduction(config) == "mean" else None
    first = job.trained[0]
    if definition.sampled_rows is None:
        return evaluate(config, arrays, upstream).grads[first]
    return definition.sampled_rows(config, arrays[first], _blocks(weights[0]), arrays, upstream)


def _round_floats(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Floats rounded to the dtype; integers unchanged."""
    return round_to(values, dtype) if values.dtype.kind == "f" else values


def _blocks(weight: Tiled) -> Iterator[NDArray[np.float32]]:
    for start in range(0, weight.shape[0], _BLOCK_V):
        yield weight.rows(np.arange(start, min(start + _BLOCK_V, weight.shape[0])))


def _inner_mismatch(inner: NDArray[np.float64]) -> float:
    """Relative difference of sums that should be equal; 0 up to WRONG, since rounding changes them as well."""
    difference = float(np.max(inner) - np.min(inner)) / max(float(np.max(np.abs(inner))), 1e-300)
    return 0.0 if difference <= WRONG else difference


def _ratio(got: NDArray[Any], expected: NDArray[Any], allowed: NDArray[Any], dtype: str) -> float:
    if got.shape != expected.shape:
        return float("inf")
    return float(np.max(error_ratio(got, expected, allowed, dtype), initial=0.0))


def relative_error(got: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """||got - expected|| / ||expected||; inf if that is not finite or the shapes differ."""
    if got.shape != expected.shape:
        return float("inf")
    size = float(np.linalg.norm(expected))
    error = float(np.linalg.norm(got - expected))
    return (error / size if size else error) if np.isfinite(error) else float("inf")
