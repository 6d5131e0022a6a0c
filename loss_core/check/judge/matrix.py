"""Verdicts on clauses arranged for reports: a matrix for each loss, and the reasons why clauses were not judged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from loss_core.check.report import Report


class Matrix(NamedTuple):
    """The verdicts on one loss.

    Attributes:
        status: text of each cell, by (clause, implementation).
    """

    loss: str
    clauses: list[str]
    implementations: list[str]
    status: dict[tuple[str, str], str]


def matrices(report: Report) -> Iterator[Matrix]:
    """One matrix for each loss."""
    for loss in dict.fromkeys(verdict.loss for verdict in report.verdicts):
        of_loss = [verdict for verdict in report.verdicts if verdict.loss == loss]
        yield Matrix(
            loss,
            list(dict.fromkeys(verdict.clause for verdict in of_loss)),
            list(dict.fromkeys(verdict.implementation for verdict in of_loss)),
            {(v.clause, v.implementation): v.status.replace("broken", "BROKEN") for v in of_loss},
        )


def reasons_not_judged(report: Report) -> list[tuple[str, str]]:
    """Why clauses were not judged: pairs of "implementation, loss, clauses" and the error message or reason."""
    by_words: dict[tuple[str, str], list[str]] = {}
    for verdict in report.verdicts:
        for text in verdict.words:
            by_words.setdefault((f"{verdict.implementation}, {verdict.loss}", text), []).append(verdict.clause)
    return [(f"{who}, {', '.join(clauses)}", text) for (who, text), clauses in by_words.items()]
