"""`loss-core bench`: parse options, run the benchmark, write the report to the terminal, as JSON and as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console

from loss_core.baselines import TIMED
from loss_core.bench import bench
from loss_core.bench.html import bench_page
from loss_core.bench.report import FLAG, BenchReport
from loss_core.bench.text import print_bench
from loss_core.bench.tune import choices_of
from loss_core.bench.workloads import WORKLOADS, Workload
from loss_core.cli.common import (
    Backends,
    Configs,
    Device,
    Dtypes,
    Json,
    Modules,
    Page,
    Seed,
    Shapes,
    check_outputs,
    checked_choice,
    checked_dtypes,
    command,
    import_modules,
    parse_shape,
    print_text,
    progress_bar,
    read_losses,
    reporting_write_errors,
    write_outputs,
)
from loss_core.dispatch.protocol import BackendUnavailable
from loss_core.dispatch.tuned import store_choices
from loss_core.usage import UsageProblem


@command
def bench_command(
    ctx: typer.Context,
    config: Configs = None,
    backend: Backends = None,
    shape: Shapes = None,
    workload: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"Size of a model's output layer: {', '.join(WORKLOADS)}.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(metavar="T", min=1, help="Tokens of each --workload.")] = None,
    dtype: Dtypes = None,
    device: Device = "cpu",
    ignored: Annotated[
        list[float] | None, typer.Option(metavar="SHARE", help="Fraction of labels that are ignored. Default: 0.")
    ] = None,
    baselines: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"Any of {', '.join(TIMED)}; all or none. Default: all.")
    ] = None,
    tp: Annotated[
        int, typer.Option(metavar="N", min=1, help="Shard the vocabulary over N ranks, started by bench.")
    ] = 1,
    count_known: Annotated[
        bool, typer.Option("--count-known", help="Pass num_valid_tokens, the count of valid labels.")
    ] = False,
    forward_only: Annotated[bool, typer.Option("--forward-only", help="Measure the forward only.")] = False,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Measurements of each implementation.")] = 7,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="Threads of each process.")] = None,
    seed: Seed = 0,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=1, help="Time limit of one implementation.")] = 300.0,
    time_limit: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=1, help="Start no new measurement after this time.")
    ] = None,
    tune: Annotated[bool, typer.Option("--tune", help="Store the fastest flags of this machine for auto.")] = False,
    json: Json = None,
    page: Page = None,
    modules: Modules = None,
) -> int:
    """Measure time, memory and error of losses, and of the baselines that are installed.

    Without options: every loss and flag (also --backend all), 2,048 tokens, vocabulary 32,000, hidden size 512,
    float32. A loss given by name only has reduction mean.

    May be repeated: --config, --backend, --shape, --workload, --dtype, --ignored, --baselines, --import.

    Exit code: 0 all flags ran and are right, 1 none ran, or one failed or was wrong, 2 wrong usage, 130 Ctrl-C.
    """
    out, err = Console(), Console(stderr=True)
    import_modules(modules or ())
    check_outputs(json, page)
    losses = read_losses(config)
    shapes = [parse_shape(text) for text in shape or ()]
    workloads = _workloads(workload or (), tokens)
    dtypes = checked_dtypes(dtype)
    named = _baselines(baselines or ())
    for why, clash in (
        ("stores choices for training steps; leave out --forward-only", forward_only),
        ("stores one choice for each shape; give --ignored once", len(ignored or ()) > 1),
        ("stores choices for unsharded losses; leave out --tp", tp > 1),
    ):
        if tune and clash:
            raise UsageProblem(f"--tune {why}.")
    with progress_bar(err) as progress:
        try:
            report = bench(
                losses or None,
                None if not backend or "all" in backend else backend,
                shapes=shapes,
                workloads=workloads,
                dtypes=dtypes or ["float32"],
                device=device or "cpu",
                ignored=ignored or (),
                baselines=named,
                tp=tp,
                count_known=count_known,
                forward_only=forward_only,
                rounds=rounds,
                threads=threads,
                seed=seed,
                timeout=timeout,
                time_limit=time_limit,
                imports=modules or (),
                progress=progress,
            )
        except (BackendUnavailable, ValueError, TypeError) as error:
            raise UsageProblem(str(error)) from error
    report.command = ctx.obj or "loss-core bench"
    print_bench(out, report)
    write_outputs([(json, lambda: report.to_json() + "\n"), (page, lambda: bench_page(report))], err)
    if tune:
        _tune(report, err)
    ours = [row for row in report.rows if row.kind == FLAG]
    return 0 if ours and all(not row.error and not row.wrong for row in ours) else 1


def _workloads(names: Sequence[str], tokens: int | None) -> list[Workload]:
    found = [WORKLOADS[checked_choice("--workload", name, WORKLOADS)] for name in names]
    if tokens and not found:
        raise UsageProblem("--tokens goes with --workload; a --shape has its own T.")
    return [replace(load, tokens=tokens or load.tokens) for load in found]


def _baselines(names: Sequence[str]) -> list[str] | None:
    """Names of baselines, of which each option may have several, separated by commas; None for all."""
    wanted = [name for text in names for name in text.split(",") if name]
    if not wanted or "all" in wanted:
        return None
    if wanted == ["none"]:
        return []
    return [checked_choice("--baselines", name, TIMED, also=", all, none") for name in wanted]


def _tune(report: BenchReport, err: Console) -> None:
    chosen = choices_of(report)
    if not chosen:
        raise UsageProblem("--tune found nothing to store: no flag that names a kernel returned a result.")
    with reporting_write_errors():
        path = store_choices(chosen)
    for entry in chosen:
        print_text(err, f"{entry['loss']} {'x'.join(map(str, entry['shape']))} {entry['dtype']}: {entry['flag']}")
    print_text(err, f"wrote {path}")
