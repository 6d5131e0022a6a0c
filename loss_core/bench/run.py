"""`bench`: which calls are measured, and of which implementations."""

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

# Small enough for a laptop, with a vocabulary of the usual size.
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
    """Measure losses: time, memory, first call, and error, for flags and baselines.

    Args:
        config: registry name (then with reduction "mean", as in training), a config, a list of these, or None for
            the four losses. A loss of your own needs a definition: `loss_core.register_loss(..., definition=...)`.
        backends: flags; None for every flag that can be used here.
        shapes: each (T, V) or (T, V, H); losses over hidden states need H, the others leave it out. Without shapes and
            workloads: DEFAULT_SHAPE.
        workloads: shapes of real models, such as `loss_core.bench.workloads.WORKLOADS["qwen3-8b"]`; a loss with a
            softcap takes theirs as well.
        dtypes: of the inputs, such as "bfloat16".
        device: "cpu", "cuda", "cuda:1".
        ignored: share of labels that are ignore_index, in [0, 1); each of several makes calls of its own.
        baselines: names of `loss_core.baselines.TIMED`; None for all that are installed, () for none.
        tp: ranks that share the vocabulary, in parts as torch.chunk makes them. On torch a process each, with NCCL and
            a device each on CUDA, else gloo, and `threads` shared among them; on JAX one process with as many devices.
            A call takes as long as on the slowest rank, and as much memory as on the one that holds most.
        count_known: give our fused loss the number of labels that are not ignored, as num_valid_tokens, as a caller who
            knows it does: without it, ignored tokens take part in products under jit and on accelerators. Baselines
            have no such argument.
        forward_only: the loss alone, without gradients.
        rounds: how often each implementation is asked, in a new order each time.
        threads: of each process; None for all cores.
        seed: of the inputs and of the orders.
        timeout: seconds after which one answer of a process is given up.
        time_limit: seconds for the whole; no call is begun after that.
        imports: modules that register losses of your own, for the worker processes.
        progress: called as progress(done, total, label).
        save: called with the report after each call that was measured, so that a run that is cut off leaves something.
    Returns:
        A BenchReport; an implementation that failed is a row with its error.
    Raises:
        BackendUnavailable: a flag that is named can't be used here, or none can.
        ValueError, TypeError: for names, shapes, dtypes and shares that don't exist.
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
    how: dict[str, Any] = {
        "device": device, "seed": seed, "forward_only": forward_only, "tp": tp, "count_known": count_known
    }  # fmt: skip
    jobs = [
        (name, Job(loss.to_dict(), shape, dtype, ignored=share, **how))
        for name, loss, shape in _calls(losses, shapes, workloads)
        for dtype in dtypes
        for share in shares
    ]
    deadline = None if time_limit is None else start + time_limit
    with Run(report, threads, imports, timeout, deadline, seed, progress) as run:
        run.total = len(jobs) * (rounds + 1)
        for index, (name, job) in enumerate(jobs):
            if index and run.late():
                call = call_text(name, job.shape, job.dtype, job.ignored)
                report.missing.append(Missing(call, "the time limit was reached"))
                continue
            run.group(_rows(name, job, flags, usable), job, rounds)
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
    fitting = [TIMED[name] for name in baselines if TIMED[name].fits(job.definition.name, job.tp)]
    names = [
        (ROOFLINE, ROOFLINE, "jax" if TIMED["compiled-torch"].missing() else "torch"),
        *((flag, FLAG, parse_flag(flag).backend) for flag in flags),
        *((baseline.name, BASELINE, baseline.framework) for baseline in fitting),
    ]
    return [BenchRow(loss, *name, job.shape, job.dtype, dict(job.config), job.ignored) for name in names]


def _losses(config: str | LossConfig | Sequence[str | LossConfig] | None) -> list[LossConfig]:
    if config is None:
        config = our_losses()
    given = [config] if isinstance(config, str | LossConfig) else list(config)
    made = [_named(loss) if isinstance(loss, str) else loss for loss in given]
    for loss in made:
        if not isinstance(loss, LossConfig):
            raise TypeError(f"Expected a registry name or a LossConfig, got {type(loss).__name__}.")
        need_definition(loss)
    return made


def _named(name: str) -> LossConfig:
    """A loss by its name, with the mean over the valid tokens, as most training steps take it."""
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
    """The losses that so many ranks can share; the others are noted."""
    kept = []
    for name, loss in zip(distinct_names(losses), losses, strict=True):
        if tp == 1 or can_be_sharded(loss):
            kept.append(loss)
        else:
            report.missing.append(Missing(name, "it has no tp_group"))
    return kept


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
    """Flags in full. What can't be used is noted where all were asked for, and raises where it was named."""
    if backends is not None:
        return list(dict.fromkeys(usable_flag(flag) for flag in backends))
    statuses = [flag_status(flag) for flag in all_flags()]
    report.missing += [Missing(s.flag, s.reason, s.install) for s in statuses if not s.usable]
    return [status.flag for status in statuses if status.usable]


def _baselines(names: Sequence[str] | None, tp: int, report: BenchReport) -> list[str]:
    """Baselines to run. One that is not installed, or not for so many ranks, is noted; the latter where named."""
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
    """Every loss on every shape: display name, config, and the sizes that the loss takes; each call once."""
    if not shapes and not workloads:
        shapes = [DEFAULT_SHAPE]
    found: list[tuple[str, LossConfig, tuple[int, ...]]] = []
    for name, loss in zip(distinct_names(losses), losses, strict=True):
        num_sizes = 3 if any("H" in argument.dims for argument in need_definition(loss).inputs) else 2
        for shape in shapes:
            if len(shape) < num_sizes:
                raise ValueError(f"{name} needs a shape (T, V, H) with the hidden size, got {tuple(shape)}.")
            found.append((name, loss, tuple(shape[:num_sizes])))
        for load in workloads:
            has_softcap = any(f.name == "logit_softcapping" for f in fields(loss))
            sized: LossConfig = replace(loss, logit_softcapping=load.softcap) if has_softcap else loss
            found.append((f"{name}, {load.name}", sized, load.shape[:num_sizes]))
    return [call for i, call in enumerate(found) if call not in found[:i]]
