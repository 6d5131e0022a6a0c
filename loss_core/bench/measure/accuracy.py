"""The error beside each time: loss and gradients against float64.

A dense oracle of a full call would take minutes and hundreds of gigabytes, so it is asked twice for less:

- for a whole call of the same vocabulary on fewer tokens and a smaller hidden size: loss and every gradient;
- for some rows of the gradient of the full call, which a wrong block or an offset of 32 bits would spoil.

Of the rest of the full call two things are known without an oracle, which show gross mistakes: the inner products of
hidden states and of weight with their gradients are equal (both are the sum of z dz), and all implementations have
the same loss.
"""

# T = tokens, n = sampled tokens, V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.bench.measure.job import Job, Tiled, make_inputs, sampled_tokens
from loss_core.bench.measure.shards import Arrays, views
from loss_core.bench.report import WRONG, BenchRow
from loss_core.dtypes import round_to
from loss_core.losses import allowances, error_ratio, evaluate
from loss_core.losses.definition import Floats

# Rows of a weight at a time.
_BLOCK_V = 8192


class Judge:
    """The oracle's answers for one call, made once, and the comparison of each implementation with them.

    Attributes:
        job: the reduced call.
        expected: "loss" and gradients of it, by name.
        expected_rows: some rows of the first gradient of the full call; None for forward only.
    """

    def __init__(self, job: Job) -> None:
        self.job: Job = job.reduced()
        definition, config = job.definition, self.job.loss_config()
        tiles, labels = make_inputs(self.job)
        arrays: dict[str, Any] = {name: _rounded(tile.full(), job.dtype) for name, tile in tiles.items()}
        arrays["labels"] = labels
        found = evaluate(config, arrays)
        # Matrix engines take 16-bit operands, so an implementation may round the logits' gradient to them.
        narrow = job.dtype if definition.products and job.dtype in ("bfloat16", "float16") else None
        self._allowed = allowances(config, arrays, found, job.dtype, product_dtype=narrow)
        self._names = () if job.forward_only else job.trained
        self.expected: dict[str, Floats] = {"loss": found.loss, **{name: found.grads[name] for name in self._names}}
        self.expected_rows: Floats | None = None if job.forward_only else expected_rows(job)
        self._losses: dict[int, list[float]] = {}

    def judge(self, row: BenchRow, got: Sequence[Arrays], sample: Sequence[Arrays]) -> None:
        """Fill in a row's errors: the largest of what its ranks have.

        Args:
            got: of each process, loss and gradients of the reduced call.
            sample: of each process, `loss_core.bench.measure.processes.Prepared.sample` of the full call.
        """
        axes = self.job.definition.vocab_axes
        reduced, full = (views(parts, axes, self._names) for parts in (got, sample))
        row.error_shape = self.job.shape
        row.loss_error = max(relative(view["loss"], self.expected["loss"]) for view in reduced)
        row.error_ratio = max(
            _ratio(view[name], value, self._allowed[name], row.dtype)
            for view in reduced
            for name, value in self.expected.items()
        )
        if self.expected_rows is not None:
            errors = [relative(view[name], self.expected[name]) for view in reduced for name in self._names]
            errors += [relative(view["rows"], self.expected_rows) for view in full]
            errors += [_apart(view["inner"]) for view in full if "inner" in view]
            row.grad_error = max(error if np.isfinite(error) else float("inf") for error in errors)
        if full[0]["loss"].ndim == 0:
            self._losses[id(row)] = [float(view["loss"]) for view in full]

    def compare_losses(self, rows: Sequence[BenchRow]) -> None:
        """A loss of the full call that is far from that of the others is an error."""
        losses = {id(row): self._losses[id(row)] for row in rows if id(row) in self._losses and not row.wrong}
        if len(losses) < 3:
            return
        middle = median(of_ranks[0] for of_ranks in losses.values())
        for row in rows:
            of_ranks = losses.get(id(row), [middle])
            apart = float(np.max(np.abs(np.array(of_ranks) - middle))) / max(abs(middle), 1e-300)
            if not apart <= WRONG:
                row.loss_error = apart if np.isfinite(apart) else float("inf")


def expected_rows(job: Job) -> NDArray[np.float64]:
    """Gradient of the full call by its first trained argument, for the sampled tokens: [n, V] or [n, H]."""
    definition, config = job.definition, job.loss_config()
    tiles, labels = make_inputs(job)
    tokens = sampled_tokens(job)
    arrays: dict[str, Any] = {"labels": labels[tokens]}
    weights: list[Tiled] = []
    for argument in definition.drawn:
        tile = tiles[argument.name]
        # What a dtype of at most 32 bits holds, float32 holds, too; and float64 inputs are made of float32 numbers.
        rounded = Tiled(_rounded(tile.block, job.dtype).astype(tile.block.dtype), tile.shape)
        if argument.dims[0] == "T":
            arrays[argument.name] = rounded.rows(tokens).astype(np.float64 if argument.kind == "float" else np.int64)
        elif definition.sampled_rows is None:
            arrays[argument.name] = rounded.full()
        else:
            weights.append(rounded)
    # A mean is over the tokens of the whole call, not over those at hand.
    valid = np.count_nonzero(labels[tokens] != getattr(config, "ignore_index", -100))
    results = definition.results(config)
    share = np.full(() if results == 1 else (results,), valid / job.num_kept)
    upstream = share if definition.reduction(config) == "mean" else None
    first = job.trained[0]
    if definition.sampled_rows is None:
        return evaluate(config, arrays, upstream).grads[first]
    return definition.sampled_rows(config, arrays[first], _blocks(weights[0]), arrays, upstream)


def _rounded(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Floats as the dtype holds them; integers as they are."""
    return round_to(values, dtype) if values.dtype.kind == "f" else values


def _blocks(weight: Tiled) -> Iterator[NDArray[np.float32]]:
    for start in range(0, weight.shape[0], _BLOCK_V):
        yield weight.rows(np.arange(start, min(start + _BLOCK_V, weight.shape[0])))


def _apart(inner: NDArray[np.float64]) -> float:
    """How far sums that should be equal are apart. Rounding moves them, too: only a gross difference is an error."""
    apart = float(np.max(inner) - np.min(inner)) / max(float(np.max(np.abs(inner))), 1e-300)
    return 0.0 if apart <= WRONG else apart


def _ratio(got: NDArray[Any], expected: NDArray[Any], allowed: NDArray[Any], dtype: str) -> float:
    if got.shape != expected.shape:
        return float("inf")
    return float(np.max(error_ratio(got, expected, allowed, dtype), initial=0.0))


def relative(got: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """||got - expected|| / ||expected||; inf where something is not a number, or of another shape."""
    if got.shape != expected.shape:
        return float("inf")
    size = float(np.linalg.norm(expected))
    error = float(np.linalg.norm(got - expected))
    return (error / size if size else error) if np.isfinite(error) else float("inf")
