"""Explain a trainer whose log-probabilities differ from its inference engine's.

Every hypothesis (a precision and a cause) is tried on a few tokens, then those that explain them and the nearest others
on all tokens of a sample. Parameters of the formula are estimated only if no hypothesis explains a system.
"""

# T = tokens of the dump, V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from loss_core.mismatch.causes import causes_of, recorded
from loss_core.mismatch.dump import SYSTEMS, Dump
from loss_core.mismatch.estimate import estimated
from loss_core.mismatch.evidence import weigh
from loss_core.mismatch.hypotheses import Hypothesis, Outcome, System, outcomes_of
from loss_core.mismatch.predict.head import Formula
from loss_core.mismatch.predict.precision import PRECISIONS
from loss_core.mismatch.report import Explanation, MismatchReport
from loss_core.mismatch.statistics import compared, statistics_of, worst_rows

# Limits of a sample: logits (12 bytes each), and products for one format of operands (some seconds on two cores).
MOST_LOGITS = 2**25
MOST_PRODUCTS = 2**36
# Every hypothesis is tried on 4 tokens, then those that pass on 32; either stage has at most FIRST_LOGITS logits.
FIRST_TOKENS = (4, 32)
FIRST_LOGITS = 2**20
# How many failing hypotheses, the nearest, are kept for the report.
NUM_NEAREST = 4


def explain(dump: Dump, *, seed: int = 0, most_logits: int = MOST_LOGITS) -> MismatchReport:
    """Report how far the two systems differ and, if the dump has a head, what explains each of them.

    Args:
        dump: from `read_dump` or `dump_of`.
        seed: of the sample, if the dump has more tokens than `most_logits` allows.
        most_logits: largest size of the sample, tokens times vocabulary.
    """
    statistics, keep_T, notes = statistics_of(dump), compared(dump), []
    if dump.lm_weight is None or not keep_T.any():
        return MismatchReport(statistics, shares_hidden_states=dump.shares_hidden_states)
    notes += _not_finite(dump)
    for name in SYSTEMS:
        keep_T &= np.isfinite(np.asarray(dump.hidden_states(name))).all(axis=1)
    rows = _sample(dump, keep_T, seed, most_logits)
    if not rows.size:
        notes.append("No token has finite hidden states, so nothing can be computed from them.")
        return MismatchReport(statistics, notes=notes, shares_hidden_states=dump.shares_hidden_states)
    if rows.size < keep_T.sum():
        notes.append(
            f"Explained on a sample of {rows.size:,} of {int(keep_T.sum()):,} tokens (seed {seed}), with those that "
            "differ most among them."
        )
    explanations = {name: _explain(System.of(dump, name), dump, rows) for name in SYSTEMS}
    return MismatchReport(statistics, explanations, dump.shares_hidden_states, notes)


def _not_finite(dump: Dump) -> list[str]:
    arrays = {"lm_weight": dump.lm_weight, "lm_bias": dump.lm_bias}
    arrays |= {f"{name}_hidden_states": dump.hidden_states(name) for name in SYSTEMS}
    counts = {name: int((~np.isfinite(a)).sum()) for name, a in arrays.items() if a is not None}
    return [f"{name}: {count:,} numbers are NaN or infinite." for name, count in counts.items() if count]


def _sample(dump: Dump, keep_T: NDArray[np.bool_], seed: int, most_logits: int) -> NDArray[np.intp]:
    """Indices of the sampled tokens: random ones, then those that differ most."""
    vocab, hidden = np.asarray(dump.lm_weight).shape
    most = max(1, min(most_logits // vocab, MOST_PRODUCTS // (vocab * hidden)))
    worst = worst_rows(dump, keep_T)[:most]
    others = np.setdiff1d(np.flatnonzero(keep_T), worst)
    drawn = np.random.default_rng(seed).permutation(others)[: most - worst.size]
    return np.concatenate([drawn, worst])


def _explain(system: System, dump: Dump, rows: NDArray[np.intp]) -> Explanation:
    most = max(1, FIRST_LOGITS // len(system.weight_VH))
    stages = [*(rows[: min(tokens, most)] for tokens in FIRST_TOKENS), rows]
    tried = [Hypothesis(precision, cause) for cause in causes_of(dump) for precision in PRECISIONS]
    outcomes = _filtered(system, tried, stages)
    if not any(outcome.explains for outcome in outcomes):
        estimates = _estimates(system, recorded(dump), stages[-2])
        outcomes += _filtered(system, estimates, stages[-2:])
        tried += estimates
    evidence = weigh(outcomes)
    others = _nearest(outcomes)
    return Explanation(system.name, len(rows), len(tried), evidence.causes, evidence.same, evidence.refuted, others)


def _filtered(system: System, tried: Sequence[Hypothesis], stages: Sequence[NDArray[np.intp]]) -> list[Outcome]:
    """Outcomes on the last stage's rows, in the order of `tried`, of the hypotheses that pass every stage.

    A hypothesis passes a stage if it explains all of its rows, or is among the nearest of the others.
    """
    for rows in stages:
        outcomes = [outcome for outcome in outcomes_of(system, tried, rows) if outcome.tokens]
        chosen = {o.hypothesis for o in outcomes if o.explains} | {o.hypothesis for o in _nearest(outcomes)}
        tried = [hypothesis for hypothesis in tried if hypothesis in chosen]
    return [outcome for outcome in outcomes if outcome.hypothesis in chosen]


def _nearest(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return sorted((o for o in outcomes if not o.explains), key=lambda o: (-o.share, o.rms))[:NUM_NEAREST]


def _estimates(system: System, formula: Formula, rows: NDArray[np.intp]) -> list[Hypothesis]:
    """For each estimated parameter, the value with fewest digits that explains these rows, or else the exact one."""
    chosen = []
    for hypotheses in estimated(system, formula, rows):
        found = outcomes_of(system, hypotheses, rows)
        chosen.append(next((o.hypothesis for o in found if o.explains), hypotheses[-1]))
    return chosen
