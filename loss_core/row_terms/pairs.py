"""Terms of two distributions per row, and the divergences between them."""

# z_t, z_s = logits of teacher and student (after the temperature)

from __future__ import annotations

import math
from typing import Any, NamedTuple

from loss_core.row_terms.guarded import Array, Namespace, relative

# Unit of `PairTerms.a`: a power of two, so that it costs no digits. Where a student is masked by the lowest finite
# number in place of -inf, single gaps are near the largest one; their sum must stay finite for a divergence that is.
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
    """Sums of two distributions against their mixture M = beta p_t + (1 - beta) p_s; those of pieces add up.

    Attributes:
        kl_t, kl_s: sum of p_t log(p_t / M), of p_s log(p_s / M); with p over the whole vocabulary.
    """

    kl_t: Array
    kl_s: Array


# Terms of a piece without classes: the identity of `combine_pairs`.
EMPTY_PAIR = PairTerms(m_t=-float("inf"), s_t=0.0, a=0.0, m_s=-float("inf"), s_s=0.0)


def combine_pairs(xp: Namespace, a: PairTerms, b: PairTerms) -> PairTerms:
    """Terms of two pieces as one, for pairs of distributions."""
    m_t = xp.maximum(a.m_t, b.m_t)
    m_s = xp.maximum(a.m_s, b.m_s)
    parts = [_moved(xp, piece, m_t, m_s) for piece in (a, b)]
    (s_t_a, a_a, s_s_a), (s_t_b, a_b, s_s_b) = parts
    return PairTerms(m_t, s_t_a + s_t_b, a_a + a_b, m_s, s_s_a + s_s_b)


def kl_divergence(xp: Namespace, terms: PairTerms) -> Array:
    """KL(teacher || student) per row; NaN where either has no finite logit at all."""
    # m_s - m_s is 0, or NaN for a student of -inf alone, whose log(s_s) would pass for a number.
    gap = terms.a / terms.s_t * GAP_UNIT
    return gap - xp.log(terms.s_t) + (xp.log(terms.s_s) + (terms.m_s - terms.m_s))


def kl_centre(xp: Namespace, terms: PairTerms, kl: Array) -> Array:
    """What (z_t - m_t) - (z_s - m_s) is compared with in the teacher's gradient.

    With it, log p_t - log p_s - KL is ((z_t - m_t) - (z_s - m_s)) - centre.
    """
    return log_ratio_offset(xp, terms) + kl


def log_ratio_offset(xp: Namespace, terms: PairTerms) -> Array:
    """What ((z_t - m_t) - (z_s - m_s)) is more than log p_t - log p_s."""
    return xp.log(terms.s_t) - xp.log(terms.s_s)


def beta_of(loss: Any) -> float:
    """The divergence that a loss's fields mean, as beta of the generalized Jensen-Shannon divergence.

    0 is KL(teacher || student), 1 is KL(student || teacher); see `KDLossConfig`.
    """
    return {"forward_kl": 0.0, "reverse_kl": 1.0}.get(loss.divergence, float(loss.beta))


def log_shares(beta: float) -> tuple[float, float]:
    """Logarithms of the shares of teacher and student in their mixture, for beta in (0, 1)."""
    return math.log(beta), math.log1p(-beta)


def mixture_logs(xp: Namespace, log_ratio: Array, log_share_t: Any, log_share_s: Any) -> tuple[Array, Array]:
    """log(p_t / M) and log(p_s / M) of each class, from log p_t - log p_s. For a probability of 0: any number or NaN.

    p_t / M is sigmoid(x) / beta and p_s / M is sigmoid(-x) / (1 - beta), x = log_ratio + log(beta / (1 - beta)).
    """
    x = log_ratio + (log_share_t - log_share_s)
    # log sigmoid(x) = min(x, 0) - log(1 + e^-|x|): overflows for no x, and holds for infinite ones.
    common = xp.log1p(xp.exp(-xp.abs(x)))
    return xp.clip(x, None, 0.0) - common - log_share_t, xp.clip(-x, None, 0.0) - common - log_share_s


def jensen_shannon(xp: Namespace, terms: PairTerms, mixture: MixtureTerms, beta: float) -> Array:
    """beta KL(p_t || M) + (1 - beta) KL(p_s || M) per row; NaN where either has no finite logit at all.

    Its gradients by z_t and z_s are beta p_t (log(p_t / M) - kl_t) and (1 - beta) p_s (log(p_s / M) - kl_s).
    """
    # m - m is 0, or NaN where there are only logits of -inf.
    return beta * mixture.kl_t + (1.0 - beta) * mixture.kl_s + ((terms.m_t - terms.m_t) + (terms.m_s - terms.m_s))


def _moved(xp: Namespace, piece: PairTerms, m_t: Array, m_s: Array) -> tuple[Array, Array, Array]:
    """(s_t, a, s_s) of a piece, relative to other maxima."""
    shift_t = relative(xp, piece.m_t, m_t)
    shift_s = relative(xp, piece.m_s, m_s)
    scale_t = xp.exp(shift_t)
    s_t = piece.s_t * scale_t
    # Weight 0 times an infinite shift must be 0: such a piece holds no teacher probability.
    none = xp.zeros_like(s_t)
    unit = s_t / GAP_UNIT
    moved = unit * xp.where(s_t == 0, none, shift_t) - unit * xp.where(s_t == 0, none, shift_s)
    a = xp.where(scale_t == 0, xp.zeros_like(s_t), piece.a * scale_t) + moved
    return s_t, a, piece.s_s * xp.exp(shift_s)
