"""Terms of one distribution per row, what is made of them, and the gradient that goes with it."""

# T = tokens (rows), V = vocabulary or a piece of it, K = targets of a row, z = logits (after softcap and temperature)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, Self, TypeVar

from loss_core.row_terms.guarded import Array, Namespace, relative, weighted


class RowTerms(NamedTuple):
    """Terms of one distribution over a piece of the vocabulary.

    Rows have one target, t of shape [...], or K of them, [..., K]. Then m, s and e are of the other columns alone: what
    is left beside K targets may be less than the rounding of a sum with them. There is no z_sum of such rows.

    Attributes:
        m: max of z, -inf for an empty piece.
        s: sum of exp(z - m).
        t: z of each target, -inf where another piece owns it.
        z_sum: sum of z; None where it is not needed.
        e: sum of exp(z - m) * (z - m); None where it is not needed.
    """

    m: Array
    s: Array
    t: Array
    z_sum: Array = None
    e: Array = None


class Sums(NamedTuple):
    """Which terms are needed beside m, s and t."""

    z_sum: bool = False
    e: bool = False


class Coefficients(NamedTuple):
    """Gradient of a row by z: exp(z - m) * (scale + slope * (z - m)) - uniform, but `target` at each target's column.

    Attributes:
        scale: factor of exp(z - m).
        target: the gradient at the columns of the targets, shape of t.
        uniform: taken off every column; None for 0.
        slope: factor of exp(z - m) * (z - m), which is 0 where exp(z - m) is; None for 0.
        factor: of all of them, a scalar array; None for 1.
    """

    scale: Array
    target: Array
    uniform: Array | None = None
    slope: Array | None = None
    factor: Array | None = None

    def of_rows(self, at: Any) -> Coefficients:
        """Those of some rows."""
        scale, target, uniform, slope = (None if x is None else x[at] for x in self[:4])
        return Coefficients(scale, target, uniform, slope, self.factor)


Named = TypeVar("Named", bound="tuple[Any, ...]")


class Objective(Protocol):
    """What a loss is to a row: numbers made of its terms, and the coefficients of their gradient.

    A NamedTuple of options, hashable but for arrays that it holds; see `is_objective`.
    """

    @property
    def sums(self) -> Sums:
        """Which terms its values and coefficients are made of."""
        ...

    @property
    def num_values(self) -> int:
        """How many numbers of a row there are."""
        ...

    @property
    def headroom(self) -> int:
        """Binary digits by which an entry of the gradient may be larger than the upstream gradient of its row."""
        ...

    def of_rows(self, at: Any) -> Self:
        """That of some rows."""
        ...

    def values(self, xp: Namespace, terms: RowTerms) -> tuple[Array, ...]:
        """The numbers of each row, [...] each."""
        ...

    def coefficients(self, xp: Namespace, terms: RowTerms, upstreams: Sequence[Array]) -> Coefficients:
        """Coefficients of the gradient of the sum of upstream * value.

        Args:
            terms: without z_sum in a backward.
            upstreams: [...] for each value; None for 0.
        """
        ...


def is_objective(cls: type[Named]) -> type[Named]:
    """Class decorator of an objective: one of another class is another, though both hold the same numbers.

    NamedTuples would be equal, and jax.jit would take the program of one for the other.
    """
    made: Any = cls
    made.__eq__ = lambda a, b: type(a) is type(b) and tuple(a) == tuple(b)
    made.__ne__ = lambda a, b: type(a) is not type(b) or tuple(a) != tuple(b)
    made.__hash__ = lambda a: hash((cls, *a))
    return cls


# In place of those of an ignored row: finite, so that its NaN reaches nothing behind them.
IGNORED_ROW = RowTerms(m=0.0, s=1.0, t=0.0, z_sum=0.0, e=0.0)

# Terms of a piece without classes: the identity of `combine`.
EMPTY_ROW = RowTerms(m=-float("inf"), s=0.0, t=-float("inf"), z_sum=0.0, e=0.0)


def combine(xp: Namespace, a: RowTerms, b: RowTerms) -> RowTerms:
    """Terms of two pieces as one. Associative and commutative up to rounding."""
    m = xp.maximum(a.m, b.m)
    s = a.s * xp.exp(relative(xp, a.m, m)) + b.s * xp.exp(relative(xp, b.m, m))
    z_sum = None if a.z_sum is None else a.z_sum + b.z_sum
    e = None if a.e is None else _moved_e(xp, a, m) + _moved_e(xp, b, m)
    return RowTerms(m, s, xp.maximum(a.t, b.t), z_sum, e)


def log_sum_exp(xp: Namespace, terms: RowTerms) -> Array:
    """Log-sum-exp of the logits of each row."""
    return terms.m + xp.log(terms.s)


def entropy(xp: Namespace, terms: RowTerms) -> Array:
    """Entropy of the distribution, from terms with e."""
    return xp.log(terms.s) - terms.e / terms.s


def with_target(
    xp: Namespace, terms: RowTerms, added: Array, scale: Array, uniform: Array | None = None, slope: Array | None = None
) -> Coefficients:
    """Coefficients of a gradient to which something is added at the column of the one target."""
    x = relative(xp, terms.t, terms.m)
    power = xp.exp(x)
    target = power * scale + added
    if slope is not None:
        target = target + weighted(xp, power, x) * slope
    return Coefficients(scale, target if uniform is None else target - uniform, uniform, slope)


def _moved_e(xp: Namespace, piece: RowTerms, m: Array) -> Array:
    """e of a piece, relative to another maximum."""
    shift = relative(xp, piece.m, m)
    scale = xp.exp(shift)
    # Weight 0 times an infinite shift must be 0: such a piece holds no probability.
    return scale * (piece.e + piece.s * xp.where(scale == 0, xp.zeros_like(scale), shift))
