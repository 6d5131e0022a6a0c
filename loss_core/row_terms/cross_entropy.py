"""Cross entropy with its options, and per-token metrics, as functions of row terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from loss_core.row_terms.guarded import Array, Namespace
from loss_core.row_terms.rows import Coefficients, RowTerms, Sums, entropy, is_objective, log_sum_exp, with_target

# Config fields that are options of the objective.
OPTIONS = ("label_smoothing", "z_loss")


@is_objective
class CrossEntropy(NamedTuple):
    """An `Objective`: log-sum-exp minus the target's logit; +inf where no piece owns the target.

    Attributes:
        num_classes: V, over all pieces.
        label_smoothing: share of the target's probability that is spread evenly over all classes.
        z_loss: factor of the squared log-sum-exp that is added to the loss.
        metrics: whether `token_metrics` will be called; m must then be the exact maximum, not an approximate one.
    """

    num_classes: int
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    metrics: bool = False

    @classmethod
    def of(cls, loss: Any, num_classes: int) -> CrossEntropy:
        """The objective of a loss or config; an option that it has no field for takes its default."""
        options: dict[str, Any] = {name: getattr(loss, name, cls._field_defaults[name]) for name in OPTIONS}
        return cls(num_classes, **options, metrics=bool(getattr(loss, "metrics", ())))

    @property
    def options(self) -> dict[str, Any]:
        """The options that the gradient depends on, by name."""
        return {name: getattr(self, name) for name in OPTIONS}

    @property
    def sums(self) -> Sums:
        return Sums(z_sum=self.label_smoothing != 0, e=self.metrics)

    @property
    def num_values(self) -> int:
        return 1

    @property
    def headroom(self) -> int:
        # Bits of 1 + 2 l 2^14 for a z-loss factor l: the log-sum-exp of float16 logits is hardly above 2^14.
        return math.ceil(math.log2(1.0 + 2.0**15 * self.z_loss))

    def of_rows(self, at: Any) -> CrossEntropy:
        return self

    def values(self, xp: Namespace, terms: RowTerms) -> tuple[Array]:
        """The loss of each row.

        With smoothing e: (1 - e) times the cross entropy, plus e times (log-sum-exp minus the mean logit). Both are
        computed relative to the maximum, so that a large common offset of the logits costs no precision. With a z-loss
        factor l: plus l times log-sum-exp squared.
        """
        loss = xp.log(terms.s) + (terms.m - terms.t)
        if self.label_smoothing:
            to_all = xp.log(terms.s) + (terms.m - terms.z_sum / self.num_classes)
            loss = (1.0 - self.label_smoothing) * loss + self.label_smoothing * to_all
        if self.z_loss:
            loss = loss + self.z_loss * log_sum_exp(xp, terms) ** 2
        return (loss,)

    def coefficients(self, xp: Namespace, terms: RowTerms, upstreams: Sequence[Array]) -> Coefficients:
        (upstream,) = upstreams
        scale = upstream / terms.s
        if self.z_loss:
            scale = scale * (1.0 + 2.0 * self.z_loss * log_sum_exp(xp, terms))
        if not self.label_smoothing:
            return with_target(xp, terms, -upstream, scale)
        uniform = upstream * (self.label_smoothing / self.num_classes)
        return with_target(xp, terms, upstream * (self.label_smoothing - 1.0), scale, uniform)


def token_metrics(xp: Namespace, terms: RowTerms, objective: Any, names: Sequence[str]) -> list[Array]:
    """Metrics of each row, one array per name; see `MaskedCrossEntropyConfig.metrics`.

    Args:
        objective: a `CrossEntropy`; unused if names is empty.
        names: among "accuracy", "entropy", "lse", "z_loss".
    """
    return [_METRICS[name](xp, terms, objective) for name in names]


def _accuracy(xp: Namespace, terms: RowTerms, objective: CrossEntropy) -> Array:
    """1 where the target has the largest logit, up to rounding, else 0."""
    # m and t of the same logit may differ: softcap and bias may be rounded differently in the two computations.
    rounding = 4.0 * xp.finfo(terms.m.dtype).eps * xp.abs(terms.m)
    return xp.where(terms.m - terms.t <= rounding, xp.ones_like(terms.m), xp.zeros_like(terms.m))


_METRICS: dict[str, Callable[[Namespace, RowTerms, CrossEntropy], Array]] = {
    "accuracy": _accuracy,
    "entropy": lambda xp, terms, _: entropy(xp, terms),
    "lse": lambda xp, terms, _: log_sum_exp(xp, terms),
    "z_loss": lambda xp, terms, objective: objective.z_loss * log_sum_exp(xp, terms) ** 2,
}
