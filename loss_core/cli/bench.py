"""`loss-core bench`: from options to a report on the terminal, as JSON and as a page."""

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
    command,
    import_modules,
    known_dtypes,
    known_word,
    note,
    progress_bar,
    read_losses,
    shape_of,
    write_outputs,
    writing,
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
        list[str] | None, typer.Option(metavar="NAME", help=f"The output layer of {', '.join(WORKLOADS)}.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(metavar="T", min=1, help="Tokens of each --workload.")] = None,
    dtype: Dtypes = None,
    device: Device = "cpu",
    ignored: Annotated[
        list[float] | None, typer.Option(metavar="SHARE", help="Share of labels that are ignored. Default: 0.")
    ] = None,
    baselines: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"{', '.join(TIMED)}; all or none. Default: all.")
    ] = None,
    tp: Annotated[
        int, typer.Option(metavar="N", min=1, help="Ranks that share the vocabulary, started and ended by bench.")
    ] = 1,
    count_known: Annotated[
        bool, typer.Option("--count-known", help="Tell the fused loss how many labels count: num_valid_tokens.")
    ] = False,
    forward_only: Annotated[bool, typer.Option("--forward-only", help="The loss alone, no gradients.")] = False,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="How often each is asked.")] = 7,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="Threads of each process.")] = None,
    seed: Seed = 0,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="After which one implementation is given up.")
    ] = 300.0,
    time_limit: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=1, help="After which nothing new is begun.")
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Keep the fastest flags for this machine, for auto to read.")
    ] = False,
    json: Json = None,
    page: Page = None,
    modules: Modules = None,
) -> int:
    """Measure losses beside the baselines that are installed: time, memory, error.

    Without options: every loss and flag (also --backend all), 2,048 tokens, vocabulary 32,000, hidden size 512,
    float32. A loss by its bare name has reduction mean.

    May be repeated: --config, --backend, --shape, --workload, --dtype, --ignored, --baselines,
    --import.

    Exit code: 0, or 1 when no flag ran, one failed or was wrong, 2 wrong usage, 130 Ctrl-C.
    """
    out, err = Console(), Console(stderr=True)
    import_modules(modules or ())
    check_outputs(json, page)
    losses = read_losses(config)
    shapes = [shape_of(text) for text in shape or ()]
    workloads = _workloads(workload or (), tokens)
    dtypes = known_dtypes(dtype)
    named = _baselines(baselines or ())
    for why, clash in (
        ("keeps choices for training steps; leave out --forward-only", forward_only),
        ("keeps one choice for each shape; give --ignored once", len(ignored or ()) > 1),
        ("keeps choices for losses that one process holds whole; leave out --tp", tp > 1),
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
    found = [WORKLOADS[known_word("--workload", name, WORKLOADS)] for name in names]
    if tokens and not found:
        raise UsageProblem("--tokens goes with --workload; a --shape has its own T.")
    return [replace(load, tokens=tokens or load.tokens) for load in found]


def _baselines(names: Sequence[str]) -> list[str] | None:
    """None for all; each option may name several, with commas."""
    wanted = [name for text in names for name in text.split(",") if name]
    if not wanted or "all" in wanted:
        return None
    if wanted == ["none"]:
        return []
    return [known_word("--baselines", name, TIMED, also=", all, none") for name in wanted]


def _tune(report: BenchReport, err: Console) -> None:
    chosen = choices_of(report)
    if not chosen:
        raise UsageProblem("--tune found nothing to keep: no flag that names a kernel gave a result.")
    with writing():
        path = store_choices(chosen)
    for entry in chosen:
        note(err, f"{entry['loss']} {'x'.join(map(str, entry['shape']))} {entry['dtype']}: {entry['flag']}")
    note(err, f"wrote {path}")
