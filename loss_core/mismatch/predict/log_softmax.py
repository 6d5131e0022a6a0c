"""Interval of the log-softmax at one column of each row, with none or some of its steps stored in 16 bits."""

# T = tokens, V = vocabulary

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from loss_core.dtypes import round_to
from loss_core.losses.bounds.rounding import (
    EXP_ARGUMENT_ROUNDINGS,
    EXP_ULPS,
    LOG_ULPS,
    log_softmax,
    softmax_errors,
    sum_growth,
)
from loss_core.mismatch.predict.interval import FLOAT32, Interval


def log_softmax_at(z: Interval, labels_T: NDArray[np.int64], fmt: str, stored: tuple[str, ...]) -> Interval:
    """Interval of each label's log-probability [T].

    Args:
        z: logits [T, V].
        fmt: format in which the result is stored.
        stored: the SOFTMAX_STEPS whose results are stored in that format, too.
    """
    at = (np.arange(len(labels_T)), labels_T)
    if not stored:
        return _stored_once(z, at).rounded(fmt)

    def format_of(step: str) -> str:
        return fmt if step in stored else FLOAT32.name

    top = z.map(lambda z_TV: np.max(z_TV, axis=-1, keepdims=True))
    shifted = z.minus(top).rounded(format_of("shifted"))
    exps = shifted.step(np.exp, EXP_ULPS + EXP_ARGUMENT_ROUNDINGS * np.abs(shifted.value), format_of("exp"))
    total = exps.step(lambda e_TV: np.sum(e_TV, axis=-1), sum_growth(exps.value.shape[-1]), format_of("sum"))
    log_total = total.step(np.log, LOG_ULPS, format_of("log"))
    label = shifted.map(lambda x_TV: x_TV[at])
    if "lse" in stored:
        label, top_T = z.map(lambda z_TV: z_TV[at]), top.map(lambda m_T1: m_T1[:, 0])
        log_total = _rounded(top_T.plus(log_total), fmt)
    return _rounded(label.minus(log_total), fmt)


def _stored_once(z: Interval, at: tuple[NDArray[np.intp], NDArray[np.int64]]) -> Interval:
    """Computed in float32 throughout; log p increases with the label's own logit and decreases with every other."""
    low_TV, high_TV = z.high.copy(), z.low.copy()
    low_TV[at], high_TV[at] = z.low[at], z.high[at]
    softmax = softmax_errors(z.value, np.zeros(len(z.value)), FLOAT32)
    value_T = softmax.log_p_TV[at]
    # The label's logit minus the log-sum-exp, as in losses/log_probs.py.
    error_T = softmax.err_lse_T + FLOAT32.u * (3 * np.abs(z.value[at]) + 2 * np.abs(value_T))
    return Interval(log_softmax(low_TV)[at], value_T, log_softmax(high_TV)[at]).widened(error_T)


def _rounded(values: Interval, fmt: str) -> Interval:
    """Round a sum or difference of two numbers to float32, as every platform does, and then to a format."""
    return values.map(lambda x_T: round_to(x_T, FLOAT32.name)).rounded(fmt)
