"""Terms of one distribution per row, and cross entropy, log-probability and entropy as functions of them."""

# T = tokens (rows), V = vocabulary or a piece of it, K = targets of a row, z = logits (after softcap and temperature)

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
    """

    scale: Array
    target: Array
    uniform: Array | None = None
    slope: Array | None = None


class Objective(NamedTuple):
    """Which cross entropy is meant: the options that its value and coefficients depend on.

    Attributes:
        num_classes: V over all pieces.
        label_smoothing: share of the target's probability that is spread over all classes.
        z_loss: factor of log-sum-exp squared, which is added to the loss.
        metrics: whether `token_metrics` will be asked for; m is the maximum itself then.
    """

    num_classes: int
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    metrics: bool = False

    @classmethod
    def of(cls, loss: Any, num_classes: int) -> Objective:
        """That of a loss whose fields are named as the options."""
        return cls(num_classes, **{name: getattr(loss, name) for name in OPTIONS}, metrics=bool(loss.metrics))

    @property
    def options(self) -> dict[str, Any]:
        """What its gradient depends on, by name."""
        return {name: getattr(self, name) for name in OPTIONS}

    @property
    def sums(self) -> Sums:
        """What value, coefficients and metrics are made of."""
        return Sums(z_sum=self.label_smoothing != 0, e=self.metrics)

    def of_rows(self, at: Any) -> Objective:
        """That of some rows."""
        return self


# Fields of an `Objective` that are options of a loss.
OPTIONS = ("label_smoothing", "z_loss")

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


def cross_entropy(xp: Namespace, terms: RowTerms, objective: Objective) -> Array:
    """Cross entropy per row: log-sum-exp minus the target's logit; +inf where no piece owns the target.

    With smoothing e: (1 - e) of it, and e times log-sum-exp minus the mean of all logits. Written relative to the
    maximum, so that a large common offset of the logits costs no digits of the first. With a z-loss l: l times
    log-sum-exp squared more.
    """
    loss = xp.log(terms.s) + (terms.m - terms.t)
    if objective.label_smoothing:
        to_all = xp.log(terms.s) + (terms.m - terms.z_sum / objective.num_classes)
        loss = (1.0 - objective.label_smoothing) * loss + objective.label_smoothing * to_all
    if objective.z_loss:
        loss = loss + objective.z_loss * log_sum_exp(xp, terms) ** 2
    return loss


def cross_entropy_coefficients(xp: Namespace, terms: RowTerms, upstream: Array, objective: Objective) -> Coefficients:
    """Coefficients of the gradient of upstream * `cross_entropy`."""
    scale = upstream / terms.s
    if objective.z_loss:
        scale = scale * (1.0 + 2.0 * objective.z_loss * log_sum_exp(xp, terms))
    if not objective.label_smoothing:
        return _with_target(xp, terms, -upstream, scale)
    smoothing = objective.label_smoothing
    uniform = upstream * (smoothing / objective.num_classes)
    return _with_target(xp, terms, upstream * (smoothing - 1.0), scale, uniform)


def log_sum_exp(xp: Namespace, terms: RowTerms) -> Array:
    """Log-sum-exp of the logits of each row."""
    return terms.m + xp.log(terms.s)


def log_probability(xp: Namespace, terms: RowTerms) -> Array:
    """Log-probability of the target; -inf where no piece owns it."""
    return (terms.t - terms.m) - xp.log(terms.s)


def entropy(xp: Namespace, terms: RowTerms) -> Array:
    """Entropy of the distribution, from terms with e."""
    return xp.log(terms.s) - terms.e / terms.s


def log_probability_coefficients(
    xp: Namespace, terms: RowTerms, upstream: Array, upstream_entropy: Array | None
) -> Coefficients:
    """Coefficients of the gradient of upstream * `log_probability` + upstream_entropy * `entropy`.

    That of the entropy is -p (log p + entropy), and log p + entropy is (z - m) - e / s.
    """
    scale = -upstream / terms.s
    if upstream_entropy is None:
        return _with_target(xp, terms, upstream, scale)
    share = upstream_entropy / terms.s
    return _with_target(xp, terms, upstream, scale + share * (terms.e / terms.s), slope=-share)


def token_metrics(xp: Namespace, terms: RowTerms, objective: Objective, names: Sequence[str]) -> list[Array]:
    """Per row, what a training loop likes to see beside the loss; see `MaskedCrossEntropyConfig.metrics`.

    Args:
        names: among "accuracy", "entropy", "lse", "z_loss".
    """
    return [_METRICS[name](xp, terms, objective) for name in names]


def _accuracy(xp: Namespace, terms: RowTerms, objective: Objective) -> Array:
    """1 where no logit is above the target's; the two may come from one logit by two roundings of softcap or bias."""
    rounding = 4.0 * xp.finfo(terms.m.dtype).eps * xp.abs(terms.m)
    return xp.where(terms.m - terms.t <= rounding, xp.ones_like(terms.m), xp.zeros_like(terms.m))


_METRICS: dict[str, Callable[[Namespace, RowTerms, Objective], Array]] = {
    "accuracy": _accuracy,
    "entropy": lambda xp, terms, _: entropy(xp, terms),
    "lse": lambda xp, terms, _: log_sum_exp(xp, terms),
    "z_loss": lambda xp, terms, objective: objective.z_loss * log_sum_exp(xp, terms) ** 2,
}


def _with_target(
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
