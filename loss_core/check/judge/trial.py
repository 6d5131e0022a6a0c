"""Judge implementations on the clauses of the contract, against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loss_core.check.calls import ORACLE, Call, chosen_losses, config_of, distinct_names, rounded_inputs
from loss_core.check.findings import add_findings
from loss_core.check.judge.clauses import Clause, NotSeen, clauses_of
from loss_core.check.judge.implementation import Guarded, Implementation, Loss, Refused, accepted, error_text
from loss_core.check.plan import Cases
from loss_core.check.report import Finding, Report, Row, Verdict, framework_version
from loss_core.dispatch.flags import load_backend
from loss_core.dispatch.protocol import Evaluation
from loss_core.dtypes import FORMATS, compute_format, float_format
from loss_core.loss_config import LossConfig
from loss_core.losses import Case, allowances
from loss_core.losses import evaluate as oracle
from loss_core.losses.bounds.rounding import result_dtypes
from loss_core.losses.definition import need_definition

Floats = NDArray[np.float64]
Progress = Callable[[int, int, str], None]


class Settings(NamedTuple):
    """What implementations are judged on: loss, dtypes and cases; device and suffix as in `Call`."""

    loss: str | LossConfig
    dtypes: Sequence[str]
    cases: Cases
    device: str | None = None
    suffix: str = ""


@dataclass(frozen=True)
class Run:
    """One call that returned a result.

    Attributes:
        failures: the failure of each wrong result, by its name: "loss", or the argument of a gradient.
        no_gradient: why backward fails, for arguments whose gradient training does not need, by name.
        judged: names of the results that were compared.
    """

    call: Call
    got: Evaluation
    template: Finding
    failures: dict[str, Finding]
    no_gradient: dict[str, str]
    judged: frozenset[str]

    @property
    def results(self) -> dict[str, Floats]:
        """Loss and gradients by name."""
        return {"loss": self.got.loss, **self.got.grads}

    def wrong_dtypes(self) -> dict[str, str]:
        """The promised dtype of each result that has another one."""
        promised = _promised_dtypes(self.call, self.got)
        return {name: dtype for name, dtype in promised.items() if self.got.dtypes[name] != dtype}

    def problem(self, tensor: str, text: str) -> Finding:
        """A finding without a numerical error."""
        return replace(self.template, tensor=tensor, problem=text)


@dataclass
class Trial:
    """One implementation of one loss in one dtype. Calls are cached."""

    implementation: Implementation
    settings: Settings
    name: str
    dtype: str
    _runs: dict[tuple[Any, ...], Run | Refused] = field(default_factory=dict)
    _losses: dict[str, Loss] = field(default_factory=dict)

    def run(self, case: Case, variant: Callable[[Case], Case], *, backwards: int = 1, again: bool = False) -> Run:
        """The call of a variant of a case.

        Args:
            backwards: how often backward is run.
            again: make a second call with the same arguments instead of returning the first one.
        Raises:
            Refused: the implementation does not support the call.
        """
        key = (case.name, variant, backwards, again)
        if key not in self._runs:
            try:
                self._runs[key] = self._evaluate(variant(case), backwards)
            except Refused as refused:
                self._runs[key] = refused
        found = self._runs[key]
        if isinstance(found, Refused):
            raise found
        return found

    def run_unless_refused(self, case: Case, variant: Callable[[Case], Case]) -> Run | None:
        """As `run`, but None where the implementation refuses the call."""
        try:
            return self.run(case, variant)
        except Refused:
            return None

    def host_reads(self, case: Case) -> str:
        """Which value of a tensor the host reads, "" for none; see `Backend.host_reads`."""
        loss = self.implementation.build(case.config)
        backend = load_backend(self.implementation.framework)
        arrays = accepted(loss, need_definition(case.config), rounded_inputs(self._call(case))[0])
        return backend.host_reads(loss, arrays, dtype=self.dtype, grad_of=case.grad_of)

    def _built(self, config: LossConfig) -> Loss:
        """The loss of a config, cached: JAX compiles again for each new function."""
        key = repr(config)
        if key not in self._losses:
            try:
                self._losses[key] = self.implementation.build(config)
            except Exception as error:
                raise Refused(error_text(error)) from error
        return self._losses[key]

    def _call(self, case: Case) -> Call:
        loss, _, cases, device, suffix = self.settings
        return Call(loss, self.name, case, self.dtype, suffix, device, captured=cases.inputs is not None)

    def _evaluate(self, case: Case, backwards: int) -> Run:
        call = self._call(case)
        arrays, upstream = rounded_inputs(call)
        loss = self._built(case.config)
        arguments = accepted(loss, need_definition(case.config), arrays)
        backend = load_backend(self.implementation.framework)

        def evaluate(grad_of: tuple[str, ...]) -> Evaluation:
            return backend.evaluate(
                Guarded(loss), arguments, dtype=self.dtype, upstream=upstream, grad_of=grad_of, device=call.device,
                backwards=backwards, leaves=False,
            )  # fmt: skip

        got, raised = _each_gradient(evaluate, case.grad_of)
        expected = oracle(case.config, arrays, upstream)
        results = {"loss": expected.loss, **expected.grads}
        product = got.product_dtype if got.kernel else _operand_dtype(call)
        allowed = allowances(case.config, arrays, expected, self.dtype, upstream=upstream, product_dtype=product)
        for name, promised in _promised_dtypes(call, got).items():
            # A result in a coarser dtype than promised is judged by a separate clause.
            if (found := got.dtypes[name]) != promised and found in FORMATS:
                allowed[name] = allowed[name] + float_format(found).u * np.abs(results[name])
        template = Finding(
            self.name, self.implementation.name, ORACLE, self.dtype, case.name,
            reproduce=self.implementation.reproduce(call),
        )  # fmt: skip
        row = Row(self.name, self.implementation.name, ORACLE, self.dtype)
        add_findings(row, template, {"loss": got.loss, **got.grads}, results, allowed, got.dtypes)
        trained = {a.name for a in need_definition(case.config).arguments if a.trained}
        failures = {finding.tensor: finding for finding in row.failures}
        failures |= {n: replace(template, tensor=n, problem=text) for n, text in raised.items() if n in trained}
        return Run(
            call, got, template, failures, {n: text for n, text in raised.items() if n not in trained},
            frozenset({"loss", *got.grads, *failures}),
        )  # fmt: skip


def _promised_dtypes(call: Call, got: Evaluation) -> dict[str, str]:
    return result_dtypes(call.case.config, call.dtype, got.grads)


def _operand_dtype(call: Call) -> str | None:
    """Dtype to which another project's fused loss may round the logits' gradient before its products: the inputs'."""
    has_products = need_definition(call.case.config).products > 0
    return call.dtype if has_products and compute_format(call.dtype).name != call.dtype else None


def _each_gradient(
    evaluate: Callable[[tuple[str, ...]], Evaluation], grad_of: tuple[str, ...]
) -> tuple[Evaluation, dict[str, str]]:
    """All gradients in one call; if backward raises, one call for each gradient, and the errors by name."""
    try:
        return evaluate(grad_of), {}
    except Refused:
        raise
    except Exception:
        try:
            got = evaluate(())
        except Exception as error:
            raise error if isinstance(error, Refused) else Refused(error_text(error)) from error
    grads, dtypes, mutated, raised = dict(got.grads), dict(got.dtypes), dict.fromkeys(got.mutated), {}
    for name in grad_of:
        try:
            one = evaluate((name,))
        except Refused:
            raise
        except Exception as error:  # an error in backward is a finding
            raised[name] = error_text(error)
            continue
        grads |= one.grads
        dtypes |= one.dtypes
        mutated |= dict.fromkeys(one.mutated)
    return replace(got, grads=grads, dtypes=dtypes, mutated=tuple(mutated)), raised


def judge_all(
    config: str | LossConfig | Sequence[str | LossConfig] | None,
    implementations: Sequence[Implementation],
    settings: Settings,
    report: Report,
    progress: Progress | None = None,
) -> None:
    """Add the verdicts on all implementations to a report.

    Args:
        config: as in `check`. None: the loss whose arguments an implementation accepts, or all that a builder builds.
        settings: their `loss` is replaced.
    """
    pairs = [
        (implementation, loss)
        for implementation in implementations
        for loss in chosen_losses(implementation.loss or None if config is None else config)
    ]
    num_steps = 0
    for implementation, loss in pairs:
        report.versions[implementation.framework] = framework_version(implementation.framework)
        if implementation.version:
            report.versions[implementation.name] = implementation.version
        total = len(pairs) * len(clauses_of(need_definition(config_of(loss))))

        def step(label: str, total: int = total) -> None:
            nonlocal num_steps
            if progress:
                progress(min(num_steps, total), total, label)
            num_steps += 1

        verdicts = judge(implementation, settings._replace(loss=loss), step)
        if config is None and not any(verdict.calls for verdict in verdicts):
            words = [text for verdict in verdicts for text in verdict.words]
            report.skipped.append(f"{verdicts[0].loss} {implementation.name}: {words[0]}")
        else:
            report.verdicts += verdicts


def judge(
    implementation: Implementation, settings: Settings, progress: Callable[[str], None] = lambda label: None
) -> list[Verdict]:
    """The verdict on each clause, over all cases and dtypes."""
    config = config_of(settings.loss)
    # The cases of a config instance keep its fields, those of a registry name set fields, which a fixed loss ignores.
    of = config if implementation.config_is_fixed else settings.loss
    cases = [*settings.cases.named(of), *settings.cases.random(of)]
    (name,) = distinct_names([settings.loss])
    trials = [Trial(implementation, settings, name, dtype) for dtype in settings.dtypes]
    verdicts = []
    for clause in clauses_of(need_definition(config)):
        progress(f"{implementation.name} {name} {clause.name}")
        verdicts.append(_verdict(clause, trials, [case for case in cases if clause.applies_to(case)]))
    return verdicts


def _verdict(clause: Clause, trials: Sequence[Trial], cases: Sequence[Case]) -> Verdict:
    findings: list[Finding] = []
    unsupported: dict[str, list[str]] = {}
    not_testable: dict[str, None] = {}
    judged = 0
    for trial in trials:
        for case in cases:
            try:
                findings += clause.judge(trial, case)
                judged += 1
            except Refused as refused:
                unsupported.setdefault(str(refused), []).append(f"{trial.dtype} {case.name}")
            except NotSeen as reason:
                not_testable[str(reason)] = None
    status = "broken" if findings else "ok" if judged else "unsupported" if unsupported else "not seen"
    words = [f"{text} ({_shortened(calls)})" for text, calls in unsupported.items()]
    if not judged and not unsupported:
        words = list(not_testable) or ["no case of this config can test it"]
    implementation, name = trials[0].implementation.name, trials[0].name
    return Verdict(implementation, name, clause.name, clause.asserts, status, judged, tuple(words), tuple(findings))


def _shortened(calls: Sequence[str]) -> str:
    return calls[0] if len(calls) == 1 else f"{calls[0]} and {len(calls) - 1} more"
