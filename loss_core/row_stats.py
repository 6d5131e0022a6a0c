"""The log-sum-exp monoid: everything a row's loss needs, foldable over pieces of the vocabulary.

Vocabulary blocks, kernel blocks, tensor-parallel ranks and scans all fold with the functions here,
written once over an array namespace `xp`: `numpy`, `torch` or `jax.numpy`.

The parts of a state are arrays of one shape `[...]` (one entry per row) in the dtype of the arithmetic.
"""

# T = tokens (rows), V = vocabulary or a piece of it

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any
Namespace = Any


class RowState(NamedTuple):
    """Cross entropy of a row over a piece of the vocabulary.

    Attributes:
        m: max of the logits, or a number near it (see `near_largest`); -inf for an empty piece.
        s: sum of exp(z - m).
        t: logit of the target, -inf when the target is in another piece.
    """

    m: Array
    s: Array
    t: Array


class KDRowState(NamedTuple):
    """KL(teacher || student) of a row over a piece of the vocabulary.

    Attributes:
        m_t: max of the teacher's logits.
        s_t: sum of exp(z_t - m_t).
        a: sum of exp(z_t - m_t) * ((z_t - m_t) - (z_s - m_s)).
        m_s: max of the student's logits.
        s_s: sum of exp(z_s - m_s).
    """

    m_t: Array
    s_t: Array
    a: Array
    m_s: Array
    s_s: Array


def _shift(xp: Namespace, m: Array, new_m: Array) -> Array:
    """m - new_m, with an empty piece (m = -inf) staying -inf."""
    # -inf minus -inf is NaN: an empty piece must stay the identity.
    return m - xp.where(new_m == -float("inf"), xp.zeros_like(new_m), new_m)


def combine(xp: Namespace, a: RowState, b: RowState) -> RowState:
    """State of the two pieces together. Associative and commutative up to rounding; identity: (-inf, 0, -inf)."""
    m = xp.maximum(a.m, b.m)
    s = a.s * xp.exp(_shift(xp, a.m, m)) + b.s * xp.exp(_shift(xp, b.m, m))
    return RowState(m, s, xp.maximum(a.t, b.t))


def finish(xp: Namespace, state: RowState) -> Array:
    """Cross entropy per row: log-sum-exp minus the target's logit.

    A target that no piece owns gives +inf. Written relative to the maximum, so that a large common
    offset of the logits costs no digits.
    """
    return xp.log(state.s) + (state.m - state.t)


# How many columns `near_largest` wants.
NEAR_COLUMNS = 256


def near_largest(xp: Namespace, first: Array, t: Array) -> Array:
    """An m for rows that takes no look at all of their logits: any will do, as long as no exp(z - m) overflows.

    Whether it did is asked of the sum, by `near_enough`.

    Args:
        first: [T, up to NEAR_COLUMNS] the first logits of each row, in the dtype of the arithmetic.
        t: [T] the target's logit, or -inf.
    Returns:
        [T] the largest of these, 0 where all are -inf.
    """
    m = xp.maximum(xp.amax(first, -1), t)
    return xp.where(m == -float("inf"), xp.zeros_like(m), m)


def near_enough(s: Array) -> Array:
    """Whether the sums are those of rows with no logit more than 30 above the m of `near_largest`.

    Up to there the rounding of z - m moves its exp by 16 u at most. Rows of n <= NEAR_COLUMNS logits have their
    largest for m. For longer ones `loss_core.tolerance` allows the sum 6 sqrt(n) u, 96 u at least, and sums in vectors
    of 8 need no more than 6 sqrt(n / 8) u of that.
    """
    return (s > 1e-13) & (s < 1e13)


def combine_kd(xp: Namespace, a: KDRowState, b: KDRowState) -> KDRowState:
    """As `combine`, for KDRowState; identity: (-inf, 0, 0, -inf, 0)."""
    m_t = xp.maximum(a.m_t, b.m_t)
    m_s = xp.maximum(a.m_s, b.m_s)
    parts = [_moved(xp, piece, m_t, m_s) for piece in (a, b)]
    s_t = parts[0][0] + parts[1][0]
    total = parts[0][1] + parts[1][1]
    return KDRowState(m_t, s_t, total, m_s, parts[0][2] + parts[1][2])


def _moved(xp: Namespace, piece: KDRowState, m_t: Array, m_s: Array) -> tuple[Array, Array, Array]:
    """(s_t, a, s_s) of a piece, relative to other maxima."""
    shift_t = _shift(xp, piece.m_t, m_t)
    shift_s = _shift(xp, piece.m_s, m_s)
    scale_t = xp.exp(shift_t)
    s_t = piece.s_t * scale_t
    # Weight 0 times an infinite shift must be 0: such a piece holds no teacher probability.
    none = xp.zeros_like(s_t)
    moved = s_t * xp.where(s_t == 0, none, shift_t) - s_t * xp.where(s_t == 0, none, shift_s)
    a = xp.where(scale_t == 0, xp.zeros_like(s_t), piece.a * scale_t) + moved
    return s_t, a, piece.s_s * xp.exp(shift_s)


def finish_kd(xp: Namespace, state: KDRowState) -> Array:
    """KL(teacher || student) per row; NaN when either has no finite logit at all."""
    # m_s - m_s is 0, or NaN for a student of -inf alone, whose log(s_s) would pass for a number.
    return state.a / state.s_t - xp.log(state.s_t) + (xp.log(state.s_s) + (state.m_s - state.m_s))
