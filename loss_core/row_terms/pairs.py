"""Terms of two distributions per row, how they merge, and the divergences between the two."""

# z_t, z_s = logits of teacher and student (after the temperature), p_t, p_s = their softmax

from __future__ import annotations

import math
from typing import Any, NamedTuple

from loss_core.row_terms.guarded import Array, Namespace, relative

# Unit of `PairTerms.a`; a power of two, so that scaling by it is exact. If student logits are masked with the lowest
# finite number instead of -inf, single gaps are near the largest finite number, and their sum must not overflow.
GAP_UNIT = 2.0**20


class PairTerms(NamedTuple):
    """Terms of two distributions, teacher (t) and student (s), over a piece of the vocabulary.

    Attributes:
        m_t, m_s: max of z_t, of z_s; -inf for an empty piece.
        s_t, s_s: sum of exp(z_t - m_t), of exp(z_s - m_s).
        a: sum of exp(z_t - m_t) * ((z_t - m_t) - (z_s - m_s)) / GAP_UNIT.
    """

    m_t: Array
    s_t: Array
    a: Array
    m_s: Array
    s_s: Array


class MixtureTerms(NamedTuple):
    """Divergences from the mixture M = beta p_t + (1 - beta) p_s over a piece of the vocabulary; pieces add up.

    Attributes:
        kl_t, kl_s: sum of p_t log(p_t / M), of p_s log(p_s / M); p is normalised over the full vocabulary.
    """

    kl_t: Array
    kl_s: Array


# Terms of an empty piece: the identity of `combine_pairs`.
EMPTY_PAIR = PairTerms(m_t=-float("inf"), s_t=0.0, a=0.0, m_s=-float("inf"), s_s=0.0)


def combine_pairs(xp: Namespace, a: PairTerms, b: PairTerms) -> PairTerms:
    """Merge the pair terms of two pieces of a row."""
    m_t = xp.maximum(a.m_t, b.m_t)
    m_s = xp.maximum(a.m_s, b.m_s)
    (s_t_a, a_a, s_s_a), (s_t_b, a_b, s_s_b) = [_rescaled(xp, piece, m_t, m_s) for piece in (a, b)]
    return PairTerms(m_t, s_t_a + s_t_b, a_a + a_b, m_s, s_s_a + s_s_b)


def kl_divergence(xp: Namespace, terms: PairTerms) -> Array:
    """KL(teacher || student) per row; NaN where all logits of either are -inf."""
    # m_s - m_s is 0, or NaN where all student logits are -inf: log(s_s) alone would give an infinite loss there.
    gap = terms.a / terms.s_t * GAP_UNIT
    return gap - xp.log(terms.s_t) + (xp.log(terms.s_s) + (terms.m_s - terms.m_s))


def kl_centre(xp: Namespace, terms: PairTerms, kl: Array) -> Array:
    """The c for which the teacher's gradient p_t (log p_t - log p_s - KL) is p_t (((z_t - m_t) - (z_s - m_s)) - c)."""
    return log_ratio_offset(xp, terms) + kl


def log_ratio_offset(xp: Namespace, terms: PairTerms) -> Array:
    """The c in log p_t - log p_s = ((z_t - m_t) - (z_s - m_s)) - c."""
    return xp.log(terms.s_t) - xp.log(terms.s_s)


def beta_of(loss: Any) -> float:
    """The divergence of a loss or config, as the beta of the generalized Jensen-Shannon divergence.

    0 is KL(teacher || student), 1 is KL(student || teacher); see `KDLossConfig`.
    """
    return {"forward_kl": 0.0, "reverse_kl": 1.0}.get(loss.divergence, float(loss.beta))


def log_shares(beta: float) -> tuple[float, float]:
    """log(beta) and log(1 - beta): log-weights of teacher and student in the mixture, for beta in (0, 1)."""
    return math.log(beta), math.log1p(-beta)


def mixture_logs(xp: Namespace, log_ratio: Array, log_share_t: Any, log_share_s: Any) -> tuple[Array, Array]:
    """log(p_t / M) and log(p_s / M) of each class, from log p_t - log p_s.

    Unspecified, possibly NaN, where the probability itself is 0.
    p_t / M is sigmoid(x) / beta and p_s / M is sigmoid(-x) / (1 - beta), x = log_ratio + log(beta / (1 - beta)).
    """
    x = log_ratio + (log_share_t - log_share_s)
    # log sigmoid(x) = min(x, 0) - log(1 + e^-|x|) never overflows, and holds for infinite x.
    common = xp.log1p(xp.exp(-xp.abs(x)))
    return xp.clip(x, None, 0.0) - common - log_share_t, xp.clip(-x, None, 0.0) - common - log_share_s


def jensen_shannon(xp: Namespace, terms: PairTerms, mixture: MixtureTerms, beta: float) -> Array:
    """beta KL(p_t || M) + (1 - beta) KL(p_s || M) per row; NaN where all logits of either are -inf.

    Its gradients by z_t and z_s are beta p_t (log(p_t / M) - kl_t) and (1 - beta) p_s (log(p_s / M) - kl_s).
    """
    # m - m is 0, or NaN where all logits are -inf.
    return beta * mixture.kl_t + (1.0 - beta) * mixture.kl_s + ((terms.m_t - terms.m_t) + (terms.m_s - terms.m_s))


def _rescaled(xp: Namespace, piece: PairTerms, m_t: Array, m_s: Array) -> tuple[Array, Array, Array]:
    """(s_t, a, s_s) of a piece, rescaled to the maxima m_t and m_s."""
    shift_t = relative(xp, piece.m_t, m_t)
    shift_s = relative(xp, piece.m_s, m_s)
    scale_t = xp.exp(shift_t)
    s_t = piece.s_t * scale_t
    # 0 times an infinite shift must be 0: such a piece holds no teacher probability.
    zero = xp.zeros_like(s_t)
    unit = s_t / GAP_UNIT
    shifted = unit * xp.where(s_t == 0, zero, shift_t) - unit * xp.where(s_t == 0, zero, shift_s)
    a = xp.where(scale_t == 0, zero, piece.a * scale_t) + shifted
    return s_t, a, piece.s_s * xp.exp(shift_s)
