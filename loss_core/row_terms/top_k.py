"""Distillation from a teacher of whose row K log-probabilities are known, from terms with K targets."""

# T = tokens (rows), V = vocabulary or a piece of it, K = targets of a row, z = logits (after softcap and temperature)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from loss_core.row_terms.guarded import Array, Namespace, log, relative, weighted
from loss_core.row_terms.rows import Coefficients, RowTerms, Sums, is_objective


@is_objective
class TopK(NamedTuple):
    """An `Objective`: KL(teacher || student) over the row's K targets, and with a tail over the class of all others.

    Without one: the sum of p (log p - log q) over the K targets, with p and q as they are, not renormalised.

    Attributes:
        log_p: the teacher's log-probabilities of the K targets, [..., K], -inf for a probability of 0.
        tail: whether all other classes together are one more class, whose probability is what is left.
    """

    log_p: Array
    tail: bool

    @property
    def sums(self) -> Sums:
        return Sums()

    @property
    def num_values(self) -> int:
        return 1

    @property
    def headroom(self) -> int:
        return 0

    def of_rows(self, at: Any) -> TopK:
        return self._replace(log_p=self.log_p[at])

    def values(self, xp: Namespace, terms: RowTerms) -> tuple[Array]:
        """From terms with K targets; +inf for a class that the teacher allows and the student rules out."""
        p, p_tail = _teacher(xp, self)
        log_q, log_rest = _student(xp, terms)
        loss = xp.sum(weighted(xp, p, self.log_p - log_q), -1)
        return (loss if p_tail is None else loss + weighted(xp, p_tail, log(xp, p_tail) - log_rest),)

    def coefficients(self, xp: Namespace, terms: RowTerms, upstreams: Sequence[Array]) -> Coefficients:
        """Of the gradient by the student's z.

        With q_v = exp(z_v - m) rest / s for the other classes, rest = 1 - sum q_k, and W the sum of all p that count:
        W q_k - p_k at the targets, and W q_v - p_tail q_v / rest elsewhere, which is exp(z_v - m) (W rest - p_tail) /
        s: nothing is divided by what is left of q.
        """
        (upstream,) = upstreams
        p, p_tail = _teacher(xp, self)
        log_q, log_rest = _student(xp, terms)
        weight = xp.sum(p, -1) if p_tail is None else xp.sum(p, -1) + p_tail
        pull = weight * xp.exp(log_rest) if p_tail is None else weight * xp.exp(log_rest) - p_tail
        # No other class has a logit above -inf: their exp(z - m) is 0, and so is to be the gradient.
        none = terms.s == 0
        scale = xp.where(none, xp.zeros_like(pull), upstream * pull / xp.where(none, xp.ones_like(terms.s), terms.s))
        return Coefficients(scale, upstream[..., None] * (weight[..., None] * xp.exp(log_q) - p))

    def teacher_gradient(self, xp: Namespace, terms: RowTerms) -> Array:
        """Gradient of the value by log_p, [..., K]: the tail's probability is 1 - sum p.

        Where nothing is left for a tail, it counts for nothing here as well.
        """
        p, p_tail = _teacher(xp, self)
        log_q, log_rest = _student(xp, terms)
        ratio = self.log_p - log_q
        if p_tail is None:
            return weighted(xp, p, ratio + 1.0)
        of_tail = xp.where(p_tail == 0, xp.full_like(p_tail, -1.0), log(xp, p_tail) - log_rest)
        return weighted(xp, p, ratio - of_tail[..., None])


def _teacher(xp: Namespace, teacher: TopK) -> tuple[Array, Array | None]:
    """p of the K targets [..., K], and of the tail [...] where it counts, which rounding may not make negative."""
    p = xp.exp(teacher.log_p)
    return p, xp.clip(1.0 - xp.sum(p, -1), 0.0, None) if teacher.tail else None


def _student(xp: Namespace, terms: RowTerms) -> tuple[Array, Array]:
    """log q of the K targets [..., K], and of the other classes together [...]; -inf where there is none."""
    t = terms.t
    m = xp.maximum(terms.m, xp.amax(t, -1))
    x, rest = relative(xp, t, m[..., None]), relative(xp, terms.m, m)
    # exp(-inf) of an empty rest meets a sum of 0.
    log_sum = xp.log(xp.sum(xp.exp(x), -1) + terms.s * xp.exp(rest))
    return x - log_sum[..., None], rest + log(xp, terms.s) - log_sum
