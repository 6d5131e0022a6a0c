"""`check`: compare every loss, flag, dtype and case with float64, and backends with each other."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, groupby, takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.check.calls import ORACLE, Call, chosen_flags, chosen_losses, reproduce_suffix, rounded_inputs
from loss_core.check.findings import add_findings, add_lower
from loss_core.check.judge.implementation import Implementation, implementations_of
from loss_core.check.judge.trial import Settings, judge_all
from loss_core.check.plan import Cases, harder_calls, plan_calls
from loss_core.check.report import Finding, Interrupted, Report, Row
from loss_core.check.sharded import Evaluate, check_ranks, over_ranks
from loss_core.dispatch.builders import is_registered
from loss_core.dispatch.flags import AUTO, load_backend, parse_flag
from loss_core.dispatch.protocol import BackendUnavailable, Evaluation
from loss_core.dtypes import float_format
from loss_core.loss_config import LossConfig
from loss_core.losses import OracleResult, allowances
from loss_core.losses import evaluate as oracle
from loss_core.losses.bounds.rounding import result_dtypes
from loss_core.losses.bounds.sensitivity import condition_number
from loss_core.losses.lower import lower_results
from loss_core.workers.pool import RequestFailed, WorkerFailed

DTYPES = ("float32", "bfloat16", "float16", "float64")

Progress = Callable[[int, int, str], None]


def check(
    config: str | LossConfig | Sequence[str | LossConfig] | None = None,
    backends: Sequence[str] | None = None,
    *,
    against: str | None = None,
    dtypes: Sequence[str] | None = None,
    shape: tuple[int, ...] | None = None,
    only: Sequence[str] | None = None,
    num_random: int = 0,
    seed: int = 0,
    first: int | None = None,
    minutes: float | None = None,
    inputs: Mapping[str, NDArray[Any]] | None = None,
    device: str | None = None,
    tp: Sequence[int] = (),
    modules: Sequence[str] = (),
    reproduce_options: str = "",
    progress: Progress | None = None,
    implementations: Mapping[str, Any] | Sequence[Implementation] = (),
    framework: str = "torch",
) -> Report:
    """Check losses on backends against the float64 oracle, and backends against each other.

    Args:
        config: registry name (its cases may set config fields), a config (used unchanged), a list of these, or None
            for all losses.
        backends: flags; None for every usable flag except those that compile at their first call (torch:compile),
            which run only when named.
        against: a flag; the others are compared with it alone, besides the oracle. None: every two flags of different
            frameworks are compared.
        dtypes: of the inputs; None for float32, bfloat16, float16 and float64.
        shape: (T, V) or (T, V, H); replaces the shapes of the named cases.
        only: names of cases; None for all, plus harder ones for rows that a lower arithmetic would pass.
        num_random: count of additional random cases for each loss and dtype; seed: their seed.
        first: index of the random case to begin with, without named cases; None for all.
        minutes: time limit, after which the check returns what was run; `report.next_first` says where to continue.
        inputs: arguments of one captured call, which replaces the named cases.
        device: such as "cuda"; None for each backend's default.
        tp: rank counts. For each, the calls run with the vocabulary sharded over that many processes (torch, gloo) or
            devices (JAX) on the CPU, in even, uneven and empty shards. Results are compared with the oracle on the
            unsharded problem, and bitwise between ranks.
        modules: names of Python modules that register the losses, imported by these processes.
        reproduce_options: further options of reproduce lines, such as " --inputs call.npz".
        progress: called as progress(done, total, label).
        implementations: by name, each a loss (a callable that takes the forward's arguments by keyword) or a builder
            (a callable whose only parameter is called config). They are judged against the oracle, clause by clause
            (`Report.verdicts`); flags then run only if `backends` names them. A loss is judged with the given config,
            or with the defaults of the first loss whose arguments it accepts.
        framework: whose tensors the implementations accept, "torch" or "jax".
    Returns:
        A Report; `report.passed` is the overall result.
    Raises:
        BackendUnavailable: for a named flag that can't be used here.
        ValueError, TypeError: for unknown flags, losses, dtypes and shapes.
        WorkerFailed: a process of `tp` died or timed out.
        Interrupted: on Ctrl-C after the first call; it carries the report of what was run.
    """
    start = time.perf_counter()
    check_ranks(tp, against, device)
    report = Report(versions={"python": platform.python_version(), "numpy": np.__version__})
    wanted = tuple(dtypes) if dtypes else DTYPES
    for dtype in wanted:
        float_format(dtype)
    if shape is not None and not (len(shape) in (2, 3) and all(n >= 1 for n in shape)):
        raise ValueError(f"shape must be (T, V) or (T, V, H) with sizes >= 1, got {tuple(shape)}.")
    if first is not None and not 0 <= first < num_random:
        raise ValueError(f"first must be the number of a random case, at least 0 and below {num_random}; got {first}.")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes must be above 0, got {minutes}.")
    suffix = reproduce_suffix(shape, num_random, seed, device) + reproduce_options
    cases = Cases(shape, only, inputs, num_random, seed, first)
    if implementations:
        if tp or minutes is not None:
            raise ValueError(f"{'tp' if tp else 'minutes'} is for flags: implementations run unsharded and in full.")
        settings = Settings("", wanted, cases, device, suffix)
        judge_all(config, implementations_of(implementations, framework), settings, report, progress)
        if backends is None and against is None:
            report.seconds = time.perf_counter() - start
            return report
    losses = chosen_losses(config)
    flags = chosen_flags(backends, against, report)
    plan = plan_calls(losses, wanted, cases, tp, device, suffix)
    report.skipped += plan.skipped
    report.total = plan.total
    if not plan.total:
        raise ValueError(f"Nothing to check: {'; '.join(report.skipped)}.")
    table: dict[tuple[str, str, str, str], Row] = {}
    calls = chain(plan.calls, harder_calls(losses, wanted, cases, tp, device, reproduce_options, table))

    def within_time_limit(call: Call) -> bool:
        return minutes is None or not report.calls or time.perf_counter() - start < 60 * minutes

    try:
        for ranks, group in groupby(takewhile(within_time_limit, calls), key=lambda call: call.ranks):
            with ExitStack() as stack:
                pool = ThreadPoolExecutor(max_workers=max(len(flags), 1))
                # Without waiting, so that Ctrl-C exits at once; after a normal loop nothing is running any more.
                stack.callback(pool.shutdown, wait=False, cancel_futures=True)
                if progress and ranks:
                    progress(report.calls, report.total, f"starting {ranks} ranks")
                backends_used = list(dict.fromkeys(parse_flag(flag).backend for flag in flags))
                evaluate = stack.enter_context(over_ranks(backends_used, ranks, modules)) if ranks else _in_this_process
                for call in group:
                    report.next_first = None if ranks else call.number
                    report.total += call.harder
                    if progress:
                        label = call.flag_name(f"{call.name} {call.dtype} {call.case_name}")
                        progress(report.calls, report.total, label)
                    _check_case(call, flags, against, table, report, pool, evaluate)
                    report.calls += 1
    except KeyboardInterrupt as error:
        if not report.calls:
            raise
        raise Interrupted(report) from error
    finally:
        report.rows = list(table.values())
        report.seconds = time.perf_counter() - start
    if progress:
        progress(report.calls, report.total, "done")
    return report


def assert_backends_agree(
    config: str | LossConfig, backends: Sequence[str] = ("torch", "jax"), **options: Any
) -> Report:
    """`check` as an assertion for a test suite.

    Raises:
        AssertionError: something failed; the message has each failure with the command that reproduces it.
    """
    report = check(config, backends, **options)
    if not report.passed:
        raise AssertionError("Backends do not agree:\n" + "\n".join(str(finding) for finding in report.failures))
    return report


def _check_case(
    call: Call,
    flags: list[str],
    against: str | None,
    table: dict[tuple[str, str, str, str], Row],
    report: Report,
    pool: ThreadPoolExecutor,
    evaluate: Evaluate,
) -> None:
    arrays, upstream = rounded_inputs(call)
    running = {flag: pool.submit(evaluate, call, flag, arrays, upstream) for flag in flags}
    config, dtype = call.case.config, call.dtype
    expected = oracle(config, arrays, upstream)
    lower = lower_results(config, arrays, dtype, upstream)
    condition = condition_number(arrays, expected, upstream)
    done: dict[str, tuple[Evaluation, dict[str, NDArray[np.float64]]]] = {}
    for flag, future in running.items():
        key = (call.name, call.flag_name(flag), ORACLE, dtype)
        row = table.setdefault(key, Row(*key))
        try:
            got = future.result()
        except BackendUnavailable as error:
            note = f"{call.name} {call.flag_name(flag)}: {error}"
            if note not in report.skipped:
                report.skipped.append(note)
            # A row with other cases stays: the flag may support all but this one.
            if not row.cases:
                table.pop(key, None)
            continue
        except WorkerFailed:
            raise
        except Exception as error:  # a kernel that raises is a finding, not the end of the check
            _count(row, call)
            text = str(error) if isinstance(error, RequestFailed) else f"{type(error).__name__}: {error}"
            row.failures.append(_problem(call, flag, "loss", text))
            continue
        if got is None:
            continue
        _count(row, call)
        allowed = allowances(config, arrays, expected, dtype, upstream=upstream, product_dtype=got.product_dtype)
        row.failures += _contract_problems(call, flag, got)
        done[flag] = (got, allowed)
        template = replace(_template(call, flag, ORACLE), condition=condition)
        ratios = add_findings(row, template, _results(got), _expected(expected), allowed, got.dtypes, rounded=True)
        report.count(flag, dtype, ratios)
        add_lower(row, lower, _expected(expected), allowed, _promised_dtypes(call, got), rounded=True)
    if call.ranks:
        return
    for flag, other in _pairs(list(done), against):
        key = (call.name, flag, other, dtype)
        row = table.setdefault(key, Row(*key))
        _count(row, call)
        (got, allowed), (reference, allowed_too) = done[flag], done[other]
        # Each may be off by its own allowance.
        both = {name: allowed[name] + allowed_too[name] for name in allowed}
        template = replace(_template(call, flag, other), condition=condition)
        add_findings(row, template, _results(got), _results(reference), both, got.dtypes)
        add_lower(row, lower, _expected(expected), both, _promised_dtypes(call, got))


def _count(row: Row, call: Call) -> None:
    row.cases += 1
    if call.harder and call.case.name not in row.harder:
        row.harder.append(call.case.name)


def _in_this_process(
    call: Call, flag: str, arrays: Mapping[str, NDArray[Any]], upstream: NDArray[Any] | None
) -> Evaluation:
    loss = call.case.config.build(backend=flag)
    backend = load_backend(parse_flag(flag).backend)
    return backend.evaluate(
        loss, arrays, dtype=call.dtype, upstream=upstream, grad_of=call.case.grad_of, device=call.device
    )


def _pairs(flags: list[str], against: str | None) -> Iterable[tuple[str, str]]:
    """The pairs of flags to compare."""
    if against is not None:
        target = str(parse_flag(against))
        return [(flag, target) for flag in flags if flag != target and target in flags]
    return [
        (a, b) for i, a in enumerate(flags) for b in flags[i + 1 :] if parse_flag(a).backend != parse_flag(b).backend
    ]


def _results(got: Evaluation) -> dict[str, NDArray[np.float64]]:
    return {"loss": got.loss, **got.grads}


def _expected(expected: OracleResult) -> dict[str, NDArray[np.float64]]:
    return {"loss": expected.loss, **expected.grads}


def _promised_dtypes(call: Call, got: Evaluation) -> dict[str, str]:
    return result_dtypes(call.case.config, call.dtype, got.grads)


def _contract_problems(call: Call, flag: str, got: Evaluation) -> list[Finding]:
    """Failures other than numerical errors: wrong dtypes, mutated inputs, ranks that differ, another kernel."""
    problems = []
    for name, dtype in _promised_dtypes(call, got).items():
        if got.dtypes[name] != dtype:
            problems.append(_problem(call, flag, name, f"has dtype {got.dtypes[name]}, not {dtype}"))
    for name in got.mutated:
        problems.append(_problem(call, flag, name, "the caller's input was changed"))
    for name in got.ranks_differ:
        problems.append(_problem(call, flag, name, "is not bitwise the same on all ranks"))
    # A user-defined loss need not record which kernels it ran.
    if parse_flag(flag).kernel != AUTO and got.kernel != flag and (got.kernel or not is_registered(call.case.config)):
        problems.append(_problem(call, flag, "loss", f"{flag!r} was asked for, but {got.kernel or 'no kernel'!r} ran"))
    return problems


def _template(call: Call, flag: str, against: str) -> Finding:
    """A finding with the fields that all tensors of a call share."""
    reproduce = call.reproduce(flag, against)
    return Finding(call.name, call.flag_name(flag), against, call.dtype, call.case_name, reproduce=reproduce)


def _problem(call: Call, flag: str, tensor: str, text: str) -> Finding:
    return replace(_template(call, flag, ORACLE), tensor=tensor, problem=text)
