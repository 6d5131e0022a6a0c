"""`loss-core check`: from options to a report on the terminal, as JSON and as a page."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loss_core.backend import AUTO, BackendUnavailable, all_flags, flag_status, parse_flag
from loss_core.captured_call import CapturedCall, read_call
from loss_core.cases import recipe_names
from loss_core.check import Report, check
from loss_core.cli_configs import UsageProblem, closest, read_configs
from loss_core.cli_parts import PAGE_LIBRARIES, check_output, import_modules, progress_bar, shape_of
from loss_core.config import LossConfig
from loss_core.dtypes import FORMATS
from loss_core.ranks import RanksFailed
from loss_core.tables import print_check, print_reasons

if TYPE_CHECKING:
    from rich.console import Console

# Each rank is a process with a framework in it.
_MOST_RANKS = 64


@dataclass(frozen=True)
class CheckOptions:
    """Options of `loss-core check`, as they were typed; None or empty where left out."""

    configs: Sequence[str] = ()
    backends: Sequence[str] = ()
    against: str | None = None
    dtypes: Sequence[str] = ()
    shape: str | None = None
    cases: Sequence[str] = ()
    num_random: int = 0
    seed: int = 0
    inputs: Path | None = None
    device: str | None = None
    tp: str | None = None
    json: Path | None = None
    report: Path | None = None
    modules: Sequence[str] = ()
    command: str = "loss-core check"


def run_check(options: CheckOptions, out: Console, err: Console) -> int:
    """Check, print, write. Returns the exit code: 0 all agree, 1 something does not, or a rank of --tp failed.

    Raises:
        UsageProblem: an option can't be used.
    """
    import_modules(options.modules)
    check_output("--json", options.json)
    check_output("--report", options.report, needs=PAGE_LIBRARIES)
    losses = [loss for source in options.configs for loss in read_configs(source)]
    losses = [loss for i, loss in enumerate(losses) if loss not in losses[:i]]
    shape = shape_of(options.shape) if options.shape is not None else None
    tp = _ranks(options)
    _check_flags(options, err)
    _check_words(options)
    call = _captured(options, losses)
    for note in call.notes if call else ():
        err.print(note, markup=False, highlight=False, soft_wrap=True)
    with progress_bar(err) as progress:
        try:
            report = check(
                losses or None,
                list(options.backends) or None,
                against=options.against,
                dtypes=list(options.dtypes) or ([call.dtype] if call else None),
                shape=shape,
                only=list(options.cases) or None,
                num_random=options.num_random,
                seed=options.seed,
                inputs=call.arrays if call else None,
                device=options.device,
                tp=tp,
                modules=options.modules,
                reproduce_options=_reproduce_options(options),
                progress=progress,
            )
        except (BackendUnavailable, ValueError, TypeError) as error:
            raise UsageProblem(str(error)) from error
        except RanksFailed as error:
            err.print(f"loss-core: {error}", markup=False, highlight=False, soft_wrap=True)
            return 1
    _check_ran(options, report)
    print_check(out, report)
    _write(options, report, err)
    return 0 if report.passed else 1


def _ranks(options: CheckOptions) -> tuple[int, ...]:
    if options.tp is None:
        return ()
    parts = [part.strip() for part in options.tp.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= _MOST_RANKS for part in parts):
        raise UsageProblem(
            f"--tp {options.tp!r}: expected numbers of ranks from 1 to {_MOST_RANKS}, such as 2 or 1,2,4."
        )
    for name, value in (("--against", options.against), ("--device", options.device)):
        if value is not None and value != "cpu":
            raise UsageProblem(f"{name} {value} can't be used beside --tp: its ranks run on the CPU, against float64.")
    return tuple(int(part) for part in parts)


def _check_flags(options: CheckOptions, err: Console) -> None:
    """Flags that can't be used: with the reason and what to install."""
    named = [*options.backends, *([options.against] if options.against else [])]
    try:
        parsed = [parse_flag(flag) for flag in named]
    except ValueError as error:
        raise UsageProblem(str(error)) from error
    full = list(dict.fromkeys(map(str, parsed)))
    if options.against and options.backends and len(full) == 1:
        raise UsageProblem(f"--against {options.against} is the only flag: name another one with --backend.")
    # `auto` can be used where any kernel of its backend can.
    wanted = named and [f for flag in parsed for f in ([str(flag)] if flag.kernel != AUTO else _kernels(flag.backend))]
    statuses = {flag: flag_status(flag) for flag in (wanted or all_flags())}
    for flag in parsed:
        kernels = [str(flag)] if flag.kernel != AUTO else _kernels(flag.backend)
        unusable = [statuses[kernel] for kernel in kernels if not statuses[kernel].usable]
        if len(unusable) == len(kernels):
            print_reasons(err, unusable)
            raise UsageProblem(f"'{flag}' can't be used here. `loss-core backends` lists what can.")
    if not any(status.usable for status in statuses.values()):
        print_reasons(err, statuses.values())
        raise UsageProblem("No backend can be used here, so there is nothing to check.")


def _kernels(backend: str) -> list[str]:
    return [flag for flag in all_flags() if parse_flag(flag).backend == backend]


def _check_words(options: CheckOptions) -> None:
    for dtype in options.dtypes:
        if dtype not in FORMATS:
            raise UsageProblem(f"--dtype {dtype!r} is unknown{closest(dtype, FORMATS)} Known: {', '.join(FORMATS)}.")
    random = [f"random-{options.seed}-{i}" for i in range(options.num_random)]
    for name in options.cases:
        if name in recipe_names() or name in random:
            continue
        if name.startswith("random-"):
            raise UsageProblem(
                f"--case {name}: a random case needs the options that draw it: --cases N (more than its last "
                "number) --seed S (its first)."
            )
        raise UsageProblem(
            f"--case {name!r} is unknown{closest(name, recipe_names())} Known: {', '.join(recipe_names())}."
        )


def _captured(options: CheckOptions, losses: list[str | LossConfig]) -> CapturedCall | None:
    if options.inputs is None:
        return None
    if len(losses) != 1:
        raise UsageProblem(
            f"--inputs needs exactly one --config, to know which loss the call is of; got {len(losses)}."
        )
    if options.cases or options.shape or options.num_random:
        raise UsageProblem("--case, --cases and --shape choose generated inputs; leave them out beside --inputs.")
    return read_call(options.inputs, losses[0])


def _reproduce_options(options: CheckOptions) -> str:
    inputs = f" --inputs {shlex.quote(str(options.inputs))}" if options.inputs else ""
    return inputs + "".join(f" --import {module}" for module in options.modules)


def _check_ran(options: CheckOptions, report: Report) -> None:
    """Tell a wrong request from a wrong kernel."""
    if not report.rows:
        raise UsageProblem("Nothing could be run: " + "; ".join(report.skipped) + ".")
    problems = {finding.problem for finding in report.failures}
    runs = sum(row.cases for row in report.rows)
    if options.device and len(problems) == 1 and "" not in problems and len(report.failures) == runs:
        raise UsageProblem(f"--device {options.device}: nothing runs there: {problems.pop()}")


def _write(options: CheckOptions, report: Report, err: Console) -> None:
    try:
        if options.json is not None:
            options.json.write_text(report.to_json() + "\n", "utf-8")
        if options.report is not None:
            from loss_core.report_html import report_page

            options.report.write_text(report_page(report, options.command), "utf-8")
    except OSError as error:
        raise UsageProblem(f"{error.filename} can't be written: {error.strerror or error}.") from error
    for path in filter(None, (options.json, options.report)):
        err.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
