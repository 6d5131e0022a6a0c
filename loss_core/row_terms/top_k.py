"""Distillation from K log-probabilities of the teacher per row, as functions of row terms with K targets."""

# T = tokens (rows), V = vocabulary or a piece of it, K = targets of a row, z = logits (after softcap and temperature)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from loss_core.row_terms.guarded import Array, Namespace, log, relative, weighted
from loss_core.row_terms.rows import Coefficients, RowTerms, Sums, is_objective


@is_objective
class TopK(NamedTuple):
    """An `Objective`: KL(teacher || student) over a row's K targets, and with a tail over all other classes as one.

    Without a tail: the sum of p (log p - log q) over the K targets; neither p nor q is renormalised.

    Attributes:
        log_p: the teacher's log-probabilities of the K targets, [..., K]; -inf for a probability of 0.
        tail: whether all other classes together form one more class, with the remaining probability.
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
        """The divergence; +inf where the student gives probability 0 to a class to which the teacher does not."""
        p, p_tail = _teacher_probs(xp, self)
        log_q, log_rest = _student_log_probs(xp, terms)
        loss = xp.sum(weighted(xp, p, self.log_p - log_q), -1)
        return (loss if p_tail is None else loss + weighted(xp, p_tail, log(xp, p_tail) - log_rest),)

    def coefficients(self, xp: Namespace, terms: RowTerms, upstreams: Sequence[Array]) -> Coefficients:
        """Coefficients of the gradient by the student's z.

        With rest = 1 - sum q_k, q_v = exp(z_v - m) rest / s for the other classes, and W = sum p_k (+ p_tail): the
        gradient is W q_k - p_k at the targets, and W q_v - p_tail q_v / rest elsewhere. The latter equals
        exp(z_v - m) (W rest - p_tail) / s, which needs no division by rest.
        """
        (upstream,) = upstreams
        p, p_tail = _teacher_probs(xp, self)
        log_q, log_rest = _student_log_probs(xp, terms)
        weight = xp.sum(p, -1) if p_tail is None else xp.sum(p, -1) + p_tail
        pull = weight * xp.exp(log_rest) if p_tail is None else weight * xp.exp(log_rest) - p_tail
        # Where all other classes have logits of -inf, exp(z - m) is 0, and so must their gradient be.
        empty = terms.s == 0
        scale = xp.where(empty, xp.zeros_like(pull), upstream * pull / xp.where(empty, xp.ones_like(terms.s), terms.s))
        return Coefficients(scale, upstream[..., None] * (weight[..., None] * xp.exp(log_q) - p))

    def teacher_gradient(self, xp: Namespace, terms: RowTerms) -> Array:
        """Gradient of the value by log_p, [..., K], with p_tail = 1 - sum p; where p_tail is 0, as without a tail."""
        p, p_tail = _teacher_probs(xp, self)
        log_q, log_rest = _student_log_probs(xp, terms)
        ratio = self.log_p - log_q
        if p_tail is None:
            return weighted(xp, p, ratio + 1.0)
        of_tail = xp.where(p_tail == 0, xp.full_like(p_tail, -1.0), log(xp, p_tail) - log_rest)
        return weighted(xp, p, ratio - of_tail[..., None])


def _teacher_probs(xp: Namespace, teacher: TopK) -> tuple[Array, Array | None]:
    """p of the K targets [..., K], and of the tail [...], at least 0 despite rounding; None without a tail."""
    p = xp.exp(teacher.log_p)
    return p, xp.clip(1.0 - xp.sum(p, -1), 0.0, None) if teacher.tail else None


def _student_log_probs(xp: Namespace, terms: RowTerms) -> tuple[Array, Array]:
    """log q of the K targets [..., K], and of all other classes together [...]; -inf where there are none."""
    t = terms.t
    m = xp.maximum(terms.m, xp.amax(t, -1))
    x, rest = relative(xp, t, m[..., None]), relative(xp, terms.m, m)
    # With no other class, rest is -inf and s is 0: their product is 0.
    log_sum = xp.log(xp.sum(xp.exp(x), -1) + terms.s * xp.exp(rest))
    return x - log_sum[..., None], rest + log(xp, terms.s) - log_sum
