"""The contract as a table of clauses: what each asserts, from which named cases it is read, and how.

A clause about one circumstance (ignored positions, an upstream gradient, strides, …) is judged beside the plain call,
the same without that circumstance: a result that is wrong there already is no defect of this clause.
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
    """A clause that can't be judged here; the message says why."""


@dataclass(frozen=True)
class Clause:
    """One clause.

    Attributes:
        asserts: in words.
        cases: names of the cases it is read from; () for all that no circumstance is special of.
        judge: (trial, case) -> what is wrong. Raises Refused and NotSeen.
    """

    name: str
    asserts: str
    cases: tuple[str, ...]
    judge: Callable[[Trial, Case], Iterator[Finding]]

    def takes(self, case: Case) -> bool:
        """Whether the clause is read from a case."""
        return case.name in self.cases if self.cases else case.name not in SPECIAL


# Cases that are about ignored positions or strides.
SPECIAL = ("all-ignored", "ignore-index-0", "ignore-index-in-vocab", "mask", "nan-where-ignored", "strided")


def clauses_of(definition: LossDef) -> tuple[Clause, ...]:
    """The clauses of a loss: one for the gradient of each argument, and those of every loss."""
    gradients = [
        Clause(
            f"gradient of {a.name}", f"the gradient of {a.name} is within what rounding explains of float64", (),
            _plain(a.name),
        )
        for a in definition.arguments
        if a.differentiated
    ]  # fmt: skip
    return (CLAUSES[0], *gradients, *CLAUSES[1:])


# Changes of a case. Each returns a case of the same name.


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
    """One leading dimension in the place of several."""
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
    """As it was drawn, but for the upstream gradient, leading dimensions and strides."""
    return _flat(replace(case, upstream=None, strided=False))


def all_ignored(case: Case) -> Case:
    """Every label ignored."""
    flat = plain(case)
    labels = np.full_like(flat.arrays["labels"], _ignore_index(case))
    return replace(flat, arrays={**flat.arrays, "labels": labels})


def with_upstream(case: Case) -> Case:
    """With the upstream gradient that was drawn, as every dtype holds it: it takes that of the result."""
    upstream = _flat(case).upstream
    return replace(plain(case), upstream=None if upstream is None else round_to(upstream, "bfloat16"))


def more_dimensions(case: Case) -> Case:
    """With the leading dimensions that were drawn."""
    return replace(case, arrays={n: v.reshape(case.arrays[n].shape) for n, v in plain(case).arrays.items()},
                   upstream=None, strided=False)  # fmt: skip


def strided_rows(case: Case) -> Case:
    """Slices such as logits[:, :-1] of a batch."""
    return replace(more_dimensions(case), strided=True)


def strided_columns(case: Case) -> Case:
    """Slices such as logits[:, :-1] of [T, V + 1]."""
    return replace(plain(case), strided=True)


def no_class(label: int) -> Callable[[Case], Case]:
    """One label outside of the vocabulary, in the middle, where a kernel that reads there stays within the array."""

    def change(case: Case) -> Case:
        flat = plain(case)
        labels = flat.arrays["labels"].copy()
        labels[labels.size // 2] = label
        return replace(flat, arrays={**flat.arrays, "labels": labels})

    return change


def _ignore_index(case: Case) -> int:
    return int(getattr(case.config, "ignore_index", -100))


# Judges.


def _plain(tensor: str) -> Callable[[Trial, Case], Iterator[Finding]]:
    def judge(trial: Trial, case: Case) -> Iterator[Finding]:
        run = trial.run(case, plain)
        if tensor in run.no_gradient:
            raise Refused(run.no_gradient[tensor])
        if tensor not in run.judged:
            raise NotSeen(f"no case gives {tensor}")
        if tensor in run.failures:
            yield run.failures[tensor]

    return judge


def _dtype(trial: Trial, case: Case) -> Iterator[Finding]:
    run = trial.run(case, plain)
    for tensor, dtype in run.wrong_dtypes().items():
        yield run.problem(tensor, f"comes in {run.got.dtypes[tensor]}, not in {dtype}")


def _inputs(trial: Trial, case: Case) -> Iterator[Finding]:
    for change in (plain, some_ignored):
        run = trial.run(case, change)
        for name in run.got.mutated:
            yield run.problem(name, "the caller's input was changed")


def _beside(
    plainer: Callable[[Case], Case],
    change: Callable[[Case], Case],
    unseen: Callable[[Trial, Case], str] = lambda trial, case: "",
) -> Callable[[Trial, Case], Iterator[Finding]]:
    """A judge of a call that differs from a plainer one, which may have failed by itself.

    Args:
        unseen: why the case does not show it; "" where it does.
    """

    def judge(trial: Trial, case: Case) -> Iterator[Finding]:
        if reason := unseen(trial, case):
            raise NotSeen(reason)
        before = trial.run(case, plainer).failures
        run = trial.run(case, change)
        if before.keys() >= run.judged:
            raise NotSeen("the plain call is wrong already")
        yield from (finding for tensor, finding in run.failures.items() if tensor not in before)

    return judge


def _labels(trial: Trial, case: Case) -> Iterator[Finding]:
    definition = need_definition(case.config)
    if definition.find("label") is None:
        raise NotSeen("labels say here only what is ignored")
    vocab = next(v.shape[definition.vocab_axes[n]] for n, v in case.arrays.items() if n in definition.vocab_axes)
    trial.run(case, plain)  # what is refused anyway shows nothing
    for label in (vocab, -1):
        if label == _ignore_index(case):
            continue
        run = trial.run_if_taken(case, no_class(label))
        # Refused is right, and so is NaN: for that token, or for the whole.
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
    except Exception as error:  # a kernel that needs memory to run on, or a call that is refused
        first = str(error).strip().partition("\n")[0]
        raise NotSeen(f"does not run without values: {type(error).__name__}: {first}") from error
    if reads:
        yield trial.run(case, plain).problem("loss", f"the host reads a value of a tensor: {reads}")


def _is_scalar(trial: Trial, case: Case) -> str:
    if need_definition(case.config).reduction(case.config) == "none":
        return ""
    return "the config's result is a scalar: give one with reduction 'none'"


def _has_no_strides(trial: Trial, case: Case) -> str:
    return "arrays of JAX have no strides" if trial.implementation.framework == "jax" else ""


def _has_one_dimension(trial: Trial, case: Case) -> str:
    return "the shape that was asked for has one leading dimension" if case.arrays["labels"].ndim == 1 else ""


def _has_no_strided_rows(trial: Trial, case: Case) -> str:
    return _has_no_strides(trial, case) or _has_one_dimension(trial, case)


CLAUSES = (
    Clause("values", "the loss is within what rounding explains of float64", (), _plain("loss")),
    Clause("result dtype", "float32 for the loss (float64 for float64), the inputs' for gradients", (), _dtype),
    Clause("inputs left alone", "no input is changed", ("basic", "none", "mask"), _inputs),
    Clause("ignored positions", "they give loss 0 and gradient exactly 0, and count in no mean",
           ("basic", "mean", "none", "ignore-index-0", "ignore-index-in-vocab", "mask", "nan-where-ignored"),
           _beside(plain, some_ignored)),
    Clause("all ignored", "loss and gradients are 0, and backward works", ("all-ignored", "basic", "none"),
           _beside(plain, all_ignored)),
    Clause("labels that are no class", "an error or NaN, never a silent finite number", ("basic", "none"), _labels),
    Clause("upstream gradient", "a factor of the loss is one of its gradients", ("basic",),
           _beside(plain, with_upstream)),
    Clause("upstream per token", "with reduction none, each token's is honoured", ("none",),
           _beside(plain, with_upstream, _is_scalar)),
    Clause("more dimensions", "any number of leading dimensions", ("basic", "none"),
           _beside(plain, more_dimensions, _has_one_dimension)),
    Clause("strided rows", "slices along the sequence, as logits[:, :-1] of a batch", ("strided",),
           _beside(more_dimensions, strided_rows, _has_no_strided_rows)),
    Clause("strided columns", "slices along the last dimension", ("strided",),
           _beside(plain, strided_columns, _has_no_strides)),
    Clause("determinism", "the same inputs give bitwise the same results", ("basic", "none"), _deterministic),
    Clause("backward twice", "a second backward of the same graph gives the same", ("basic", "none"), _backward_twice),
    Clause("no host sync", "no value of a tensor is read on the host", ("basic", "none"), _host_reads),
)  # fmt: skip
