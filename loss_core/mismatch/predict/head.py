"""The log-probabilities that a head gives if it is computed in a given precision by a given formula, as intervals.

The formula is log softmax(softcap(scale (h W' + b)) / temperature) at the label.

Every system that computes in that way lies within them, whatever the order of its sums: each rounding that is known is
carried out, and the others are bounded with the pieces of `loss_core.losses.bounds.rounding`.
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

# Numbers of lm_weight that are held in float64 at a time.
_BLOCK = 2**24

Array = NDArray[Any]


class Formula(NamedTuple):
    """What is computed from the product of hidden states and head.

    Attributes:
        temperature, logit_softcapping, logit_scale: 1, 0 and 1 change nothing.
        bias: whether lm_bias is added, where there is one.
        extra_columns: zeros that take part in the softmax beside the V logits; negative: the last columns left out.
        label_shift: the log-probability is that of the label so many positions later.
        position_shift: the log-probability stands so many positions later in the array.
    """

    temperature: float = 1.0
    logit_softcapping: float = 0.0
    logit_scale: float = 1.0
    bias: bool = True
    extra_columns: int = 0
    label_shift: int = 0
    position_shift: int = 0


def with_number(formula: Formula, name: str, value: float) -> Formula:
    """The formula with another value of the number of this name."""
    replaced: dict[str, Any] = {name: value}
    return formula._replace(**replaced)


class Products(NamedTuple):
    """Hidden states times head, of operands that were rounded to one format.

    Attributes:
        products_TV: exact sums over H.
        spread_TV: root of the sum of the products' squares, float32.
        bias_V: rounded likewise; zeros where there is none.
        unit: of the sums in float32: error of one addition, relative to its result.
    """

    products_TV: Floats
    spread_TV: NDArray[np.float32]
    bias_V: Floats
    unit: float

    def rows(self, part: slice) -> Products:
        return self._replace(products_TV=self.products_TV[part], spread_TV=self.spread_TV[part])


def products(hidden_TH: Array, weight_VH: Array, bias_V: Array | None, operands: str) -> Products:
    """Hidden states [T, H] times weight [V, H], with the operands rounded to a format of `rounded_operand`.

    Matrix engines, which take operands of fewer than 32 bits, may cut a sum's last bits off instead of rounding them:
    2 u instead of u.
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
    """Logits [T, V] as the product stores them.

    A sum of n = H + 1 numbers is off by the errors of its partial sums, each u |partial sum|: together by sum_growth(n)
    u times their size. In any order that has nothing to do with the values, a partial sum of k of n numbers x is k/n of
    the whole sum, give or take a variance of at most sum x^2 / 4 (sampling without replacement): |sum x| +
    SUM_GROWTH / 2 sqrt(sum x^2) bounds it. The worst order (all positive terms first) would give sum |x|, which is some
    sqrt(n) times larger and would hide TF32 behind float32.
    """
    bias_V = raw.bias_V if bias else np.zeros_like(raw.bias_V)
    logits_TV = raw.products_TV + bias_V
    sizes_TV = np.abs(finite(logits_TV)) + SUM_GROWTH / 2 * (raw.spread_TV + np.abs(finite(bias_V)))
    exact = Interval(logits_TV, logits_TV, logits_TV)
    return exact.widened(sum_growth(hidden + 1) * raw.unit * sizes_TV).rounded(precision.logits)


def log_probs(logits: Interval, labels_T: NDArray[np.int64], precision: Precision, formula: Formula) -> Interval:
    """Log-probability of each label [T], from stored logits [T, V]."""
    z = _with_columns(_scaled(logits, precision.steps, formula), formula.extra_columns)
    return log_softmax_at(z, labels_T, precision.result, precision.softmax)


def _scaled(z: Interval, fmt: str, formula: Formula) -> Interval:
    """Scale, softcap and temperature, each step stored in a format."""
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
