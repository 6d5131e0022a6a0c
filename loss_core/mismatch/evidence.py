"""Statistical test between hypotheses that are all within their bounds.

Bounds hold for any order of summation, so they are wide: float32 and TF32 may both be within theirs. If B is what was
computed, its residual r = observed - predicted consists of roundings, whose signs are independent of d, the prediction
of another hypothesis A minus that of B. Then |sum r d| exceeds SUM_GROWTH sqrt(sum r^2 d^2) with probability
2 exp(-SUM_GROWTH^2 / 2) = 3e-8 (Hoeffding 1963, J. Am. Stat. Assoc. 58, Theorem 2, given |r|), and B is refuted. If A
is what was computed, r is d plus A's own roundings, and the sum is about that of d^2, which exceeds the threshold for
some hundred tokens.
"""

# N = tokens of a sample

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from loss_core.losses.bounds.rounding import SUM_GROWTH
from loss_core.mismatch.hypotheses import Outcome


class Evidence(NamedTuple):
    """The hypotheses that explain every token, by the result of the test.

    Attributes:
        causes: those that no other refutes; a single one is the explanation, several are equally possible.
        same: for each cause, those that predict the same bits, or whose change of the recorded formula has no visible
            effect on these tokens.
        refuted: within their bounds, but the observations follow, or are closer to, another prediction.
    """

    causes: list[Outcome]
    same: list[list[Outcome]]
    refuted: list[Outcome]


def weigh(outcomes: Sequence[Outcome]) -> Evidence:
    """Test outcomes against each other; the order of `outcomes` is the order of preference.

    A hypothesis within a wide bound is refuted if one outside of its own, tighter bound is closer.
    """
    closest = min((o.rms for o in outcomes if not o.explains), default=np.inf)
    explaining = [o for o in outcomes if o.explains]
    causes, same = _distinct([o for o in explaining if o.rms <= closest])
    follows = [[_follows(b, a) for a in causes] for b in causes]
    indices = range(len(causes))
    refuted = {b for b in indices for a in indices if follows[b][a] and not follows[a][b]}
    if len(refuted) == len(causes):  # each by another one: no evidence for any
        refuted = set()
    left = [i for i in indices if i not in refuted]
    # A change without a visible effect is redundant with the recorded formula in the same precision.
    redundant = {a: b for a in left for b in left if _is_recorded_form_of(causes[b], causes[a]) and not follows[b][a]}
    for a, b in redundant.items():
        same[b] += [causes[a], *same[a]]
    kept = [i for i in left if i not in redundant]
    return Evidence(
        [causes[i] for i in kept],
        [same[i] for i in kept],
        [causes[i] for i in sorted(refuted)] + [o for o in explaining if o.rms > closest],
    )


def _distinct(explaining: Sequence[Outcome]) -> tuple[list[Outcome], list[list[Outcome]]]:
    """Outcomes whose predictions differ, and for each those with bitwise the same prediction."""
    causes: list[Outcome] = []
    same: list[list[Outcome]] = []
    for outcome in explaining:
        for known, others in zip(causes, same, strict=True):
            if _predict_the_same(known, outcome):
                others.append(outcome)
                break
        else:
            causes.append(outcome)
            same.append([])
    return causes, same


def _predict_the_same(a: Outcome, b: Outcome) -> bool:
    same_tokens = np.array_equal(a.observed_N, b.observed_N, equal_nan=True)
    return same_tokens and np.array_equal(a.predicted.value, b.predicted.value, equal_nan=True)


def _is_recorded_form_of(b: Outcome, a: Outcome) -> bool:
    return (
        b.hypothesis.is_recorded
        and not a.hypothesis.is_recorded
        and b.hypothesis.precision.name == a.hypothesis.precision.name
    )


def _follows(b: Outcome, a: Outcome) -> bool:
    """Whether B's residual correlates with the difference to A's prediction more than independent signs allow."""
    both = np.isfinite(a.residual) & np.isfinite(b.residual)
    d_N, r_N = (a.predicted.value - b.predicted.value)[both], b.residual[both]
    return bool(abs(np.sum(r_N * d_N)) > SUM_GROWTH * np.sqrt(np.sum(r_N**2 * d_N**2)))
