"""The distribution of the differences between two systems' log-probabilities.

The difference is trainer - engine, and its exponential the ratio of probabilities that importance sampling uses.
"""

# T = tokens

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loss_core.mismatch.dump import SYSTEMS, Dump

QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)
BANDS = (1e-3, 1e-2, 5e-2)
# Edges of the histogram, as powers of ten of |difference|.
HISTOGRAM_EDGES = np.linspace(-8, 2, 41)
# How many tokens with the largest differences a report lists.
NUM_WORST = 8


class Token(NamedTuple):
    """One token of a report: index in labels, label, and the log-probability computed by each system."""

    position: tuple[int, ...]
    label: int
    trainer: float
    engine: float


class Statistics(NamedTuple):
    """The distribution of differences.

    Attributes:
        tokens: count of compared tokens: valid, and finite in both systems.
        ignored: count of labels that are ignore_index.
        not_finite: count of valid tokens whose log-probability is NaN or infinite, by system.
        mean: of the difference; NaN without tokens, as are the following.
        quantiles: of |difference|, by share of tokens.
        bands: share of tokens whose ratio is within the band of 1, by band.
        k1, k3: estimates of KL(engine || trainer) in nats: the means of -log r and of r - 1 - log r, with r the ratio
            of each token; unbiased where the engine sampled the labels. Source: Schulman 2020,
            http://joschu.net/blog/kl-approx.html.
        histogram: counts of |difference| below the first of HISTOGRAM_EDGES (with 0), between two, and above the last.
        worst: the tokens with the largest |difference|, in descending order.
    """

    tokens: int
    ignored: int
    not_finite: dict[str, int]
    mean: float
    quantiles: dict[float, float]
    bands: dict[float, float]
    k1: float
    k3: float
    histogram: list[int]
    worst: list[Token]


def compared(dump: Dump) -> NDArray[np.bool_]:
    """Which tokens [T] are valid, and finite in both systems."""
    finite = [np.isfinite(dump.logprobs(system)) for system in SYSTEMS]
    return _valid(dump) & finite[0] & finite[1]


def _valid(dump: Dump) -> NDArray[np.bool_]:
    return np.asarray(dump.labels.reshape(-1) != dump.ignore_index)


def statistics_of(dump: Dump) -> Statistics:
    """The distribution of trainer - engine over all tokens of a dump."""
    valid_T, keep_T = _valid(dump), compared(dump)
    difference_T = dump.logprobs("trainer")[keep_T] - dump.logprobs("engine")[keep_T]
    size_T = np.abs(difference_T)
    with np.errstate(over="ignore"):
        ratio_minus_1_T = np.expm1(difference_T)
    some = size_T.size > 0
    return Statistics(
        tokens=int(keep_T.sum()),
        ignored=int((~valid_T).sum()),
        not_finite={s: int((valid_T & ~np.isfinite(dump.logprobs(s))).sum()) for s in SYSTEMS},
        mean=float(np.mean(difference_T)) if some else np.nan,
        quantiles={q: float(np.quantile(size_T, q)) if some else np.nan for q in QUANTILES},
        bands={band: float(np.mean(np.abs(ratio_minus_1_T) <= band)) if some else np.nan for band in BANDS},
        k1=float(-np.mean(difference_T)) if some else np.nan,
        k3=float(np.mean(ratio_minus_1_T - difference_T)) if some else np.nan,
        histogram=np.histogram(size_T, np.concatenate([[0], 10**HISTOGRAM_EDGES, [np.inf]]))[0].tolist(),
        worst=tokens_at(dump, worst_rows(dump, keep_T)),
    )


def worst_rows(dump: Dump, keep_T: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Indices of the tokens with the largest |difference|, in descending order."""
    rows = np.flatnonzero(keep_T)
    size = np.abs(dump.logprobs("trainer")[rows] - dump.logprobs("engine")[rows])
    return np.asarray(rows[np.argsort(-size, kind="stable")[:NUM_WORST]])


def tokens_at(dump: Dump, rows: NDArray[np.intp]) -> list[Token]:
    """The report's entries for these tokens."""
    trainer_T, engine_T, labels_T = dump.logprobs("trainer"), dump.logprobs("engine"), dump.labels.reshape(-1)
    positions = [tuple(int(i) for i in np.unravel_index(row, dump.labels.shape)) for row in rows]
    return [
        Token(position, int(labels_T[row]), float(trainer_T[row]), float(engine_T[row]))
        for position, row in zip(positions, rows, strict=True)
    ]
