"""The contract as a table of clauses: what each asserts, on which named cases it is judged, and how.

A clause about one property of a call (ignored positions, an upstream gradient, strides, …) is judged relative to the
plain call, which is the same call without that property: a result that is wrong there is no violation of this clause.
"""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from loss_core.check.judge.implementation import Refused
from loss_core.dtypes import round_to
from loss_core.losses import Case, LossDef
from loss_core.losses.definition import need_definition
from loss_core.losses.reduction import valid_tokens

if TYPE_CHECKING:
    from loss_core.check.judge.trial import Trial
    from loss_core.check.report import Finding


class NotSeen(Exception):
    """A case that can't test a clause; the message says why."""


@dataclass(frozen=True)
class Clause:
    """One clause.

    Attributes:
        asserts: what it requires.
        cases: names of the cases on which it is judged; () for all but `SPECIAL_CASES`.
        judge: (trial, case) -> violations. Raises Refused and NotSeen.
    """

    name: str
    asserts: str
    cases: tuple[str, ...]
    judge: Callable[[Trial, Case], Iterator[Finding]]

    def applies_to(self, case: Case) -> bool:
        """Whether the clause is judged on a case."""
        return case.name in self.cases if self.cases else case.name not in SPECIAL_CASES


# Cases that are about ignored positions or strides.
SPECIAL_CASES = ("all-ignored", "ignore-index-0", "ignore-index-in-vocab", "mask", "nan-where-ignored", "strided")


def clauses_of(definition: LossDef) -> tuple[Clause, ...]:
    """The clauses of a loss: `CLAUSES`, and one for the gradient of each differentiable argument."""
    gradients = [
        Clause(
            f"gradient of {a.name}", f"the gradient of {a.name} is within what rounding explains of float64", (),
            _within_allowance(a.name),
        )
        for a in definition.arguments
        if a.differentiated
    ]  # fmt: skip
    return (CLAUSES[0], *gradients, *CLAUSES[1:])


# Variants of a case. Each is a case of the same name.


def plain(case: Case) -> Case:
    """Nothing ignored, no upstream gradient, one leading dimension, contiguous."""
    arrays = {name: value for name, value in case.arrays.items() if name != "mask"}
    ignored = ~valid_tokens({"labels": arrays["labels"]}, _ignore_index(case)).reshape(arrays["labels"].shape)
    arrays["labels"] = np.where(ignored, 1 if _ignore_index(case) == 0 else 0, arrays["labels"])
    for argument in need_definition(case.config).inputs:
        if argument.dims[:1] == ("T",):
            value = arrays[argument.name]
            bad = ignored.reshape(ignored.shape + (1,) * (value.ndim - ignored.ndim)) & ~np.isfinite(value)
            arrays[argument.name] = np.where(bad, 0.0, value)
    return _flat(replace(case, arrays=arrays, upstream=None, strided=False))


def _flat(case: Case) -> Case:
    """The leading dimensions flattened to one."""
    lead = case.arrays["labels"].ndim
    arrays = dict(case.arrays)
    for argument in need_definition(case.config).arguments:
        if argument.dims[:1] == ("T",) and argument.name in arrays:
            value = arrays[argument.name]
            arrays[argument.name] = value.reshape(-1, *value.shape[lead:])
    upstream = case.upstream
    if upstream is not None and upstream.ndim >= lead > 0:
        upstream = upstream.reshape(*upstream.shape[: upstream.ndim - lead], -1)
    return replace(case, arrays=arrays, upstream=upstream)


def some_ignored(case: Case) -> Case:
    """The case with its ignored positions; no upstream gradient, one leading dimension, contiguous."""
    return _flat(replace(case, upstream=None, strided=False))


def all_ignored(case: Case) -> Case:
    """Every label ignored."""
    flat = plain(case)
    labels = np.full_like(flat.arrays["labels"], _ignore_index(case))
    return replace(flat, arrays={**flat.arrays, "labels": labels})


def with_upstream(case: Case) -> Case:
    """The plain case with the upstream gradient, rounded to bfloat16 so that it is the same in every result dtype."""
    upstream = _flat(case).upstream
    return replace(plain(case), upstream=None if upstream is None else round_to(upstream, "bfloat16"))


def more_dimensions(case: Case) -> Case:
    """The plain case with its leading dimensions."""
    return replace(case, arrays={n: v.reshape(case.arrays[n].shape) for n, v in plain(case).arrays.items()},
                   upstream=None, strided=False)  # fmt: skip


def strided_rows(case: Case) -> Case:
    """Slices such as logits[:, :-1] of a batch."""
    return replace(more_dimensions(case), strided=True)


def strided_columns(case: Case) -> Case:
    """Slices such as logits[:, :-1] of [T, V + 1]."""
    return replace(plain(case), strided=True)


def invalid_label(label: int) -> Callable[[Case], Case]:
    """One label outside of the vocabulary, in a middle row, so that a read beyond the row stays within the array."""

    def variant(case: Case) -> Case:
        flat = plain(case)
        labels = flat.arrays["labels"].copy()
        labels[labels.size // 2] = label
        return replace(flat, arrays={**flat.arrays, "labels": labels})

    return variant


def _ignore_index(case: Case) -> int:
    return int(getattr(case.config, "ignore_index", -100))


# Judges.


def _within_allowance(tensor: str) -> Callable[[Trial, Case], Iterator[Finding]]:
    def judge(trial: Trial, case: Case) -> Iterator[Finding]:
        run = trial.run(case, plain)
        if tensor in run.no_gradient:
            raise Refused(run.no_gradient[tensor])
        if tensor not in run.judged:
            raise NotSeen(f"no case has {tensor}")
        if tensor in run.failures:
            yield run.failures[tensor]

    return judge


def _dtype(trial: Trial, case: Case) -> Iterator[Finding]:
    run = trial.run(case, plain)
    for tensor, dtype in run.wrong_dtypes().items():
        yield run.problem(tensor, f"has dtype {run.got.dtypes[tensor]}, not {dtype}")


def _inputs(trial: Trial, case: Case) -> Iterator[Finding]:
    for variant in (plain, some_ignored):
        run = trial.run(case, variant)
        for name in run.got.mutated:
            yield run.problem(name, "the caller's input was changed")


def _relative_to(
    simpler: Callable[[Case], Case],
    variant: Callable[[Case], Case],
    not_testable: Callable[[Trial, Case], str] = lambda trial, case: "",
) -> Callable[[Trial, Case], Iterator[Finding]]:
    """Judge of a variant that yields only the tensors that are right in a simpler variant.

    Args:
        not_testable: why a case can't test the clause; "" where it can.
    """

    def judge(trial: Trial, case: Case) -> Iterator[Finding]:
        if reason := not_testable(trial, case):
            raise NotSeen(reason)
        before = trial.run(case, simpler).failures
        run = trial.run(case, variant)
        if before.keys() >= run.judged:
            raise NotSeen("the plain call is wrong already")
        yield from (finding for tensor, finding in run.failures.items() if tensor not in before)

    return judge


def _labels(trial: Trial, case: Case) -> Iterator[Finding]:
    definition = need_definition(case.config)
    if definition.find("label") is None:
        raise NotSeen("labels only select the ignored tokens here")
    vocab = next(v.shape[definition.vocab_axes[n]] for n, v in case.arrays.items() if n in definition.vocab_axes)
    trial.run(case, plain)  # raises if the implementation refuses this case with valid labels, too
    for label in (vocab, -1):
        if label == _ignore_index(case):
            continue
        run = trial.run_unless_refused(case, invalid_label(label))
        # An error is right, and so is NaN for that token or for the reduced loss.
        if run is not None and np.all(np.isfinite(run.got.loss)):
            got = float(run.got.loss.reshape(-1)[run.got.loss.size // 2])
            yield run.problem("loss", f"is the finite number {got:.9g} for the label {label}, with V = {vocab}")


def _deterministic(trial: Trial, case: Case) -> Iterator[Finding]:
    run, again = trial.run(case, plain), trial.run(case, plain, again=True)
    for tensor, value in run.results.items():
        other = again.results[tensor]
        if not np.array_equal(value, other, equal_nan=True):
            yield run.problem(tensor, f"differs by up to {np.nanmax(np.abs(value - other)):.3g} from call to call")


def _backward_twice(trial: Trial, case: Case) -> Iterator[Finding]:
    before = trial.run(case, plain).failures
    run = trial.run(case, plain, backwards=2)
    if before.keys() >= run.judged - {"loss"}:
        raise NotSeen("the first backward is wrong already")
    yield from (finding for tensor, finding in run.failures.items() if tensor not in before)


def _host_reads(trial: Trial, case: Case) -> Iterator[Finding]:
    try:
        reads = trial.host_reads(some_ignored(case))
    except Exception as error:  # a kernel that needs real memory, or a call that is refused
        first = str(error).strip().partition("\n")[0]
        raise NotSeen(f"does not run without values: {type(error).__name__}: {first}") from error
    if reads:
        yield trial.run(case, plain).problem("loss", f"the host reads a value of a tensor: {reads}")


# Why a case can't test a clause; "" where it can.


def _is_scalar(trial: Trial, case: Case) -> str:
    if need_definition(case.config).reduction(case.config) == "none":
        return ""
    return "the result is a scalar: use a config with reduction 'none'"


def _has_no_strides(trial: Trial, case: Case) -> str:
    return "arrays of JAX have no strides" if trial.implementation.framework == "jax" else ""


def _has_one_dimension(trial: Trial, case: Case) -> str:
    return "the requested shape has one leading dimension" if case.arrays["labels"].ndim == 1 else ""


def _has_no_strided_rows(trial: Trial, case: Case) -> str:
    return _has_no_strides(trial, case) or _has_one_dimension(trial, case)


CLAUSES = (
    Clause("values", "the loss is within what rounding explains of float64", (), _within_allowance("loss")),
    Clause("result dtype", "float32 for the loss (float64 for float64), the inputs' for gradients", (), _dtype),
    Clause("inputs left alone", "no input is changed", ("basic", "none", "mask"), _inputs),
    Clause("ignored positions", "their loss and gradient are exactly 0, and no mean counts them",
           ("basic", "mean", "none", "ignore-index-0", "ignore-index-in-vocab", "mask", "nan-where-ignored"),
           _relative_to(plain, some_ignored)),
    Clause("all ignored", "loss and gradients are 0, and backward works", ("all-ignored", "basic", "none"),
           _relative_to(plain, all_ignored)),
    Clause("labels that are no class", "an error or NaN, never a silent finite number", ("basic", "none"), _labels),
    Clause("upstream gradient", "scaling the loss scales its gradients", ("basic",),
           _relative_to(plain, with_upstream)),
    Clause("upstream per token", "with reduction none, each token's upstream gradient is applied", ("none",),
           _relative_to(plain, with_upstream, _is_scalar)),
    Clause("more dimensions", "any number of leading dimensions", ("basic", "none"),
           _relative_to(plain, more_dimensions, _has_one_dimension)),
    Clause("strided rows", "slices along the sequence, such as logits[:, :-1] of a batch", ("strided",),
           _relative_to(more_dimensions, strided_rows, _has_no_strided_rows)),
    Clause("strided columns", "slices along the last dimension", ("strided",),
           _relative_to(plain, strided_columns, _has_no_strides)),
    Clause("determinism", "the same inputs give bitwise the same results", ("basic", "none"), _deterministic),
    Clause("backward twice", "a second backward gives the same gradients", ("basic", "none"), _backward_twice),
    Clause("no host sync", "no value of a tensor is read on the host", ("basic", "none"), _host_reads),
)  # fmt: skip
