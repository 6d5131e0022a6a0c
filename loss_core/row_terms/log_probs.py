"""Log-probability of the target and entropy of the distribution, as functions of row terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from loss_core.row_terms.guarded import Array, Namespace
from loss_core.row_terms.rows import Coefficients, RowTerms, Sums, entropy, is_objective, with_target


@is_objective
class LogProbability(NamedTuple):
    """An `Objective`: the log-probability of the target and, optionally, the entropy of the distribution.

    Attributes:
        entropy: whether the entropy is a second value.
    """

    entropy: bool = False

    @property
    def sums(self) -> Sums:
        return Sums(e=self.entropy)

    @property
    def num_values(self) -> int:
        return 1 + self.entropy

    @property
    def headroom(self) -> int:
        return 0

    def of_rows(self, at: Any) -> LogProbability:
        return self

    def values(self, xp: Namespace, terms: RowTerms) -> tuple[Array, ...]:
        """The log-probability (-inf where no piece owns the target), then the entropy."""
        log_p = (terms.t - terms.m) - xp.log(terms.s)
        return (log_p, entropy(xp, terms)) if self.entropy else (log_p,)

    def coefficients(self, xp: Namespace, terms: RowTerms, upstreams: Sequence[Array]) -> Coefficients:
        """Uses d entropy / dz = -p (log p + entropy), where log p + entropy = (z - m) - e / s."""
        of_log_p = xp.zeros_like(terms.s) if upstreams[0] is None else upstreams[0]
        scale = -of_log_p / terms.s
        if not self.entropy or upstreams[1] is None:
            return with_target(xp, terms, of_log_p, scale)
        share = upstreams[1] / terms.s
        return with_target(xp, terms, of_log_p, scale + share * (terms.e / terms.s), slope=-share)
