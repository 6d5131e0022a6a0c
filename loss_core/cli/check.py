"""`loss-core check`: parse options, run the check, write the report to the terminal, as JSON and as HTML."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from loss_core.baselines import JUDGED
from loss_core.check import Interrupted, Report, check
from loss_core.check.captured import CapturedCall, read_call
from loss_core.check.html import check_page
from loss_core.check.judge.implementation import Implementation, error_text, implementation_named
from loss_core.check.text import print_check, print_reasons
from loss_core.cli.common import (
    Backends,
    Configs,
    Device,
    Dtypes,
    Json,
    Modules,
    Page,
    Seed,
    Shape,
    add_working_directory_to_path,
    check_outputs,
    checked_choice,
    checked_dtypes,
    command,
    import_modules,
    parse_shape,
    print_text,
    progress_bar,
    read_losses,
    reject_others,
    write_outputs,
)
from loss_core.cli.invariance import run_invariance
from loss_core.cli.logprobs import explain_logprobs
from loss_core.dispatch.flags import AUTO, BACKENDS, all_flags, flag_status, parse_flag
from loss_core.dispatch.protocol import BackendUnavailable
from loss_core.loss_config import LossConfig
from loss_core.losses.cases.drawing import recipe_names
from loss_core.usage import UsageProblem
from loss_core.workers.pool import WorkerFailed

# Each rank is a process that loads a framework.
_MOST_RANKS = 64


@command
def check_command(
    ctx: typer.Context,
    config: Configs = None,
    backend: Backends = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="FLAG", help="Compare with this flag and float64 only. Default: torch with jax."),
    ] = None,
    dtype: Dtypes = None,
    shape: Shape = None,
    case: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Run only this case.")] = None,
    cases: Annotated[int, typer.Option(metavar="N", min=0, help="Number of additional random cases.")] = 0,
    seed: Seed = 0,
    first: Annotated[
        int | None, typer.Option(metavar="K", min=0, help="Start at random case K, without named cases.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(metavar="M", help="Stop after M minutes and report what was run.")
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Check a captured call: .npz or .safetensors with the forward's arguments."),
    ] = None,
    device: Device = None,
    tp: Annotated[
        str | None,
        typer.Option(metavar="N[,N]", help="Shard the vocabulary over N ranks, started by check."),
    ] = None,
    json: Json = None,
    page: Page = None,
    modules: Modules = None,
    implementation: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Judge an implementation clause by clause, instead of the flags: MODULE:OBJECT (a loss or a builder), "
            f"another project by name ({', '.join(JUDGED)}), or a flag.",
        ),
    ] = None,
    framework: Annotated[
        str | None, typer.Option(metavar="NAME", help="Framework of MODULE:OBJECT: torch (default) or jax.")
    ] = None,
    invariance: Annotated[
        bool,
        typer.Option("--invariance", help="Check batch invariance instead: whether a token depends on the others."),
    ] = False,
    logprobs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Explain why a trainer differs from its engine; .npz or .safetensors."),
    ] = None,
) -> int:
    """Check losses and gradients against float64, and backends against each other.

    Without options: every loss, flag, dtype and named case, except torch:compile, which compiles for about a minute.

    May be repeated: --config, --backend, --dtype, --case, --import, --implementation.

    --minutes and Ctrl-C stop it with a report of what was run and the command that continues from there.

    Exit code: 0 all agree, 1 they do not, or a clause is broken, or a rank of --tp failed, 2 wrong usage, 130 Ctrl-C.

    With --logprobs: 0 if one computation explains both systems (without a head in the dump: if every ratio of
    probabilities is within 1e-3 of 1), else 1.
    """
    if logprobs is not None:
        return explain_logprobs(ctx, logprobs, seed, json, page)
    if invariance:
        reject_others(ctx, "invariance", ("config", "backend", "dtype", "shape", "seed", "device", "json", "modules"))
    if framework is not None and not implementation:
        raise UsageProblem(f"--framework {framework} says whose tensors an --implementation takes; name one.")
    out, err = Console(), Console(stderr=True)
    import_modules(modules or ())
    check_outputs(json, page)
    losses = read_losses(config)
    sizes = parse_shape(shape) if shape is not None else None
    ranks = _ranks(tp, against, device)
    judged = _implementations(implementation or (), framework)
    if not judged or backend:
        _check_flags(backend or [], against, err)
    dtypes = checked_dtypes(dtype)
    imports = "".join(f" --import {module}" for module in modules or ())
    if invariance:
        options = {"shape": sizes, "seed": seed, "device": device, "reproduce_options": imports}
        return run_invariance(losses or None, backend or None, json, dtypes=dtypes, **options)
    _check_cases(case or [], [f"random-{seed}-{i}" for i in range(cases)])
    if inputs is not None and (case or shape or cases):
        raise UsageProblem("--case, --cases and --shape choose generated inputs; they can't be used beside --inputs.")
    call = _captured(inputs, losses)
    for text in call.notes if call else ():
        print_text(err, text)
    inputs_option = f" --inputs {shlex.quote(str(inputs))}" if inputs else ""
    stop: Interrupted | None = None
    with progress_bar(err) as progress:
        try:
            report = check(
                losses or None,
                backend or None,
                against=against,
                dtypes=dtypes or ([call.dtype] if call else None),
                shape=sizes,
                only=case or None,
                num_random=cases,
                seed=seed,
                first=first,
                minutes=minutes,
                inputs=call.arrays if call else None,
                device=device,
                tp=ranks,
                modules=modules or (),
                reproduce_options=inputs_option + imports,
                progress=progress,
                implementations=judged,
            )
        except (BackendUnavailable, ValueError, TypeError) as error:
            raise UsageProblem(str(error)) from error
        except Interrupted as interrupted:
            report, stop = interrupted.report, interrupted
        except WorkerFailed as error:
            print_text(err, f"loss-core: {error}.")
            return 1
    _check_ran(report, device)
    print_check(out, report)
    command_line = ctx.obj or "loss-core check"
    write_outputs([(json, lambda: report.to_json() + "\n"), (page, lambda: check_page(report, command_line))], err)
    if report.stopped:
        print_text(err, _how_to_continue(report, command_line))
    if stop is not None:
        raise stop
    return 0 if report.passed else 1


def _how_to_continue(report: Report, command_line: str) -> str:
    if report.next_first is None:
        return "loss-core: to run the other cases, repeat with more --minutes; --first 0 skips the named cases."
    without_first = re.sub(r" --first[ =]\d+", "", command_line)
    return f"loss-core: to continue from there:\n{without_first} --first {report.next_first}"


def _ranks(tp: str | None, against: str | None, device: str | None) -> tuple[int, ...]:
    if tp is None:
        return ()
    parts = [part.strip() for part in tp.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= _MOST_RANKS for part in parts):
        raise UsageProblem(f"--tp {tp!r}: expected numbers of ranks from 1 to {_MOST_RANKS}, such as 2 or 1,2,4.")
    for name, value in (("--against", against), ("--device", device)):
        if value is not None and value != "cpu":
            raise UsageProblem(f"{name} {value} can't be used beside --tp: its ranks run on the CPU, against float64.")
    return tuple(int(part) for part in parts)


def _implementations(specs: Sequence[str], framework: str | None) -> list[Implementation]:
    """The implementations to judge; imported as if the working directory were on the path."""
    if framework is not None:
        checked_choice("--framework", framework, BACKENDS)
    if specs:
        add_working_directory_to_path()
    found = []
    for spec in specs:
        try:
            found.append(implementation_named(spec, framework))
        except Exception as error:  # an error in a user's module is reported in one line
            raise UsageProblem(f"--implementation {spec}: {error_text(error)}") from error
    return found


def _check_flags(backends: Sequence[str], against: str | None, err: Console) -> None:
    """Raise UsageProblem for unknown and unusable flags, after printing the reasons and what to install."""
    named = [*backends, *([against] if against else [])]
    try:
        parsed = [parse_flag(flag) for flag in named]
    except ValueError as error:
        raise UsageProblem(str(error)) from error
    if against and backends and len(set(map(str, parsed))) == 1:
        raise UsageProblem(f"--against {against} is the only flag: name another one with --backend.")
    for flag in parsed:
        # `auto` is usable if any kernel of its backend is.
        kernels = [str(flag)] if flag.kernel != AUTO else _kernels(flag.backend)
        unusable = [status for status in map(flag_status, kernels) if not status.usable]
        if len(unusable) == len(kernels):
            print_reasons(err, unusable)
            raise UsageProblem(f"'{flag}' can't be used here. `loss-core backends` lists what can.")
    if not parsed:
        statuses = [flag_status(flag) for flag in all_flags()]
        if not any(status.usable for status in statuses):
            print_reasons(err, statuses)
            raise UsageProblem("No backend can be used here, so there is nothing to check.")


def _kernels(backend: str) -> list[str]:
    return [flag for flag in all_flags() if parse_flag(flag).backend == backend]


def _check_cases(names: Sequence[str], random: Sequence[str]) -> None:
    for name in names:
        if name.startswith("random-") and name not in random:
            raise UsageProblem(
                f"--case {name}: a random case needs the options that draw it: --cases N (more than its last "
                "number) --seed S (its first)."
            )
        if name not in random:
            checked_choice("--case", name, recipe_names())


def _captured(path: Path | None, losses: Sequence[str | LossConfig]) -> CapturedCall | None:
    if path is None:
        return None
    if len(losses) != 1:
        raise UsageProblem(
            f"--inputs needs exactly one --config, to know which loss the call is of; got {len(losses)}."
        )
    return read_call(path, losses[0])


def _check_ran(report: Report, device: str | None) -> None:
    """Raise UsageProblem if nothing was run, or if every call failed with the same error on a named device."""
    if not (report.rows or any(verdict.calls for verdict in report.verdicts)):
        report.skipped += [f"{verdict.clause}: {text}" for verdict in report.verdicts for text in verdict.words][:1]
        raise UsageProblem("Nothing could be run: " + "; ".join(report.skipped).rstrip(".") + ".")
    problems = {finding.problem for finding in report.failures}
    runs = sum(row.cases for row in report.rows)
    if device and len(problems) == 1 and "" not in problems and len(report.failures) == runs:
        raise UsageProblem(f"--device {device}: nothing runs there: {problems.pop()}")
