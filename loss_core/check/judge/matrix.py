"""Verdicts on clauses as reports show them: a matrix for each loss, and what was not judged in the words given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from loss_core.check.report import Report


class Matrix(NamedTuple):
    """The verdicts on one loss.

    Attributes:
        status: what stands in a cell, by (clause, implementation).
    """

    loss: str
    clauses: list[str]
    implementations: list[str]
    status: dict[tuple[str, str], str]


def matrices(report: Report) -> Iterator[Matrix]:
    """One for each loss."""
    for loss in dict.fromkeys(verdict.loss for verdict in report.verdicts):
        of_loss = [verdict for verdict in report.verdicts if verdict.loss == loss]
        yield Matrix(
            loss,
            list(dict.fromkeys(verdict.clause for verdict in of_loss)),
            list(dict.fromkeys(verdict.implementation for verdict in of_loss)),
            {(v.clause, v.implementation): v.status.replace("broken", "BROKEN") for v in of_loss},
        )


def reasons_not_judged(report: Report) -> list[tuple[str, str]]:
    """What implementations refuse, in their own words, and what could not be seen: (who and which clauses, words)."""
    by_words: dict[tuple[str, str], list[str]] = {}
    for verdict in report.verdicts:
        for text in verdict.words:
            by_words.setdefault((f"{verdict.implementation}, {verdict.loss}", text), []).append(verdict.clause)
    return [(f"{who}, {', '.join(clauses)}", text) for (who, text), clauses in by_words.items()]
