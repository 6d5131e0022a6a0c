"""Row terms: the few sums over the vocabulary that every loss and gradient of a row is made of.

Terms of pieces of a row (kernel blocks, vocabulary tiles, tensor-parallel ranks, scans) fold with `combine`. A loss is
two functions of terms: its value, and the coefficients of its gradient. Both are [T]-sized and are written here once,
over an array namespace `xp`: `numpy`, `torch` or `jax.numpy`. Kernels make terms, and a gradient from coefficients;
they know no losses.

Arrays have one shape `[...]` (one entry per row) and the dtype of the arithmetic; those of rows with K targets,
`[..., K]`.
"""

# T = tokens (rows), V = vocabulary or a piece of it, K = targets of a row, z = logits (after softcap and temperature)

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Array = Any
Namespace = Any


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


class TopK(NamedTuple):
    """Distillation is meant, from a teacher of which the log-probabilities of the row's K targets are known.

    Attributes:
        log_p: [..., K], -inf for a probability of 0.
        tail: whether all other classes together are one more class, whose probability is what is left.
    """

    log_p: Array
    tail: bool

    @property
    def sums(self) -> Sums:
        """What its value and coefficients are made of."""
        return Sums()

    def of_rows(self, at: Any) -> TopK:
        """That of some rows."""
        return self._replace(log_p=self.log_p[at])


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


# In place of those of an ignored row: finite, so that its NaN reaches nothing behind them.
IGNORED_ROW = RowTerms(m=0.0, s=1.0, t=0.0, z_sum=0.0, e=0.0)

# Terms of a piece without classes: the identities of `combine` and `combine_pairs`.
EMPTY_ROW = RowTerms(m=-float("inf"), s=0.0, t=-float("inf"), z_sum=0.0, e=0.0)
EMPTY_PAIR = PairTerms(m_t=-float("inf"), s_t=0.0, a=0.0, m_s=-float("inf"), s_s=0.0)


def combine(xp: Namespace, a: RowTerms, b: RowTerms) -> RowTerms:
    """Terms of two pieces as one. Associative and commutative up to rounding."""
    m = xp.maximum(a.m, b.m)
    s = a.s * xp.exp(_shift(xp, a.m, m)) + b.s * xp.exp(_shift(xp, b.m, m))
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


def log_sum_exp(xp: Namespace, terms: RowTerms) -> Array:
    """Log-sum-exp of the logits of each row."""
    return terms.m + xp.log(terms.s)


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


def coefficients_of(xp: Namespace, terms: RowTerms, upstream: Array, objective: Objective | TopK) -> Coefficients:
    """Coefficients of the gradient of upstream * the loss that is meant."""
    if isinstance(objective, TopK):
        return top_k_coefficients(xp, terms, upstream, objective)
    return cross_entropy_coefficients(xp, terms, upstream, objective)


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


def top_k_distillation(xp: Namespace, terms: RowTerms, teacher: TopK) -> Array:
    """KL(teacher || student) per row over the K targets, and with a tail over the class of all others.

    Without one: the sum of p (log p - log q) over the K targets, with p and q as they are, not renormalised. From
    terms with K targets; +inf for a class that the teacher allows and the student rules out.
    """
    p, p_tail = _teacher(xp, teacher)
    log_q, log_rest = _student(xp, terms)
    loss = xp.sum(_weighted(xp, p, teacher.log_p - log_q), -1)
    return loss if p_tail is None else loss + _weighted(xp, p_tail, _log(xp, p_tail) - log_rest)


def top_k_coefficients(xp: Namespace, terms: RowTerms, upstream: Array, teacher: TopK) -> Coefficients:
    """Coefficients of the gradient of upstream * `top_k_distillation` by the student's z.

    With q_v = exp(z_v - m) rest / s for the other classes, rest = 1 - sum q_k, and W the sum of all p that count:
    W q_k - p_k at the targets, and W q_v - p_tail q_v / rest elsewhere, which is exp(z_v - m) (W rest - p_tail) / s:
    nothing is divided by what is left of q.
    """
    p, p_tail = _teacher(xp, teacher)
    log_q, log_rest = _student(xp, terms)
    weight = xp.sum(p, -1) if p_tail is None else xp.sum(p, -1) + p_tail
    pull = weight * xp.exp(log_rest) if p_tail is None else weight * xp.exp(log_rest) - p_tail
    # No other class has a logit above -inf: their exp(z - m) is 0, and so is to be the gradient.
    none = terms.s == 0
    scale = xp.where(none, xp.zeros_like(pull), upstream * pull / xp.where(none, xp.ones_like(terms.s), terms.s))
    return Coefficients(scale, upstream[..., None] * (weight[..., None] * xp.exp(log_q) - p))


def top_k_teacher_gradient(xp: Namespace, terms: RowTerms, teacher: TopK) -> Array:
    """Gradient of `top_k_distillation` by log_p, [..., K]: the tail's probability is 1 - sum p.

    Where nothing is left for a tail, it counts for nothing here as well.
    """
    p, p_tail = _teacher(xp, teacher)
    log_q, log_rest = _student(xp, terms)
    ratio = teacher.log_p - log_q
    if p_tail is None:
        return _weighted(xp, p, ratio + 1.0)
    of_tail = xp.where(p_tail == 0, xp.full_like(p_tail, -1.0), _log(xp, p_tail) - log_rest)
    return _weighted(xp, p, ratio - of_tail[..., None])


_METRICS: dict[str, Callable[[Namespace, RowTerms, Objective], Array]] = {
    "accuracy": _accuracy,
    "entropy": lambda xp, terms, _: entropy(xp, terms),
    "lse": lambda xp, terms, _: log_sum_exp(xp, terms),
    "z_loss": lambda xp, terms, objective: objective.z_loss * log_sum_exp(xp, terms) ** 2,
}


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


def _with_target(
    xp: Namespace, terms: RowTerms, added: Array, scale: Array, uniform: Array | None = None, slope: Array | None = None
) -> Coefficients:
    """Coefficients of a gradient to which something is added at the column of the one target."""
    x = _shift(xp, terms.t, terms.m)
    power = xp.exp(x)
    target = power * scale + added
    if slope is not None:
        target = target + _weighted(xp, power, x) * slope
    return Coefficients(scale, target if uniform is None else target - uniform, uniform, slope)


def _teacher(xp: Namespace, teacher: TopK) -> tuple[Array, Array | None]:
    """p of the K targets [..., K], and of the tail [...] where it counts, which rounding may not make negative."""
    p = xp.exp(teacher.log_p)
    return p, xp.clip(1.0 - xp.sum(p, -1), 0.0, None) if teacher.tail else None


def _student(xp: Namespace, terms: RowTerms) -> tuple[Array, Array]:
    """log q of the K targets [..., K], and of the other classes together [...]; -inf where there is none."""
    t = terms.t
    m = xp.maximum(terms.m, xp.amax(t, -1))
    x, rest = _shift(xp, t, m[..., None]), _shift(xp, terms.m, m)
    # exp(-inf) of an empty rest meets a sum of 0.
    log_sum = xp.log(xp.sum(xp.exp(x), -1) + terms.s * xp.exp(rest))
    return x - log_sum[..., None], rest + _log(xp, terms.s) - log_sum


def _log(xp: Namespace, x: Array) -> Array:
    """Logarithm, -inf at 0 without a warning, and with a derivative of 0 there."""
    none = x == 0
    return xp.where(none, xp.full_like(x, -float("inf")), xp.log(xp.where(none, xp.ones_like(x), x)))


def _weighted(xp: Namespace, weight: Array, value: Array) -> Array:
    """weight * value, 0 where the weight is, even if the value is inf or NaN."""
    # Inside of the product, so that its derivative is 0 as well.
    return weight * xp.where(weight == 0, xp.zeros_like(value), value)


def _moved_e(xp: Namespace, piece: RowTerms, m: Array) -> Array:
    """e of a piece, relative to another maximum."""
    shift = _shift(xp, piece.m, m)
    scale = xp.exp(shift)
    # Weight 0 times an infinite shift must be 0: such a piece holds no probability.
    return scale * (piece.e + piece.s * xp.where(scale == 0, xp.zeros_like(scale), shift))


def _shift(xp: Namespace, m: Array, new_m: Array) -> Array:
    """m - new_m, with an empty piece (m = -inf) staying -inf; also of logits."""
    # -inf minus -inf is NaN: an empty piece must stay the identity.
    return m - xp.where(new_m == -float("inf"), xp.zeros_like(new_m), new_m)


def _moved(xp: Namespace, piece: PairTerms, m_t: Array, m_s: Array) -> tuple[Array, Array, Array]:
    """(s_t, a, s_s) of a piece, relative to other maxima."""
    shift_t = _shift(xp, piece.m_t, m_t)
    shift_s = _shift(xp, piece.m_s, m_s)
    scale_t = xp.exp(shift_t)
    s_t = piece.s_t * scale_t
    # Weight 0 times an infinite shift must be 0: such a piece holds no teacher probability.
    none = xp.zeros_like(s_t)
    unit = s_t / GAP_UNIT
    moved = unit * xp.where(s_t == 0, none, shift_t) - unit * xp.where(s_t == 0, none, shift_s)
    a = xp.where(scale_t == 0, xp.zeros_like(s_t), piece.a * scale_t) + moved
    return s_t, a, piece.s_s * xp.exp(shift_s)
