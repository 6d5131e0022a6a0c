"""Hypotheses (a precision and a cause), and their outcomes: predictions beside a system's log-probabilities."""

# T = tokens of the dump, N = tokens of a sample, V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loss_core.mismatch.causes import RECORDED, Cause
from loss_core.mismatch.dump import Array, Dump
from loss_core.mismatch.predict.head import Formula, Products, log_probs, products, stored_logits
from loss_core.mismatch.predict.interval import Floats, Interval
from loss_core.mismatch.predict.precision import Precision

# How many logits are predicted at a time.
_CHUNK = 2**21


class Hypothesis(NamedTuple):
    """A way in which a system may have computed its log-probabilities."""

    precision: Precision
    cause: Cause

    @property
    def name(self) -> str:
        """Such as "bfloat16 logits, without temperature 0.9"; only the precision for the recorded formula."""
        return self.precision.name if self.is_recorded else f"{self.precision.name}, {self.cause.name}"

    @property
    def is_recorded(self) -> bool:
        return self.cause.name == RECORDED


@dataclass(frozen=True)
class System:
    """One of the two systems, with the head that both share.

    Attributes:
        name: "trainer" or "engine".
        observed_T: its log-probabilities, flattened like labels_T.
        sequence: length of labels' last dimension, along which positions are shifted.
        hidden_TH, weight_VH, bias_V: input and parameters of the head.
    """

    name: str
    observed_T: Floats
    labels_T: NDArray[np.int64]
    ignore_index: int
    sequence: int
    hidden_TH: Array
    weight_VH: Array
    bias_V: Array | None

    @classmethod
    def of(cls, dump: Dump, name: str) -> System:
        """The system of this name in a dump that has a head."""
        hidden_TH = dump.hidden_states(name)
        if hidden_TH is None or dump.lm_weight is None:
            raise ValueError("The dump has no hidden_states and lm_weight.")
        labels_T = dump.labels.reshape(-1).astype(np.int64)
        sequence = dump.labels.shape[-1]
        return cls(
            name, dump.logprobs(name), labels_T, dump.ignore_index, sequence, hidden_TH, dump.lm_weight, dump.lm_bias
        )

    def targets(self, formula: Formula, rows: NDArray[np.intp]) -> tuple[NDArray[np.int64], Floats]:
        """Labels and observed log-probabilities for these rows of hidden states; NaN where nothing was observed."""
        labels = self._shifted(self.labels_T, formula.label_shift, self.ignore_index)[rows]
        observed = self._shifted(self.observed_T, formula.position_shift, np.nan)[rows]
        vocab = len(self.weight_VH) + min(formula.extra_columns, 0)
        usable = (labels != self.ignore_index) & (labels < vocab)
        return np.where(usable, labels, 0), np.where(usable, observed, np.nan)

    def _shifted(self, values_T: NDArray[Any], shift: int, missing: float) -> NDArray[Any]:
        """The value `shift` (-1, 0 or 1) positions later in the same sequence; `missing` beyond its end."""
        if not shift:
            return values_T
        shifted = np.roll(values_T.reshape(-1, self.sequence), -shift, axis=1)
        shifted[:, -1 if shift > 0 else 0] = missing
        return shifted.reshape(-1)


@dataclass(frozen=True)
class Outcome:
    """The prediction of a hypothesis for a sample of tokens, and the observations.

    Attributes:
        predicted: [N].
        observed_N: NaN for tokens without a prediction.
    """

    hypothesis: Hypothesis
    predicted: Interval
    observed_N: Floats

    @property
    def tokens(self) -> int:
        return int(np.isfinite(self.observed_N).sum())

    @property
    def residual(self) -> Floats:
        return self.observed_N - self.predicted.value

    @property
    def ratio(self) -> Floats:
        """Error over allowance of each token; up to 1, the token is explained. NaN where an operand is."""
        above = self.observed_N > self.predicted.value
        allowed_N = np.where(above, self.predicted.high, self.predicted.low) - self.predicted.value
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.where(self.residual == 0, 0.0, np.abs(self.residual) / np.abs(allowed_N)))

    @property
    def within(self) -> int:
        """Count of explained tokens."""
        return int((self.ratio <= 1).sum())

    @property
    def share(self) -> float:
        return self.within / self.tokens if self.tokens else 0.0

    @property
    def explains(self) -> bool:
        return self.within == self.tokens > 0

    @property
    def worst(self) -> float:
        """Largest error ratio; infinite where a prediction is not finite."""
        ratio_N = self.ratio[np.isfinite(self.observed_N)]
        return float(np.max(np.where(np.isnan(ratio_N), np.inf, ratio_N), initial=0.0))

    @property
    def rms(self) -> float:
        """Root mean square of observed - predicted."""
        residual = self.residual[np.isfinite(self.observed_N)]
        return float(np.sqrt(np.mean(residual**2))) if residual.size else np.inf


def with_products(
    system: System, precisions: Iterable[Precision], rows: NDArray[np.intp]
) -> Iterator[tuple[Precision, Products]]:
    """Each precision with its products for these rows, computed once for each format of operands."""
    ordered = sorted(dict.fromkeys(precisions), key=lambda precision: precision.operands)
    for operands, group in groupby(ordered, key=lambda precision: precision.operands):
        raw = products(system.hidden_TH[rows], system.weight_VH, system.bias_V, operands)
        for precision in group:
            yield precision, raw


def outcomes_of(system: System, hypotheses: Sequence[Hypothesis], rows: NDArray[np.intp]) -> list[Outcome]:
    """The outcome of each hypothesis on these rows, in the order of the hypotheses."""
    found: dict[Hypothesis, Outcome] = {}
    with np.errstate(over="ignore", invalid="ignore"):
        for precision, raw in with_products(system, (h.precision for h in hypotheses), rows):
            group = [h for h in hypotheses if h.precision == precision]
            found |= zip(group, _predict(system, group, raw, rows), strict=True)
    return [found[h] for h in hypotheses]


def _predict(
    system: System, hypotheses: Sequence[Hypothesis], raw: Products, rows: NDArray[np.intp]
) -> Iterator[Outcome]:
    """Outcomes of hypotheses of one precision, predicted in chunks of tokens."""
    targets = [system.targets(h.cause.formula, rows) for h in hypotheses]
    parts: list[list[Interval]] = [[] for _ in hypotheses]
    vocab, hidden = system.weight_VH.shape
    step = max(1, _CHUNK // vocab)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        logits: dict[bool, Interval] = {}
        for (precision, cause), (labels, _), done in zip(hypotheses, targets, parts, strict=True):
            bias = cause.formula.bias
            if bias not in logits:
                logits[bias] = stored_logits(raw.rows(part), precision, bias, hidden)
            done.append(log_probs(logits[bias], labels[part], precision, cause.formula))
    for hypothesis, (_, observed), done in zip(hypotheses, targets, parts, strict=True):
        predicted = Interval(*(np.concatenate([getattr(p, end) for p in done]) for end in ("low", "value", "high")))
        yield Outcome(hypothesis, predicted, observed)
