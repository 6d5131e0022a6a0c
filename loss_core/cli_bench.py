"""`loss-core bench`: from options to a report on the terminal, as JSON and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loss_core.backend import BackendUnavailable
from loss_core.bench import bench
from loss_core.bench_peers import PEERS
from loss_core.bench_report import BenchReport
from loss_core.bench_text import print_bench
from loss_core.bench_tune import choices_of
from loss_core.choices import store_choices
from loss_core.cli_configs import UsageProblem, closest, read_configs
from loss_core.cli_parts import PAGE_LIBRARIES, check_output, import_modules, progress_bar, shape_of
from loss_core.dtypes import FORMATS
from loss_core.workloads import WORKLOADS, Workload

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class BenchOptions:
    """Options of `loss-core bench`, as they were typed; None or empty where left out."""

    configs: Sequence[str] = ()
    backends: Sequence[str] = ()
    shapes: Sequence[str] = ()
    workloads: Sequence[str] = ()
    tokens: int | None = None
    dtypes: Sequence[str] = ()
    device: str = "cpu"
    ignored: Sequence[float] = ()
    peers: Sequence[str] = ()
    tp: int = 1
    count_known: bool = False
    forward_only: bool = False
    rounds: int = 7
    threads: int | None = None
    seed: int = 0
    timeout: float = 300.0
    time_limit: float | None = None
    tune: bool = False
    json: Path | None = None
    report: Path | None = None
    modules: Sequence[str] = ()
    command: str = "loss-core bench"


def run_bench(options: BenchOptions, out: Console, err: Console) -> int:
    """Measure, print, write. Returns the exit code: 0, or 1 where none of our flags ran, one failed or was wrong.

    Raises:
        UsageProblem: an option can't be used.
    """
    import_modules(options.modules)
    check_output("--json", options.json)
    check_output("--report", options.report, needs=PAGE_LIBRARIES)
    losses = [loss for source in options.configs for loss in read_configs(source)]
    losses = [loss for i, loss in enumerate(losses) if loss not in losses[:i]]
    shapes = [shape_of(text) for text in options.shapes]
    workloads = _workloads(options)
    for dtype in options.dtypes:
        if dtype not in FORMATS:
            raise UsageProblem(f"--dtype {dtype!r} is unknown{closest(dtype, FORMATS)} Known: {', '.join(FORMATS)}.")
    peers = _peers(options.peers)
    if options.tune and options.forward_only:
        raise UsageProblem("--tune keeps choices for training steps; leave out --forward-only.")
    if options.tune and len(options.ignored) > 1:
        raise UsageProblem("--tune keeps one choice for each shape; give --ignored once.")
    if options.tune and options.tp > 1:
        raise UsageProblem("--tune keeps choices for losses that one process holds whole; leave out --tp.")
    flags = None if not options.backends or "all" in options.backends else list(options.backends)
    with progress_bar(err) as progress:
        try:
            report = bench(
                losses or None,
                flags,
                shapes=shapes,
                workloads=workloads,
                dtypes=list(options.dtypes) or ["float32"],
                device=options.device,
                ignored=options.ignored,
                peers=peers,
                tp=options.tp,
                count_known=options.count_known,
                forward_only=options.forward_only,
                rounds=options.rounds,
                threads=options.threads,
                seed=options.seed,
                timeout=options.timeout,
                time_limit=options.time_limit,
                imports=options.modules,
                progress=progress,
            )
        except (BackendUnavailable, ValueError, TypeError) as error:
            raise UsageProblem(str(error)) from error
    report.command = options.command
    print_bench(out, report)
    _write(options, report, err)
    if options.tune:
        _tune(report, err)
    ours = [row for row in report.rows if row.kind == "flag"]
    return 0 if ours and all(not row.error and not row.wrong for row in ours) else 1


def _workloads(options: BenchOptions) -> list[Workload]:
    found = []
    for name in options.workloads:
        if name not in WORKLOADS:
            raise UsageProblem(
                f"--workload {name!r} is unknown{closest(name, WORKLOADS)} Known: {', '.join(WORKLOADS)}."
            )
        found.append(replace(WORKLOADS[name], tokens=options.tokens or WORKLOADS[name].tokens))
    if options.tokens and not found:
        raise UsageProblem("--tokens goes with --workload; a --shape has its own T.")
    return found


def _peers(names: Sequence[str]) -> list[str] | None:
    """None for all; each option may name several, with commas."""
    wanted = [name for text in names for name in text.split(",") if name]
    if not wanted or "all" in wanted:
        return None
    if wanted == ["none"]:
        return []
    for name in wanted:
        if name not in PEERS:
            raise UsageProblem(
                f"--peers {name!r} is unknown{closest(name, PEERS)} Known: {', '.join(PEERS)}, all, none."
            )
    return wanted


def _tune(report: BenchReport, err: Console) -> None:
    chosen = choices_of(report)
    if not chosen:
        raise UsageProblem("--tune found nothing to keep: no flag that names a kernel gave a result.")
    try:
        path = store_choices(chosen)
    except OSError as error:
        raise UsageProblem(f"{error.filename} can't be written: {error.strerror or error}.") from error
    for entry in chosen:
        sizes = "x".join(map(str, entry["shape"]))
        err.print(f"{entry['loss']} {sizes} {entry['dtype']}: {entry['flag']}", markup=False, highlight=False)
    err.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


def _write(options: BenchOptions, report: BenchReport, err: Console) -> None:
    try:
        if options.json is not None:
            options.json.write_text(report.to_json() + "\n", "utf-8")
        if options.report is not None:
            from loss_core.bench_html import bench_page

            options.report.write_text(bench_page(report), "utf-8")
    except OSError as error:
        raise UsageProblem(f"{error.filename} can't be written: {error.strerror or error}.") from error
    for path in filter(None, (options.json, options.report)):
        err.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
