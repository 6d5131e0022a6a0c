"""Intervals of a head's log-probabilities, for a given precision and formula.

The formula is log softmax(softcap(scale (h W' + b)) / temperature) at the label.

Every system that computes in that way is within them, whatever the order of its sums: known roundings are applied, and
the others are bounded with the parts of `loss_core.losses.bounds.rounding`.
"""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loss_core.losses.bounds.rounding import SUM_GROWTH, TANH_ULPS, finite, sum_growth
from loss_core.mismatch.predict.interval import FLOAT32, Floats, Interval
from loss_core.mismatch.predict.log_softmax import log_softmax_at
from loss_core.mismatch.predict.precision import Precision, rounded_operand

# How many elements of lm_weight are converted to float64 at a time.
_BLOCK = 2**24

Array = NDArray[Any]


class Formula(NamedTuple):
    """How log-probabilities are computed from the product of hidden states and head.

    Attributes:
        temperature, logit_softcapping, logit_scale: 1, 0 and 1 are neutral.
        bias: whether lm_bias is added, if there is one.
        extra_columns: count of zeros in the softmax after the V logits; negative: count of excluded last columns.
        label_shift: the log-probability is that of the label so many positions later.
        position_shift: the log-probability is stored so many positions later.
    """

    temperature: float = 1.0
    logit_softcapping: float = 0.0
    logit_scale: float = 1.0
    bias: bool = True
    extra_columns: int = 0
    label_shift: int = 0
    position_shift: int = 0


def with_parameter(formula: Formula, name: str, value: float) -> Formula:
    """The formula with another value of the field `name`."""
    replaced: dict[str, Any] = {name: value}
    return formula._replace(**replaced)


class Products(NamedTuple):
    """Hidden states times head, with operands rounded to one format.

    Attributes:
        products_TV: exact sums over H.
        spread_TV: square root of the sum of the squared products, float32.
        bias_V: rounded to the same format; zeros without a bias.
        unit: relative error of one addition of the float32 sums.
    """

    products_TV: Floats
    spread_TV: NDArray[np.float32]
    bias_V: Floats
    unit: float

    def rows(self, part: slice) -> Products:
        return self._replace(products_TV=self.products_TV[part], spread_TV=self.spread_TV[part])


def products(hidden_TH: Array, weight_VH: Array, bias_V: Array | None, operands: str) -> Products:
    """Hidden states [T, H] times weight [V, H], with the operands rounded to a format of `rounded_operand`.

    Matrix engines, whose operands have fewer than 32 bits, may truncate a sum instead of rounding it: 2 u instead of u.
    """
    vocab, hidden = weight_VH.shape
    h_TH = rounded_operand(hidden_TH, operands)
    h2_TH = np.square(h_TH).astype(np.float32)
    products_TV, squares_TV = np.empty((len(h_TH), vocab)), np.empty((len(h_TH), vocab), np.float32)
    rows = max(1, _BLOCK // hidden)
    for start in range(0, vocab, rows):
        block = slice(start, start + rows)
        w_VH = rounded_operand(weight_VH[block], operands)
        products_TV[:, block] = h_TH @ w_VH.T
        squares_TV[:, block] = h2_TH @ np.square(w_VH).astype(np.float32).T
    rounded_V = np.zeros(vocab) if bias_V is None else rounded_operand(bias_V, operands)
    unit = FLOAT32.u if operands == FLOAT32.name else 2 * FLOAT32.u
    return Products(products_TV, np.sqrt(squares_TV), rounded_V, unit)


def stored_logits(raw: Products, precision: Precision, bias: bool, hidden: int) -> Interval:
    """Intervals of the logits [T, V], in the format in which the product stores them.

    The error of a sum of n = H + 1 numbers is that of its partial sums, each u |partial sum|: sum_growth(n) u times
    their size in total. In any order that is independent of the values, a partial sum of k of n numbers x has mean k/n
    of the full sum and a variance of at most sum x^2 / 4 (sampling without replacement): |sum x| +
    SUM_GROWTH / 2 sqrt(sum x^2) bounds it. The worst order (all positive terms first) would give sum |x|, which is
    about sqrt(n) times larger and would make TF32 indistinguishable from float32.
    """
    bias_V = raw.bias_V if bias else np.zeros_like(raw.bias_V)
    logits_TV = raw.products_TV + bias_V
    sizes_TV = np.abs(finite(logits_TV)) + SUM_GROWTH / 2 * (raw.spread_TV + np.abs(finite(bias_V)))
    exact = Interval(logits_TV, logits_TV, logits_TV)
    return exact.widened(sum_growth(hidden + 1) * raw.unit * sizes_TV).rounded(precision.logits)


def log_probs(logits: Interval, labels_T: NDArray[np.int64], precision: Precision, formula: Formula) -> Interval:
    """Intervals of the labels' log-probabilities [T], from stored logits [T, V]."""
    z = _with_columns(_scaled(logits, precision.steps, formula), formula.extra_columns)
    return log_softmax_at(z, labels_T, precision.result, precision.softmax)


def _scaled(z: Interval, fmt: str, formula: Formula) -> Interval:
    """Scale, softcap and temperature, with each result stored in a format."""
    scale, cap, temperature = formula.logit_scale, formula.logit_softcapping, formula.temperature
    if scale != 1:
        # The scale itself may have been rounded, or be the inverse of a divisor.
        z = z.step(lambda x: x * scale, 2, fmt)
    if cap != 0:
        z = z.step(lambda x: x / cap, 1, fmt).step(np.tanh, TANH_ULPS - 2, fmt).step(lambda x: x * cap, 1, fmt)
    if temperature != 1:
        z = z.step(lambda x: x / temperature, 2, fmt)
    return z


def _with_columns(z: Interval, extra: int) -> Interval:
    if extra < 0:
        return z.map(lambda z_TV: z_TV[:, :extra])
    return z.map(lambda z_TV: np.pad(z_TV, ((0, 0), (0, extra)))) if extra else z
