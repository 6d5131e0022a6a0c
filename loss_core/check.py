"""The proof that backends agree: every loss, flag, dtype and case against float64, and against each other.

>>> from loss_core.check import check
>>> report = check("MaskedCrossEntropy", ["torch:eager"], dtypes=["float32"])  # doctest: +SKIP
>>> report.passed  # doctest: +SKIP
True
"""

from __future__ import annotations

import json
import platform
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core import oracle
from loss_core.backend import (
    AUTO,
    BackendUnavailable,
    Evaluation,
    all_flags,
    flag_status,
    load_backend,
    parse_flag,
)
from loss_core.build import LOSS_CONFIG_REGISTRY, config_class_for
from loss_core.cases import ALL_LOSSES, Case, named_cases, random_cases
from loss_core.compare import compare
from loss_core.config import LossConfig
from loss_core.dtypes import compute_format, float_format, round_to
from loss_core.oracle import OracleResult
from loss_core.report import HISTOGRAM_EDGES, Finding, Report, Row, add_findings, framework_version
from loss_core.tolerance import allowances

ORACLE = "float64"
DTYPES = ("float32", "bfloat16", "float16", "float64")

__all__ = ["HISTOGRAM_EDGES", "Finding", "Report", "Row", "assert_backends_agree", "check", "compare"]

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
    inputs: Mapping[str, NDArray[Any]] | None = None,
    device: str | None = None,
    reproduce_options: str = "",
    progress: Progress | None = None,
) -> Report:
    """Check losses on backends against the float64 oracle, and backends against each other.

    Args:
        config: registry name (its cases then set fields of their own), a config (kept as it is), a
            list of these, or None for all losses.
        backends: flags; None for every flag that can be used here.
        against: a flag; the others are then compared with it alone, besides the oracle. None: pairwise,
            the first flag of each framework against those of the other frameworks.
        dtypes: of the inputs; None for float32, bfloat16, float16 and float64.
        shape: (T, V) or (T, V, H) in place of the shapes of the named cases.
        only: names of cases; None for all.
        num_random: random cases on top; seed: theirs.
        inputs: arguments of one captured call, in place of the named cases.
        device: such as "cuda"; None for each backend's default.
        reproduce_options: what reproduce lines need besides, such as " --inputs call.npz".
        progress: called as progress(done, total, label).
    Returns:
        A Report; `report.passed` says it all. A flag that is named but can't be used raises.
    Raises:
        BackendUnavailable, ValueError, TypeError: for flags, names, dtypes and shapes that don't exist.
    """
    start = time.perf_counter()
    report = Report(versions={"python": platform.python_version(), "numpy": np.__version__})
    losses = _losses(config)
    flags = _flags(backends, against, report)
    wanted = tuple(dtypes) if dtypes else DTYPES
    for dtype in wanted:
        float_format(dtype)
    if shape is not None and not (len(shape) in (2, 3) and all(n >= 1 for n in shape)):
        raise ValueError(f"shape must be (T, V) or (T, V, H) with sizes >= 1, got {tuple(shape)}.")
    suffix = _suffix(shape, num_random, seed, device) + reproduce_options
    calls = []
    for loss, name in zip(losses, _distinct_names(losses), strict=True):
        cases = _cases(loss, shape, only, num_random, seed, inputs)
        if not cases:
            report.skipped.append(f"{name}: no case{_filters(shape, only)}")
        calls += [
            _Call(loss, name, case, dtype, suffix, device, inputs is not None) for dtype in wanted for case in cases
        ]
    if not calls:
        raise ValueError(f"Nothing to check: {'; '.join(report.skipped)}.")
    table: dict[tuple[str, str, str, str], Row] = {}
    pool = ThreadPoolExecutor(max_workers=max(len(flags), 1))
    try:
        for done, call in enumerate(calls):
            if progress:
                progress(done, len(calls), f"{call.name} {call.dtype} {call.case.name}")
            _check_case(call, flags, against, table, report, pool)
    finally:
        # Without waiting, so that Ctrl-C leaves at once; when all is well nothing is running here.
        pool.shutdown(wait=False, cancel_futures=True)
    if progress:
        progress(len(calls), len(calls), "done")
    report.rows = list(table.values())
    report.seconds = time.perf_counter() - start
    return report


def assert_backends_agree(
    config: str | LossConfig, backends: Sequence[str] = ("torch", "jax"), **options: Any
) -> Report:
    """`check`, as an assertion for a test suite.

    Raises:
        AssertionError: something failed; the message names each failure and how to run it alone.
    """
    report = check(config, backends, **options)
    if not report.passed:
        raise AssertionError("Backends do not agree:\n" + "\n".join(str(finding) for finding in report.failures))
    return report


@dataclass(frozen=True)
class _Call:
    loss: str | LossConfig
    name: str
    case: Case
    dtype: str
    suffix: str
    device: str | None
    captured: bool

    def reproduce(self, flag: str, against: str) -> str:
        other = "" if against == ORACLE else f" --against {against}"
        config = self.loss if isinstance(self.loss, str) else json.dumps(self.loss.to_dict())
        case = "" if self.captured else f" --case {self.case.name}"
        return (
            f"loss-core check --config {shlex.quote(config)} --backend {flag}{other} --dtype {self.dtype}"
            f"{case}{self.suffix}"
        )


def _name(loss: str | LossConfig) -> str:
    if isinstance(loss, str):
        return loss
    exact = [name for name, cls in LOSS_CONFIG_REGISTRY.items() if type(loss) is cls]
    parents = [name for name, cls in LOSS_CONFIG_REGISTRY.items() if isinstance(loss, cls)]
    return [*exact, *parents, type(loss).__name__][0]


def _distinct_names(losses: Sequence[str | LossConfig]) -> list[str]:
    """A name for each; where several configs of one loss are checked, with the fields that are not the default."""
    names = [_name(loss) for loss in losses]
    told = [
        name if names.count(name) == 1 or isinstance(loss, str) else f"{name}({_changed_fields(loss)})"
        for loss, name in zip(losses, names, strict=True)
    ]
    return [name if told.count(name) == 1 else f"{name} #{told[: i + 1].count(name)}" for i, name in enumerate(told)]


def _changed_fields(config: LossConfig) -> str:
    changed = [
        f"{f.name}={value!r}"
        for f in fields(config)
        for value in [getattr(config, f.name)]
        if f.compare and (f.default is MISSING or value != f.default)
    ]
    return ", ".join(changed)


def _filters(shape: tuple[int, ...] | None, only: Sequence[str] | None) -> str:
    names = f" named {' or '.join(only)}" if only is not None else ""
    return names + (f" at the shape {','.join(map(str, shape))}" if shape is not None else "")


def _losses(config: str | LossConfig | Sequence[str | LossConfig] | None) -> list[str | LossConfig]:
    if config is None:
        return list(ALL_LOSSES)
    losses = [config] if isinstance(config, str | LossConfig) else list(config)
    for loss in losses:
        if isinstance(loss, str):
            loss = config_class_for(loss)()
        if not isinstance(loss, LossConfig):
            raise TypeError(f"config must be a registry name or a LossConfig, got {loss!r}.")
        if not oracle.has_definition(loss):
            raise TypeError(
                f"There is no float64 definition of {type(loss).__name__} to check against; compare two "
                "implementations of it with loss_core.check.compare."
            )
    return losses


def _flags(backends: Sequence[str] | None, against: str | None, report: Report) -> list[str]:
    """Flags to run, each naming its kernel or `auto`; notes what can't be used."""
    if backends is None:
        statuses = [flag_status(flag) for flag in all_flags()]
        report.unusable = [status for status in statuses if not status.usable]
        flags = [status.flag for status in statuses if status.usable]
        if not flags:
            raise BackendUnavailable("; ".join(dict.fromkeys(status.reason for status in report.unusable)))
    else:
        flags = [_usable(flag) for flag in backends]
    if against is not None:
        flags.append(_usable(against))
    flags = list(dict.fromkeys(flags))
    for backend in dict.fromkeys(parse_flag(flag).backend for flag in flags):
        report.versions[backend] = framework_version(backend)
    return flags


def _usable(flag: str) -> str:
    """The flag in full; raises where it names a kernel that can't be used here."""
    parsed = parse_flag(flag)
    if parsed.kernel != AUTO and not (status := flag_status(flag)).usable:
        raise BackendUnavailable(status.reason)
    return str(parsed)


def _cases(
    loss: str | LossConfig,
    shape: tuple[int, ...] | None,
    only: Sequence[str] | None,
    num_random: int,
    seed: int,
    inputs: Mapping[str, NDArray[Any]] | None,
) -> list[Case]:
    if inputs is not None:
        config = LOSS_CONFIG_REGISTRY[loss]() if isinstance(loss, str) else loss
        arrays = {name: np.asarray(value) for name, value in inputs.items()}
        arrays = {name: a.astype(np.float64) if a.dtype.kind not in "iub" else a for name, a in arrays.items()}
        floats = tuple(n for n, a in arrays.items() if a.dtype.kind == "f" and a.ndim and n != "mask")
        return [Case("captured", config, arrays, None, floats)]
    named = named_cases(loss, shape=shape)
    random = random_cases(loss, num_random, seed, shape)
    cases = [*named, *random]
    return cases if only is None else [case for case in cases if case.name in only]


def _suffix(shape: tuple[int, ...] | None, num_random: int, seed: int, device: str | None) -> str:
    parts = []
    if shape is not None:
        parts.append(f" --shape {','.join(map(str, shape))}")
    if num_random:
        parts.append(f" --cases {num_random} --seed {seed}")
    if device is not None:
        parts.append(f" --device {device}")
    return "".join(parts)


def _result_dtype(config: LossConfig, dtype: str) -> str:
    return dtype if not getattr(config, "fp32_upcast", True) else compute_format(dtype).name


def _rounded(call: _Call) -> tuple[dict[str, NDArray[Any]], NDArray[Any] | None]:
    """The arrays and the upstream gradient as the tested dtype holds them."""
    case, dtype = call.case, call.dtype
    arrays = {}
    for name, value in case.arrays.items():
        value = round_to(value, dtype) if value.dtype.kind == "f" else value
        if case.strided and value.dtype.kind == "f" and value.ndim > 1 and name != "lm_weight":
            longer = np.zeros((*value.shape[:-2], value.shape[-2] + 1, value.shape[-1]))
            longer[..., :-1, :] = value
            value = longer[..., :-1, :]
        arrays[name] = value
    upstream = case.upstream
    return arrays, None if upstream is None else round_to(upstream, _result_dtype(case.config, dtype))


def _check_case(
    call: _Call,
    flags: list[str],
    against: str | None,
    table: dict[tuple[str, str, str, str], Row],
    report: Report,
    pool: ThreadPoolExecutor,
) -> None:
    arrays, upstream = _rounded(call)
    running = {flag: pool.submit(_evaluate, call, flag, arrays, upstream) for flag in flags}
    expected = oracle.evaluate(call.case.config, arrays, upstream)
    done: dict[str, tuple[Evaluation, dict[str, NDArray[np.float64]]]] = {}
    for flag, future in running.items():
        row = table.setdefault((call.name, flag, ORACLE, call.dtype), Row(call.name, flag, ORACLE, call.dtype))
        try:
            got = future.result()
        except BackendUnavailable as error:
            note = f"{call.name} {flag}: {error}"
            if note not in report.skipped:
                report.skipped.append(note)
            table.pop((call.name, flag, ORACLE, call.dtype), None)
            continue
        except Exception as error:  # a kernel that breaks is a finding, not the end of the check
            row.cases += 1
            row.failures.append(_problem(call, flag, "loss", f"{type(error).__name__}: {error}"))
            continue
        row.cases += 1
        allowed = allowances(
            call.case.config, arrays, expected, call.dtype, upstream=upstream, product_dtype=got.product_dtype
        )
        row.failures += _contract_problems(call, flag, got)
        done[flag] = (got, allowed)
        template = _template(call, flag, ORACLE)
        shares = add_findings(row, template, _results(got), _expected(expected), allowed, got.dtypes)
        _count(report, flag, call.dtype, shares)
    for flag, other in _pairs(list(done), against):
        key = (call.name, flag, other, call.dtype)
        row = table.setdefault(key, Row(*key))
        row.cases += 1
        (got, allowed), (reference, allowed_too) = done[flag], done[other]
        # Each may be off by its own allowance.
        both = {name: allowed[name] + allowed_too[name] for name in allowed}
        template = _template(call, flag, other)
        add_findings(row, template, _results(got), _results(reference), both, got.dtypes)


def _evaluate(call: _Call, flag: str, arrays: Mapping[str, NDArray[Any]], upstream: NDArray[Any] | None) -> Evaluation:
    loss = call.case.config.build(backend=flag)
    backend = load_backend(parse_flag(flag).backend)
    return backend.evaluate(
        loss, arrays, dtype=call.dtype, upstream=upstream, grad_of=call.case.grad_of, device=call.device
    )


def _pairs(flags: list[str], against: str | None) -> Iterable[tuple[str, str]]:
    """Which flags are compared with which."""
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


def _contract_problems(call: _Call, flag: str, got: Evaluation) -> list[Finding]:
    """What is wrong besides the numbers: dtypes, inputs that were changed, another kernel than the flag's."""
    problems = []
    wanted = dict.fromkeys(got.grads, call.dtype) | {"loss": _result_dtype(call.case.config, call.dtype)}
    for name, dtype in wanted.items():
        if got.dtypes[name] != dtype:
            problems.append(_problem(call, flag, name, f"comes in {got.dtypes[name]}, not in {dtype}"))
    for name in got.mutated:
        problems.append(_problem(call, flag, name, "the caller's input was changed"))
    if parse_flag(flag).kernel != AUTO and got.kernel != flag:
        problems.append(_problem(call, flag, "loss", f"the kernel that ran was {got.kernel!r}"))
    return problems


def _template(call: _Call, flag: str, against: str) -> Finding:
    """A finding with what all tensors of a call share."""
    return Finding(call.name, flag, against, call.dtype, call.case.name, reproduce=call.reproduce(flag, against))


def _problem(call: _Call, flag: str, tensor: str, text: str) -> Finding:
    return replace(_template(call, flag, ORACLE), tensor=tensor, problem=text)


def _count(report: Report, flag: str, dtype: str, shares: list[NDArray[np.float64]]) -> None:
    edges = np.concatenate([[-np.inf], HISTOGRAM_EDGES, [np.inf]])
    counts = report.histograms.setdefault((flag, dtype), np.zeros(len(edges) - 1, np.int64))
    for share in shares:
        with np.errstate(divide="ignore"):
            logs = np.log10(share.reshape(-1))
        counts += np.histogram(np.clip(logs, -1e9, 1e9), bins=np.clip(edges, -2e9, 2e9))[0]
