"""The report on a trainer and its engine: what explains each of them, and a conclusion with advice."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loss_core import __version__
from loss_core.mismatch.dump import SYSTEMS
from loss_core.mismatch.hypotheses import Hypothesis, Outcome
from loss_core.mismatch.predict.precision import FLOAT32
from loss_core.mismatch.statistics import BANDS, Statistics


@dataclass(frozen=True)
class Explanation:
    """What explains one system.

    Attributes:
        system: "trainer" or "engine".
        tokens, tried: counts of tokens and hypotheses.
        causes: hypotheses that explain every token and that no other refutes: a single one is the explanation, several
            are equally possible; empty if nothing explains the system.
        same: for each cause, the hypotheses that these tokens can't distinguish from it.
        refuted: within their bounds, but another hypothesis predicts their residuals.
        nearest: those that explain most tokens, but not all.
    """

    system: str
    tokens: int
    tried: int
    causes: list[Outcome]
    same: list[list[Outcome]]
    refuted: list[Outcome]
    nearest: list[Outcome]

    @property
    def names(self) -> list[str]:
        """Names of the causes, without duplicates."""
        return list(dict.fromkeys(outcome.hypothesis.name for outcome in self.causes))

    @property
    def possible(self) -> dict[Hypothesis, Outcome]:
        """The causes and the hypotheses that can't be distinguished from them."""
        return {o.hypothesis: o for o in (*self.causes, *(o for part in self.same for o in part))}

    @property
    def finding(self) -> str:
        """What explains this system, as text."""
        if not self.causes:
            near = self.nearest[0]
            nearest = f"the nearest, {near.hypothesis.name}, explains {near.share:.1%} of the tokens"
            return f"none of {self.tried} hypotheses explains it; {nearest}"
        if len(self.names) == 1:
            return self.names[0]
        return f"one of {len(self.names)}, which these tokens can't tell apart: {'; or '.join(self.names)}"

    @property
    def is_clean(self) -> bool:
        """Whether the recorded formula in float32 is a possible explanation."""
        return any(h.is_recorded and h.precision == FLOAT32 for h in self.possible)

    @property
    def advice(self) -> str:
        """What to do; "" where the recorded formula in float32 explains it."""
        if self.is_clean:
            return ""
        if not self.causes:
            return "check what comes before the head: dump trainer_hidden_states and engine_hidden_states"
        texts = [
            text
            for outcome in self.causes
            for text in (outcome.hypothesis.cause.advice, outcome.hypothesis.precision.advice)
            if text
        ]
        return (" and " if len(self.names) == 1 else "; or ").join(dict.fromkeys(texts))


@dataclass(frozen=True)
class MismatchReport:
    """How far a trainer's log-probabilities are from an engine's, and why.

    Attributes:
        statistics: of the differences.
        explanations: by system; empty without a head in the dump.
        shares_hidden_states: whether both systems were explained from the same hidden states.
        notes: remarks for the reader, such as the size of a sample.
    """

    statistics: Statistics
    explanations: dict[str, Explanation] = field(default_factory=dict)
    shares_hidden_states: bool = True
    notes: list[str] = field(default_factory=list)

    @property
    def in_common(self) -> list[Hypothesis]:
        """Hypotheses that explain both systems, in the trainer's order."""
        if not self.explanations:
            return []
        trainer, engine = (self.explanations[system].possible for system in SYSTEMS)
        return [hypothesis for hypothesis in trainer if hypothesis in engine]

    @property
    def hidden_states_differ(self) -> bool:
        """Whether the head's predictions from the two systems' own hidden states are disjoint for some token."""
        if self.shares_hidden_states or not self.in_common:
            return False
        trainer, engine = (self.explanations[system].possible[self.in_common[0]].predicted for system in SYSTEMS)
        return bool(np.any((trainer.low > engine.high) | (engine.low > trainer.high)))

    @property
    def agree(self) -> bool:
        """Whether one hypothesis explains both systems; without a head, whether every ratio is within 1e-3 of 1."""
        if any(self.statistics.not_finite.values()) or not self.statistics.tokens:
            return False
        if not self.explanations:
            return self.statistics.bands[BANDS[0]] == 1.0
        return bool(self.in_common) and not self.hidden_states_differ

    @property
    def conclusion(self) -> str:
        """The result in one line, with advice."""
        statistics = self.statistics
        not_finite = [f"{count:,} of the {system}" for system, count in statistics.not_finite.items() if count]
        if not_finite:
            return f"DIFFER: log-probabilities are NaN or infinite: {', '.join(not_finite)}. Fix these first."
        if not self.explanations:
            apart = f"the largest |difference| is {statistics.quantiles[1.0]:.3g}"
            if self.agree:
                return f"AGREE: every ratio is within {BANDS[0]:g} of 1; {apart}."
            return f"DIFFER: {apart}. Add hidden_states and lm_weight to the dump to learn why."
        if self.agree:
            return f"AGREE: one computation explains both systems: {self.in_common[0].name}."
        if self.hidden_states_differ:
            same = self.in_common[0].name
            return f"DIFFER: the hidden states do. The heads compute the same ({same}): check what comes before them."
        return "DIFFER: " + " ".join(_sentence(self.explanations[system]) for system in SYSTEMS)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN and infinities become None."""
        statistics = self.statistics._asdict()
        statistics["worst"] = [token._asdict() for token in self.statistics.worst]
        found = {
            "loss_core": __version__,
            "agree": self.agree,
            "conclusion": self.conclusion,
            "statistics": statistics,
            "explanations": {system: _explanation_dict(e) for system, e in self.explanations.items()},
            "shares_hidden_states": self.shares_hidden_states,
            "notes": self.notes,
        }
        return dict(_plain(found))

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)


def _sentence(explanation: Explanation) -> str:
    advice = f" -> {explanation.advice}" if explanation.advice else ""
    return f"{explanation.system}: {explanation.finding}{advice}."


def rows_of(explanation: Explanation) -> list[tuple[str, Outcome]]:
    """The table of one system: ("explains", "possible", "same", "refuted" or "no", outcome) for each hypothesis."""
    word = "explains" if len(explanation.names) == 1 else "possible"
    rows = []
    for cause, same in zip(explanation.causes, explanation.same, strict=True):
        rows.append((word, cause))
        rows += [("same", outcome) for outcome in same]
    rows += [("refuted", outcome) for outcome in explanation.refuted]
    return rows + [("no", outcome) for outcome in explanation.nearest]


def _explanation_dict(explanation: Explanation) -> dict[str, Any]:
    return {
        "finding": explanation.finding,
        "advice": explanation.advice,
        "causes": explanation.names,
        "tokens": explanation.tokens,
        "tried": explanation.tried,
        "hypotheses": [
            {
                "outcome": word,
                "name": outcome.hypothesis.name,
                "precision": outcome.hypothesis.precision.name,
                "cause": outcome.hypothesis.cause.name,
                "tokens": outcome.tokens,
                "within": outcome.within,
                "worst": outcome.worst,
                "rms": outcome.rms,
            }
            for word, outcome in rows_of(explanation)
        ],
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
