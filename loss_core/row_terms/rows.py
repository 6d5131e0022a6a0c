"""Terms of one distribution per row, how they merge, and the coefficients of the gradient."""

# T = tokens (rows), V = vocabulary or a piece of it, K = targets of a row, z = logits (after softcap and temperature)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, Self, TypeVar

from loss_core.row_terms.guarded import Array, Namespace, relative, weighted


class RowTerms(NamedTuple):
    """Terms of one distribution over a piece of the vocabulary.

    Rows have one target (t has shape [...]) or K targets ([..., K]). With K targets, m, s and e cover the other columns
    only, since the probability outside the targets may be smaller than the rounding of a sum that includes them, and
    z_sum is not available.

    Attributes:
        m: max of z, -inf for an empty piece.
        s: sum of exp(z - m).
        t: z of each target, -inf where another piece owns it.
        z_sum: sum of z; None if not needed.
        e: sum of exp(z - m) * (z - m); None if not needed.
    """

    m: Array
    s: Array
    t: Array
    z_sum: Array = None
    e: Array = None


class Sums(NamedTuple):
    """Which optional terms to compute in addition to m, s and t."""

    z_sum: bool = False
    e: bool = False


class Coefficients(NamedTuple):
    """Gradient of a row by z: exp(z - m) * (scale + slope * (z - m)) - uniform, and `target` at the targets' columns.

    Attributes:
        scale: factor of exp(z - m).
        target: gradient at the columns of the targets, shape of t.
        uniform: subtracted from the other columns; None for 0.
        slope: factor of exp(z - m) * (z - m), which is 0 where exp(z - m) is 0; None for 0.
        factor: scalar array that multiplies the gradient; None for 1.
    """

    scale: Array
    target: Array
    uniform: Array | None = None
    slope: Array | None = None
    factor: Array | None = None

    def of_rows(self, at: Any) -> Coefficients:
        """The coefficients of the rows `at` (an index, mask or slice)."""
        scale, target, uniform, slope = (None if x is None else x[at] for x in self[:4])
        return Coefficients(scale, target, uniform, slope, self.factor)


Named = TypeVar("Named", bound="tuple[Any, ...]")


class Objective(Protocol):
    """A loss of one row: its values, computed from row terms, and the coefficients of their gradient.

    A NamedTuple of options, decorated with `is_objective`; hashable unless it holds arrays.
    """

    @property
    def sums(self) -> Sums:
        """Which optional terms the values and coefficients need."""
        ...

    @property
    def num_values(self) -> int:
        """Number of values per row."""
        ...

    @property
    def headroom(self) -> int:
        """Number of bits by which a gradient entry may exceed the upstream gradient of its row."""
        ...

    def of_rows(self, at: Any) -> Self:
        """The objective of the rows `at` (an index, mask or slice)."""
        ...

    def values(self, xp: Namespace, terms: RowTerms) -> tuple[Array, ...]:
        """The values of each row, [...] each."""
        ...

    def coefficients(self, xp: Namespace, terms: RowTerms, upstreams: Sequence[Array]) -> Coefficients:
        """Coefficients of the gradient of sum(upstream * value).

        Args:
            terms: z_sum may be None, as it is in the backward.
            upstreams: upstream gradient [...] of each value; None for 0.
        """
        ...


def is_objective(cls: type[Named]) -> type[Named]:
    """Class decorator of an objective: equality and hash include the class.

    Plain NamedTuples of different classes compare equal if their fields do, and jax.jit would then reuse the program
    compiled for one objective for the other.
    """
    decorated: Any = cls
    decorated.__eq__ = lambda a, b: type(a) is type(b) and tuple(a) == tuple(b)
    decorated.__ne__ = lambda a, b: type(a) is not type(b) or tuple(a) != tuple(b)
    decorated.__hash__ = lambda a: hash((cls, *a))
    return cls


# Replaces the terms of an ignored row: finite values, so that NaN in its logits does not propagate.
IGNORED_ROW = RowTerms(m=0.0, s=1.0, t=0.0, z_sum=0.0, e=0.0)

# Terms of an empty piece: the identity of `combine`.
EMPTY_ROW = RowTerms(m=-float("inf"), s=0.0, t=-float("inf"), z_sum=0.0, e=0.0)


def combine(xp: Namespace, a: RowTerms, b: RowTerms) -> RowTerms:
    """Merge the terms of two pieces of a row. Associative and commutative up to rounding."""
    m = xp.maximum(a.m, b.m)
    s = a.s * xp.exp(relative(xp, a.m, m)) + b.s * xp.exp(relative(xp, b.m, m))
    z_sum = None if a.z_sum is None else a.z_sum + b.z_sum
    e = None if a.e is None else _rescaled_e(xp, a, m) + _rescaled_e(xp, b, m)
    return RowTerms(m, s, xp.maximum(a.t, b.t), z_sum, e)


def log_sum_exp(xp: Namespace, terms: RowTerms) -> Array:
    """Log-sum-exp of the logits of each row."""
    return terms.m + xp.log(terms.s)


def entropy(xp: Namespace, terms: RowTerms) -> Array:
    """Entropy of each row in nats; needs e."""
    return xp.log(terms.s) - terms.e / terms.s


def with_target(
    xp: Namespace, terms: RowTerms, added: Array, scale: Array, uniform: Array | None = None, slope: Array | None = None
) -> Coefficients:
    """Coefficients for rows with one target; `added` is added to the gradient at the target's column."""
    x = relative(xp, terms.t, terms.m)
    exp_x = xp.exp(x)
    target = exp_x * scale + added
    if slope is not None:
        target = target + weighted(xp, exp_x, x) * slope
    return Coefficients(scale, target if uniform is None else target - uniform, uniform, slope)


def _rescaled_e(xp: Namespace, piece: RowTerms, m: Array) -> Array:
    """e of a piece, rescaled to the maximum m."""
    shift = relative(xp, piece.m, m)
    scale = xp.exp(shift)
    # 0 times an infinite shift must be 0: such a piece holds no probability.
    return scale * (piece.e + piece.s * xp.where(scale == 0, xp.zeros_like(scale), shift))
