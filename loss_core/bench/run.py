"""`bench`: choose the calls and implementations, and measure them."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from datetime import datetime
from typing import Any

import numpy as np

from loss_core import __version__
from loss_core.baselines import TIMED
from loss_core.bench.measure.job import Job
from loss_core.bench.measure.machine import describe_machine
from loss_core.bench.measure.rounds import Progress, Run
from loss_core.bench.report import BASELINE, FLAG, ROOFLINE, BenchReport, BenchRow, Missing, call_text
from loss_core.bench.workloads import Workload
from loss_core.check.calls import distinct_names
from loss_core.check.sharded import can_be_sharded
from loss_core.dispatch.flags import all_flags, flag_status, parse_flag, usable_flag
from loss_core.dtypes import float_format
from loss_core.loss_config import LossConfig
from loss_core.losses.definition import need_definition
from loss_core.registry import LOSS_CONFIG_REGISTRY, our_losses

# Small enough for a laptop, with a vocabulary of common size.
DEFAULT_SHAPE = (2048, 32000, 512)


def bench(
    config: str | LossConfig | Sequence[str | LossConfig] | None = None,
    backends: Sequence[str] | None = None,
    *,
    shapes: Sequence[tuple[int, ...]] = (),
    workloads: Sequence[Workload] = (),
    dtypes: Sequence[str] = ("float32",),
    device: str = "cpu",
    ignored: float | Sequence[float] = 0.0,
    baselines: Sequence[str] | None = None,
    tp: int = 1,
    count_known: bool = False,
    forward_only: bool = False,
    rounds: int = 7,
    threads: int | None = None,
    seed: int = 0,
    timeout: float = 300.0,
    time_limit: float | None = None,
    imports: Sequence[str] = (),
    progress: Progress | None = None,
    save: Callable[[BenchReport], None] | None = None,
) -> BenchReport:
    """Measure time, peak memory, first call and error of losses, for flags and baselines.

    Args:
        config: registry name (then with reduction "mean", as in training), a config, a list of these, or None for
            our losses. A user-defined loss needs a definition: `loss_core.register_loss(..., definition=...)`.
        backends: flags; None for every flag that is usable here.
        shapes: each (T, V) or (T, V, H); losses over hidden states need H, the others ignore it. Without shapes and
            workloads: DEFAULT_SHAPE.
        workloads: shapes of real models, such as `loss_core.bench.workloads.WORKLOADS["qwen3-8b"]`; they also set the
            softcap of losses that have one.
        dtypes: of the inputs, such as "bfloat16".
        device: "cpu", "cuda", "cuda:1".
        ignored: share of labels that are ignore_index, in [0, 1); several shares are separate calls.
        baselines: names of `loss_core.baselines.TIMED`; None for all that are installed, () for none.
        tp: ranks that shard the vocabulary, split as by torch.chunk. On torch one process per rank, with NCCL and one
            device per rank on CUDA, else with gloo, and `threads` divided among them; on JAX one process with as many
            devices. The time of a call is that of the slowest rank, its memory that of the rank with the largest peak.
        count_known: pass the count of valid tokens to our fused loss as num_valid_tokens. Without it, ignored tokens
            take part in products under jit and on accelerators. Baselines have no such argument.
        forward_only: the loss without gradients.
        rounds: how often each implementation is timed, in a new order each time.
        threads: per implementation; None for all cores.
        seed: of the inputs and of the order of each round.
        timeout: of one request to a process, in seconds.
        time_limit: of the run, in seconds; no call is started after it.
        imports: modules that register user-defined losses, for the worker processes.
        progress: called as progress(done, total, label).
        save: called with the report after each measured call, so that an interrupted run keeps its results.
    Returns:
        A BenchReport; an implementation that failed is a row with its error.
    Raises:
        BackendUnavailable: if a named flag is not usable here.
        ValueError, TypeError: for invalid names, shapes, dtypes or shares.
    """
    start = time.perf_counter()
    losses = _losses(config)
    shares = list(dict.fromkeys([ignored] if isinstance(ignored, int | float) else ignored)) or [0.0]
    _check(shapes, dtypes, shares, rounds)
    _check_ranks(tp, device)
    _check_count(count_known, losses, tp)
    threads = _num_cores() if threads is None else threads
    report = BenchReport(
        versions={"loss-core": __version__, "python": platform.python_version(), "numpy": np.__version__},
        settings={
            "device": device, "ignored": shares, "forward_only": forward_only, "rounds": rounds, "threads": threads,
            "seed": seed, "tp": tp, "count_known": count_known,
        },
        machine=describe_machine(),
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
    )  # fmt: skip
    flags = _flags(backends, report)
    losses = _shardable(losses, tp, report)
    usable = _baselines(baselines, tp, report)
    options: dict[str, Any] = {
        "device": device, "seed": seed, "forward_only": forward_only, "tp": tp, "count_known": count_known
    }  # fmt: skip
    jobs = [
        (name, Job(loss.to_dict(), shape, dtype, ignored=share, **options))
        for name, loss, shape in _calls(losses, shapes, workloads)
        for dtype in dtypes
        for share in shares
    ]
    deadline = None if time_limit is None else start + time_limit
    with Run(report, threads, imports, timeout, deadline, seed, progress) as run:
        run.total = len(jobs) * (rounds + 1)
        for index, (name, job) in enumerate(jobs):
            if index and run.past_deadline():
                call = call_text(name, job.shape, job.dtype, job.ignored)
                report.missing.append(Missing(call, "the time limit was reached"))
                continue
            run.measure_group(_rows(name, job, flags, usable), job, rounds)
            report.seconds = time.perf_counter() - start
            if save:
                save(report)
    report.machine["after"] = describe_machine().get("accelerators", [])
    report.seconds = time.perf_counter() - start
    if progress:
        progress(run.total, run.total, "done")
    return report


def _rows(loss: str, job: Job, flags: Sequence[str], baselines: Sequence[str]) -> list[BenchRow]:
    """An empty row for each implementation of a call, the roofline first."""
    supported = [TIMED[name] for name in baselines if TIMED[name].fits(job.definition.name, job.tp)]
    names = [
        (ROOFLINE, ROOFLINE, "jax" if TIMED["compiled-torch"].missing() else "torch"),
        *((flag, FLAG, parse_flag(flag).backend) for flag in flags),
        *((baseline.name, BASELINE, baseline.framework) for baseline in supported),
    ]
    return [BenchRow(loss, *name, job.shape, job.dtype, dict(job.config), job.ignored) for name in names]


def _losses(config: str | LossConfig | Sequence[str | LossConfig] | None) -> list[LossConfig]:
    if config is None:
        config = our_losses()
    configs = [config] if isinstance(config, str | LossConfig) else list(config)
    losses = [_config_by_name(loss) if isinstance(loss, str) else loss for loss in configs]
    for loss in losses:
        if not isinstance(loss, LossConfig):
            raise TypeError(f"Expected a registry name or a LossConfig, got {type(loss).__name__}.")
        need_definition(loss)
    return losses


def _config_by_name(name: str) -> LossConfig:
    """Default config of a registered loss, with reduction "mean" where it has one, as in most training steps."""
    config_cls = LOSS_CONFIG_REGISTRY.get(name)
    if config_cls is None:
        raise ValueError(f"Unknown loss {name!r}. Choose one of: {', '.join(LOSS_CONFIG_REGISTRY)}.")
    loss = config_cls()
    if hasattr(loss, "reduction"):
        loss.reduction = "mean"
    return loss


def _check(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str], shares: Sequence[float], rounds: int) -> None:
    for shape in shapes:
        if len(shape) not in (2, 3) or not all(isinstance(n, int) and n >= 1 for n in shape):
            raise ValueError(f"shape must be (T, V) or (T, V, H) with sizes >= 1, got {tuple(shape)}.")
    for dtype in dtypes:
        float_format(dtype)
    for share in shares:
        if not 0 <= share < 1:
            raise ValueError(f"ignored must be a share in [0, 1), got {share}.")
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds}.")


def _check_ranks(tp: int, device: str) -> None:
    if isinstance(tp, bool) or not isinstance(tp, int) or tp < 1:
        raise ValueError(f"tp must be a whole number >= 1, got {tp!r}.")
    if tp > 1 and ":" in device:
        kind = device.partition(":")[0]
        raise ValueError(f"device {device!r} is one device, and tp={tp} takes {tp}: name the kind alone, {kind!r}.")


def _shardable(losses: Sequence[LossConfig], tp: int, report: BenchReport) -> list[LossConfig]:
    """The losses whose vocabulary can be sharded over `tp` ranks; the others are listed as missing."""
    shardable = []
    for name, loss in zip(distinct_names(losses), losses, strict=True):
        if tp == 1 or can_be_sharded(loss):
            shardable.append(loss)
        else:
            report.missing.append(Missing(name, "it has no tp_group"))
    return shardable


def _check_count(count_known: bool, losses: Sequence[LossConfig], tp: int) -> None:
    if not count_known:
        return
    if others := [loss for loss in losses if need_definition(loss).find("hint") is None]:
        raise ValueError(
            f"count_known is for losses that take num_valid_tokens, such as FusedLinearCrossEntropy; "
            f"{type(others[0]).__name__} does not."
        )
    if tp > 1:
        raise ValueError(f"count_known is for a vocabulary that one process holds whole, not for tp={tp}.")


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _flags(backends: Sequence[str] | None, report: BenchReport) -> list[str]:
    """Full names of the flags to run. An unusable flag raises if it is named; with None it is listed as missing."""
    if backends is not None:
        return list(dict.fromkeys(usable_flag(flag) for flag in backends))
    statuses = [flag_status(flag) for flag in all_flags()]
    report.missing += [Missing(s.flag, s.reason, s.install) for s in statuses if not s.usable]
    return [status.flag for status in statuses if status.usable]


def _baselines(names: Sequence[str] | None, tp: int, report: BenchReport) -> list[str]:
    """Baselines to run. Others are listed as missing: not installed, or not for `tp` ranks (for tp=1 only if named)."""
    for name in names or ():
        if name not in TIMED:
            raise ValueError(f"Unknown baseline {name!r}. Choose among: {', '.join(TIMED)}.")
    usable = []
    for name in TIMED if names is None else dict.fromkeys(names):
        baseline = TIMED[name]
        if not baseline.fits_ranks(tp):
            if tp > 1 or names is not None:
                why = "not over tensor parallel" if tp > 1 else "over tensor parallel only"
                report.missing.append(Missing(name, why))
        elif absent := baseline.missing():
            report.missing.append(Missing(name, f"needs {', '.join(absent)}", baseline.install))
        else:
            usable.append(name)
    return usable


def _calls(
    losses: Sequence[LossConfig], shapes: Sequence[tuple[int, ...]], workloads: Sequence[Workload]
) -> list[tuple[str, LossConfig, tuple[int, ...]]]:
    """Distinct calls, every loss on every shape: display name, config, and the sizes that the loss takes."""
    if not shapes and not workloads:
        shapes = [DEFAULT_SHAPE]
    calls: list[tuple[str, LossConfig, tuple[int, ...]]] = []
    for name, loss in zip(distinct_names(losses), losses, strict=True):
        num_sizes = 3 if any("H" in argument.dims for argument in need_definition(loss).inputs) else 2
        for shape in shapes:
            if len(shape) < num_sizes:
                raise ValueError(f"{name} needs a shape (T, V, H) with the hidden size, got {tuple(shape)}.")
            calls.append((name, loss, tuple(shape[:num_sizes])))
        for workload in workloads:
            has_softcap = any(f.name == "logit_softcapping" for f in fields(loss))
            sized: LossConfig = replace(loss, logit_softcapping=workload.softcap) if has_softcap else loss
            calls.append((f"{name}, {workload.name}", sized, workload.shape[:num_sizes]))
    return [call for i, call in enumerate(calls) if call not in calls[:i]]
