"""The calls of a check, generated lazily: named cases first, then random ones, then harder ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loss_core.check.calls import Call, config_of, distinct_names, filters_text, reproduce_suffix
from loss_core.check.report import Row
from loss_core.check.sharded import EVEN_SHAPE, can_be_sharded, sharded_calls
from loss_core.loss_config import LossConfig
from loss_core.losses import Case, named_cases
from loss_core.losses.cases.drawing import random_case
from loss_core.losses.cases.recipes import HARDER
from loss_core.losses.definition import need_definition


@dataclass(frozen=True)
class Cases:
    """Which cases of each loss are run.

    Attributes:
        shape: replaces the shapes of the cases; only: names of cases, None for all.
        inputs: arguments of one captured call, which replaces all cases.
        num_random: count of random cases, drawn from `seed`.
        first: index of the random case to begin with, without named cases; None for all.
    """

    shape: tuple[int, ...] | None
    only: Sequence[str] | None
    inputs: Mapping[str, NDArray[Any]] | None
    num_random: int
    seed: int
    first: int | None

    @property
    def numbers(self) -> Sequence[int]:
        """Indices of the random cases."""
        numbers = range(self.first or 0, self.num_random if self.inputs is None else 0)
        return numbers if self.only is None else [n for n in numbers if f"random-{self.seed}-{n}" in self.only]

    def named(self, loss: str | LossConfig, *, even: bool = False) -> list[Case]:
        """The named cases, or the one captured call.

        Args:
            even: use `EVEN_SHAPE`, whose vocabulary divides evenly, for cases without a shape of their own.
        """
        if self.inputs is not None:
            return [] if even else [_captured(loss, self.inputs)]
        if self.first is not None or (even and self.shape is not None):
            return []
        only = None if self.only is None else tuple(self.only)
        return named_cases(loss, shape=EVEN_SHAPE if even else self.shape, only=only)

    def random(self, loss: str | LossConfig) -> Iterator[Case]:
        """The random cases, drawn lazily."""
        return (random_case(loss, number, self.seed, self.shape) for number in self.numbers)


def _captured(loss: str | LossConfig, inputs: Mapping[str, NDArray[Any]]) -> Case:
    arrays = {name: np.asarray(value) for name, value in inputs.items()}
    arrays = {name: a.astype(np.float64) if a.dtype.kind not in "iub" else a for name, a in arrays.items()}
    config = config_of(loss)
    grad_of = tuple(a.name for a in need_definition(config).arguments if a.differentiated and a.name in arrays)
    return Case("captured", config, arrays, None, grad_of)


class Plan(NamedTuple):
    """Calls, grouped by rank count.

    Attributes:
        total: count of calls; skipped: losses without any, with reasons.
    """

    calls: Iterable[Call]
    total: int
    skipped: list[str]


def plan_calls(
    losses: Sequence[str | LossConfig], dtypes: Sequence[str], cases: Cases, tp: Sequence[int], device: str | None,
    suffix: str,
) -> Plan:  # fmt: skip
    """One call for each loss, dtype and case.

    Args:
        tp: rank counts, see `check`.
        suffix: further options of the reproduce lines.
    """
    named, even, chosen, skipped = list[Call](), list[Call](), [], []
    for loss, name in zip(losses, distinct_names(losses), strict=True):
        if tp and not can_be_sharded(config_of(loss)):
            skipped.append(f"{name}: it has no tp_group")
            continue
        of_loss, even_of_loss = cases.named(loss), cases.named(loss, even=True) if tp else []
        if not of_loss and not cases.numbers:
            skipped.append(f"{name}: no case{filters_text(cases.shape, cases.only)}")
        for dtype in dtypes:
            captured = cases.inputs is not None
            both = [Call(loss, name, case, dtype, suffix, device, captured) for case in (*of_loss, *even_of_loss)]
            named += both[: len(of_loss)]
            even += both[len(of_loss) :]
        chosen.append((loss, name))

    def random() -> Iterator[Call]:
        # The first case of every loss, then the second, so that a check that is stopped early has run every loss.
        for number in cases.numbers:
            for loss, name in chosen:
                case = random_case(loss, number, cases.seed, cases.shape)
                for dtype in dtypes:
                    yield Call(loss, name, case, dtype, suffix, device, captured=False, number=number)

    if tp:
        sharded = sharded_calls([*named, *random()], even, tp)
        return Plan(sharded, len(sharded), skipped)
    total = len(named) + len(cases.numbers) * len(chosen) * len(dtypes)
    return Plan(itertools.chain(named, random()), total, skipped)


def harder_calls(
    losses: Sequence[str | LossConfig], dtypes: Sequence[str], cases: Cases, tp: Sequence[int], device: str | None,
    reproduce_options: str, rows: Mapping[Any, Row],
) -> Iterator[Call]:  # fmt: skip
    """Harder cases of each loss and dtype, one at a time, as long as one of its rows is insensitive.

    Args:
        cases: the cases already run; selected (`only`) and captured ones are followed by no harder ones.
        rows: of the table; read again before each call, since running the calls updates them.
    """
    if cases.only is not None or cases.inputs is not None:
        return
    # Without the requested shape: these cases have their own.
    suffix = reproduce_suffix(None, 0, 0, device) + reproduce_options
    for loss, name in zip(losses, distinct_names(losses), strict=True):
        for dtype in dtypes:
            for recipe in HARDER:
                if not any(row.insensitive for row in rows.values() if (row.loss, row.dtype) == (name, dtype)):
                    break
                for case in named_cases(loss, only=(recipe.name,)):
                    call = Call(loss, name, case, dtype, suffix, device, captured=False, harder=True)
                    yield from sharded_calls([call], [], tp) if tp else [call]
