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

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core import oracle
from loss_core.bench_job import GRADS, Job, Tiled, kind_of, make_inputs, sampled_tokens
from loss_core.bench_report import WRONG, BenchRow
from loss_core.bench_shards import Arrays, views
from loss_core.config import FusedLinearCEConfig, KDLossConfig, LossConfig, MaskedCrossEntropyConfig
from loss_core.dtypes import round_to
from loss_core.tolerance import allowances, share_of_allowance

# Rows of the weight at a time.
_BLOCK_V = 8192


class Judge:
    """The oracle's answers for one call, made once, and the comparison of each implementation with them.

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
        self._rows = None if job.forward_only else expected_rows(job)
        self._losses: dict[int, list[float]] = {}

    def judge(self, row: BenchRow, got: Sequence[Arrays], sample: Sequence[Arrays]) -> None:
        """Fill in a row's errors: the largest of what its ranks have.

        Args:
            got: of each process, loss and gradients of the reduced call.
            sample: the same, of the full call: see `loss_core_bench.runner.Runner.prepare`.
        """
        expected = {"loss": self._expected.loss, **{name: self._expected.grads[name] for name in self._names}}
        reduced, full = (views(parts, self._names[0] if self._names else "") for parts in (got, sample))
        row.error_shape = self.job.shape
        row.loss_error = max(relative(view["loss"], expected["loss"]) for view in reduced)
        row.share = max(
            _share(view[name], value, self._allowed[name], row.dtype)
            for view in reduced
            for name, value in expected.items()
        )
        if self._rows is not None:
            errors = [relative(view[name], expected[name]) for view in reduced for name in self._names]
            errors += [relative(view["rows"], self._rows) for view in full]
            errors += [_apart(*view["inner"]) for view in full if "inner" in view]
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
    """Gradient of the full call by its first floating argument, for the sampled tokens: [n, V] or [n, H]."""
    config = job.loss_config()
    tiles, labels = make_inputs(job)
    tokens = sampled_tokens(job)
    # What a dtype of at most 32 bits holds, float32 holds, too; and float64 inputs are made of float32 numbers.
    blocks = {
        name: Tiled(round_to(tile.block, job.dtype).astype(np.float32), tile.shape) for name, tile in tiles.items()
    }
    arrays: dict[str, Any] = {"labels": labels[tokens]}
    if isinstance(config, FusedLinearCEConfig):
        return _fused_rows(config, job, blocks, arrays["labels"], tokens)
    arrays |= {name: tile.rows(tokens).astype(np.float64) for name, tile in blocks.items()}
    config, extra = _over_all(config, job)
    return oracle.evaluate(config, arrays | extra).grads[GRADS[kind_of(config)][0]]


def _over_all(config: Any, job: Job) -> tuple[LossConfig, dict[str, Any]]:
    """A config and an argument that divide by the tokens of the whole call, not by those at hand."""
    if isinstance(config, KDLossConfig):
        return config, {"num_batch_labels": np.asarray(job.num_kept)}
    if config.reduction == "mean":
        return replace(config, reduction="sum"), {"num_label_tokens": np.asarray(job.num_kept)}
    return config, {}


def _fused_rows(
    config: FusedLinearCEConfig,
    job: Job,
    tiles: Mapping[str, Tiled],
    labels_n: NDArray[np.int64],
    tokens: NDArray[np.int64],
) -> NDArray[np.float64]:
    """dh = dz W for the sampled tokens, over blocks of the weight's rows."""
    hidden_nH = tiles["hidden_states"].rows(tokens).astype(np.float64)
    weight, vocab = tiles["lm_weight"], job.shape[1]
    blocks = [np.arange(start, min(start + _BLOCK_V, vocab)) for start in range(0, vocab, _BLOCK_V)]
    raw_nV = np.concatenate([hidden_nH @ weight.rows(block).T.astype(np.float64) for block in blocks], axis=1)
    logits_nV, slope_nV = oracle.softcap(raw_nV, config.logit_softcapping)
    plain = MaskedCrossEntropyConfig(ignore_index=config.ignore_index, reduction=config.reduction)
    over_all, extra = _over_all(plain, job)
    dz_nV = oracle.evaluate(over_all, {"logits": logits_nV, "labels": labels_n, **extra}).grads["logits"] * slope_nV
    dh_nH = np.zeros_like(hidden_nH)
    for block in blocks:
        dh_nH += dz_nV[:, block] @ weight.rows(block).astype(np.float64)
    return dh_nH


def _apart(first: float, second: float) -> float:
    """How far two sums that should be equal are apart. Rounding moves them, too: only a gross difference counts."""
    apart = abs(first - second) / max(abs(first), abs(second), 1e-300)
    return 0.0 if apart <= WRONG else apart


def _share(got: NDArray[Any], expected: NDArray[Any], allowed: NDArray[Any], dtype: str) -> float:
    if got.shape != expected.shape:
        return float("inf")
    return float(np.max(share_of_allowance(got, expected, allowed, dtype), initial=0.0))


def relative(got: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """||got - expected|| / ||expected||; inf where something is not a number, or of another shape."""
    if got.shape != expected.shape:
        return float("inf")
    size = float(np.linalg.norm(expected))
    error = float(np.linalg.norm(got - expected))
    return (error / size if size else error) if np.isfinite(error) else float("inf")
