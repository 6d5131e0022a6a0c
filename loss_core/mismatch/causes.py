"""Possible causes of a mismatch other than precision: variations of the formula, one function for each kind."""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from loss_core.mismatch.dump import Dump
from loss_core.mismatch.predict.head import Formula, with_parameter

# Inference engines and trainers pad a vocabulary to a multiple of one of these.
PAD_MULTIPLES = (64, 128, 256, 512)

# Softcaps of logits that models use (Gemma 2 and Grok-1: 30). Where logits are small or rounded coarsely, a softcap
# can't be estimated, but these can be distinguished from none.
COMMON_SOFTCAPS = (15.0, 30.0, 50.0)


class Cause(NamedTuple):
    """A formula to try.

    Attributes:
        name: its difference from the recorded formula, for reports.
        advice: what to do about it; "" for the recorded formula.
    """

    name: str
    advice: str
    formula: Formula


RECORDED = "as recorded"


def recorded(dump: Dump) -> Formula:
    """The formula recorded in the dump."""
    return Formula(dump.temperature, dump.logit_softcapping, dump.logit_scale)


def causes_of(dump: Dump) -> list[Cause]:
    """The recorded formula, and its variations in one point each that need no estimate."""
    formula = recorded(dump)
    found = [Cause(RECORDED, "", formula)]
    for variations in (_omitted, _common_softcaps, _shifted, _other_columns):
        found += variations(dump, formula)
    return found


def _omitted(dump: Dump, formula: Formula) -> Iterator[Cause]:
    """Each recorded parameter, and the bias, not applied."""
    for name in ("temperature", "logit_softcapping", "logit_scale"):
        value, neutral = getattr(formula, name), Formula._field_defaults[name]
        if value != neutral:
            without = with_parameter(formula, name, neutral)
            yield Cause(f"without {name} {value:g}", f"apply {name} {value:g} here, or drop it elsewhere", without)
    if formula.logit_scale != 1:
        inverse = 1 / formula.logit_scale
        yield Cause(
            f"logits divided by logit_scale {formula.logit_scale:g}",
            "multiply the logits by logit_scale",
            formula._replace(logit_scale=inverse),
        )
    if dump.lm_bias is not None:
        yield Cause("without lm_bias", "add lm_bias to the logits", formula._replace(bias=False))


def with_value(formula: Formula, name: str, value: float) -> Cause:
    """The cause that one parameter of the formula has another value."""
    recorded = getattr(formula, name)
    was = f"{recorded:g}" if recorded else "none"
    also = ""
    if name == "temperature" and not formula.logit_softcapping:
        also = f" (the same as a logit_scale of {formula.logit_scale / value * formula.temperature:.4g})"
    return Cause(
        f"{name} {value:.6g} instead of {was}{also}",
        f"use one {name} in both systems: here it is {value:.6g}, recorded is {was}",
        with_parameter(formula, name, value),
    )


def _common_softcaps(dump: Dump, formula: Formula) -> Iterator[Cause]:
    """`COMMON_SOFTCAPS` other than the recorded one."""
    for cap in COMMON_SOFTCAPS:
        if cap != formula.logit_softcapping:
            yield with_value(formula, "logit_softcapping", cap)


def _shifted(dump: Dump, formula: Formula) -> Iterator[Cause]:
    """Labels, or log-probabilities, shifted by one position along the sequence."""
    if dump.labels.shape[-1] == 1:
        return
    for shift, word in ((1, "later"), (-1, "earlier")):
        yield Cause(
            f"labels of one position {word}",
            "align the labels with the hidden states: labels[t] is the token that hidden_states[t] predicts",
            formula._replace(label_shift=shift),
        )
        yield Cause(
            f"log-probabilities written one position {word}",
            "align the log-probabilities with the labels",
            formula._replace(position_shift=shift),
        )


def _other_columns(dump: Dump, formula: Formula) -> Iterator[Cause]:
    """A vocabulary with more or fewer columns in the softmax."""
    weight = np.asarray(dump.lm_weight)
    for extra in dict.fromkeys(-len(weight) % multiple for multiple in PAD_MULTIPLES):
        if extra:
            yield Cause(
                f"{extra} columns of zeros take part in the softmax (a vocabulary padded to {len(weight) + extra:,})",
                "mask the padded columns with -inf before the log-softmax",
                formula._replace(extra_columns=extra),
            )
    used = np.flatnonzero(weight.any(axis=1))
    padding = len(weight) - (int(used[-1]) + 1 if used.size else 0)
    if 0 < padding < len(weight):
        yield Cause(
            f"without the last {padding} rows of lm_weight, which are zeros",
            f"decide in both systems whether the last {padding} columns take part in the softmax",
            formula._replace(extra_columns=-padding),
        )
