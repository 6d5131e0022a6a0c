"""The benchmark: every flag and every peer on the same inputs, beside the floor and beside float64.

Each implementation runs in a process of its own that lives through all rounds; one process works at a time, and
every round asks them in a new random order, because a fixed one makes identical code differ.

>>> from loss_core.bench import bench
>>> report = bench("KDLoss", ["torch:eager"], shapes=[(64, 1000)], rounds=3)  # doctest: +SKIP
>>> report.rows[0].implementation  # doctest: +SKIP
'floor'
"""

from __future__ import annotations

import os
import platform
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from loss_core import __version__
from loss_core.backend import AUTO, BackendUnavailable, all_flags, flag_status, parse_flag
from loss_core.bench_errors import Judge
from loss_core.bench_floor import least_work, words
from loss_core.bench_job import Job, input_bytes, kind_of
from loss_core.bench_machine import describe_machine, free_memory
from loss_core.bench_peers import PEERS, peers_for
from loss_core.bench_process import WorkerFailed, WorkerProcess
from loss_core.bench_report import FLAG, FLOOR, PEER, BenchReport, BenchRow, Missing
from loss_core.build import LOSS_CONFIG_REGISTRY
from loss_core.calls import distinct_names
from loss_core.config import FusedLinearCEConfig, LossConfig
from loss_core.dtypes import float_format
from loss_core.workloads import Workload

Progress = Callable[[int, int, str], None]

# Small enough for a laptop, with a vocabulary of the usual size.
DEFAULT_SHAPE = (2048, 32000, 512)

# Seconds of timed calls of one implementation in one round; at least one call is made.
_ROUND_SECONDS = 0.1
_MOST_CALLS = 1000

# A process that loads torch or JAX, on a machine that is busy.
_IMPORT_SECONDS = 120.0

__all__ = ["BenchReport", "BenchRow", "bench"]


def bench(
    config: str | LossConfig | Sequence[str | LossConfig] | None = None,
    backends: Sequence[str] | None = None,
    *,
    shapes: Sequence[tuple[int, ...]] = (),
    workloads: Sequence[Workload] = (),
    dtypes: Sequence[str] = ("float32",),
    device: str = "cpu",
    ignored: float = 0.0,
    peers: Sequence[str] | None = None,
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
    """Measure losses: time, memory, first call, and error, for flags and peers.

    Args:
        config: registry name (then with reduction "mean", as in training), a config, a list of these, or None for
            the four losses.
        backends: flags; None for every flag that can be used here.
        shapes: each (T, V) or (T, V, H); the fused loss needs H, the others leave it out. Without shapes and
            workloads: DEFAULT_SHAPE.
        workloads: shapes of real models, such as `loss_core.workloads.WORKLOADS["qwen3-8b"]`; the fused loss takes
            their softcap as well.
        dtypes: of the inputs, such as "bfloat16".
        device: "cpu", "cuda", "cuda:1".
        ignored: share of labels that are ignore_index, in [0, 1).
        peers: names of `loss_core.bench_peers.PEERS`; None for all that are installed, () for none.
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
    _check(shapes, dtypes, ignored, rounds)
    threads = _num_cores() if threads is None else threads
    report = BenchReport(
        versions={"loss-core": __version__, "python": platform.python_version(), "numpy": np.__version__},
        settings={
            "device": device, "ignored": ignored, "forward_only": forward_only, "rounds": rounds, "threads": threads,
            "seed": seed,
        },
        machine=describe_machine(),
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
    )  # fmt: skip
    flags = _flags(backends, report)
    chosen_peers = _peers(peers, report)
    how: dict[str, Any] = {
        "device": device,
        "ignored": ignored,
        "seed": seed,
        "forward_only": forward_only,
        "imports": tuple(imports),
    }
    jobs = [
        (name, Job(loss.to_dict(), shape, dtype, **how))
        for name, loss, shape in _calls(losses, shapes, workloads)
        for dtype in dtypes
    ]
    run = _Run(report, threads, timeout, None if time_limit is None else start + time_limit, seed, progress)
    run.total = len(jobs) * (rounds + 1)
    try:
        for index, (name, job) in enumerate(jobs):
            if index and run.late():
                report.missing.append(Missing(f"{name} {job.shape} {job.dtype}", "the time limit was reached"))
                continue
            run.group(name, job, flags, chosen_peers, rounds)
            report.seconds = time.perf_counter() - start
            if save:
                save(report)
    finally:
        run.stop()
    report.machine["after"] = describe_machine().get("accelerators", [])
    report.seconds = time.perf_counter() - start
    if progress:
        progress(run.total, run.total, "done")
    return report


def _losses(config: str | LossConfig | Sequence[str | LossConfig] | None) -> list[LossConfig]:
    if config is None:
        config = ["MaskedCrossEntropy", "FusedLinearCrossEntropy", "TEParallelCrossEntropy", "KDLoss"]
    given = [config] if isinstance(config, str | LossConfig) else list(config)
    made = [_named(loss) if isinstance(loss, str) else loss for loss in given]
    for loss in made:
        if not isinstance(loss, LossConfig):
            raise TypeError(f"Expected a registry name or a LossConfig, got {type(loss).__name__}.")
        kind_of(loss)
    return made


def _named(name: str) -> LossConfig:
    """A loss by its name, with the mean over the tokens that count, as most training steps take it."""
    config_cls = LOSS_CONFIG_REGISTRY.get(name)
    if config_cls is None:
        raise ValueError(f"Unknown loss {name!r}. Choose one of: {', '.join(LOSS_CONFIG_REGISTRY)}.")
    loss = config_cls()
    if hasattr(loss, "reduction"):
        loss.reduction = "mean"
    return loss


def _check(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str], ignored: float, rounds: int) -> None:
    for shape in shapes:
        if len(shape) not in (2, 3) or not all(isinstance(n, int) and n >= 1 for n in shape):
            raise ValueError(f"shape must be (T, V) or (T, V, H) with sizes >= 1, got {tuple(shape)}.")
    for dtype in dtypes:
        float_format(dtype)
    if not 0 <= ignored < 1:
        raise ValueError(f"ignored must be a share in [0, 1), got {ignored}.")
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds}.")


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _flags(backends: Sequence[str] | None, report: BenchReport) -> list[str]:
    """Flags in full. What can't be used is noted where all were asked for, and raises where it was named."""
    if backends is not None:
        return list(dict.fromkeys(_usable(flag) for flag in backends))
    statuses = [flag_status(flag) for flag in all_flags()]
    report.missing += [Missing(s.flag, s.reason, s.install) for s in statuses if not s.usable]
    return [status.flag for status in statuses if status.usable]


def _usable(flag: str) -> str:
    parsed = parse_flag(flag)
    if parsed.kernel != AUTO and not (status := flag_status(flag)).usable:
        raise BackendUnavailable(status.reason)
    return str(parsed)


def _peers(peers: Sequence[str] | None, report: BenchReport) -> list[str]:
    """Peers to run. A missing one is noted, with how to install it."""
    for name in peers or ():
        if name not in PEERS:
            raise ValueError(f"Unknown peer {name!r}. Choose among: {', '.join(PEERS)}.")
    wanted = list(PEERS) if peers is None else list(dict.fromkeys(peers))
    for name in wanted:
        if absent := PEERS[name].missing():
            report.missing.append(Missing(name, f"needs {', '.join(absent)}", PEERS[name].install))
    return [name for name in wanted if not PEERS[name].missing()]


def _calls(
    losses: Sequence[LossConfig], shapes: Sequence[tuple[int, ...]], workloads: Sequence[Workload]
) -> list[tuple[str, LossConfig, tuple[int, ...]]]:
    """Every loss on every shape: display name, config, and the sizes that the loss takes; each call once."""
    if not shapes and not workloads:
        shapes = [DEFAULT_SHAPE]
    found: list[tuple[str, LossConfig, tuple[int, ...]]] = []
    for name, loss in zip(distinct_names(losses), losses, strict=True):
        fused = isinstance(loss, FusedLinearCEConfig)
        for shape in shapes:
            if fused and len(shape) < 3:
                raise ValueError(f"{name} needs a shape (T, V, H) with the hidden size, got {tuple(shape)}.")
            found.append((name, loss, tuple(shape) if fused else tuple(shape[:2])))
        for load in workloads:
            sized = replace(loss, logit_softcapping=load.softcap) if isinstance(loss, FusedLinearCEConfig) else loss
            found.append((f"{name}, {load.name}", sized, load.shape if fused else load.shape[:2]))
    return [call for i, call in enumerate(found) if call not in found[:i]]


class _Run:
    """The processes of a run, which serve all its groups."""

    def __init__(
        self, report: BenchReport, threads: int, timeout: float, deadline: float | None, seed: int,
        progress: Progress | None,
    ) -> None:  # fmt: skip
        self.report = report
        self.threads = threads
        self.timeout = timeout
        self.deadline = deadline
        self.random = random.Random(seed)
        self.progress = progress
        self.total = self.done = 0
        self.workers: dict[str, WorkerProcess] = {}
        self.folder = tempfile.TemporaryDirectory(prefix="loss-core-bench-", ignore_cleanup_errors=True)

    def group(self, loss: str, job: Job, flags: Sequence[str], peers: Sequence[str], rounds: int) -> None:
        """Measure one call on every implementation."""
        fitting = {peer.name for peer in peers_for(kind_of(job.loss_config()), job.dtype)}
        names = [
            (FLOOR, FLOOR),
            *((flag, FLAG) for flag in flags),
            *((name, PEER) for name in peers if name in fitting),
        ]
        entries = [BenchRow(loss, name, kind, job.shape, job.dtype, dict(job.config)) for name, kind in names]
        entries[0].note = words(job)
        self.report.rows += entries
        self._start(entries, job)
        judge = Judge(job, Path(self.folder.name))
        for index, row in enumerate(entries):
            self._step(f"{_label(row)} prepare", index / len(entries))
            self._prepare(row, job, judge)
        judge.compare_losses(entries)
        self.done += 1
        orders: list[list[str]] = []
        for _ in range(rounds):
            order = [row for row in entries if not row.error]
            self.random.shuffle(order)
            if self.late() and orders:
                break
            orders.append([row.implementation for row in order])
            for index, row in enumerate(order):
                self._step(f"{_label(row)} round {len(orders)} of {rounds}", index / len(order))
                self._round(row, job)
            self.done += 1
        self.done += rounds - len(orders)
        self.report.orders.append(orders)
        for row in entries:
            # XLA keeps what it once took of an accelerator until its process ends.
            if job.device != "cpu" and _framework(row) == "jax":
                self._drop(row)
            elif not row.error:
                self._ask(row, {"do": "drop"})

    def stop(self) -> None:
        """End every process."""
        for worker in self.workers.values():
            worker.stop()
        self.folder.cleanup()

    def _start(self, rows: Sequence[BenchRow], job: Job) -> None:
        """Start what is not running, all at once: they only load their libraries."""
        started = [row for row in rows if row.implementation not in self.workers]
        for row in started:
            self.workers[row.implementation] = WorkerProcess(self.threads, job.device, Path(self.folder.name))
            request = {"do": "import", "framework": _framework(row), "device": job.device, "imports": job.imports}
            self._guard(row, lambda row=row, request=request: self.workers[row.implementation].send(request))  # type: ignore[misc]
        for index, row in enumerate(started):
            self._step(f"{_label(row)} import", index / max(len(started), 1))
            answer = self._receive(row, max(self.timeout, _IMPORT_SECONDS))
            if answer:
                self.report.versions |= answer["versions"]
                self.report.machine.setdefault("device", answer["device"])

    def _prepare(self, row: BenchRow, job: Job, judge: Judge) -> None:
        """Build, compare with float64, make the first calls."""
        if self.late() and row.kind == PEER:
            row.error = row.error or "left out: the time limit was reached"
        if row.error:
            return
        self._ask(row, {"do": "setup", "job": job.to_dict(), "kind": row.kind, "name": row.implementation})
        answer = self._ask(row, {"do": "prepare", "file": judge.file})
        if answer:
            row.first_call, row.peak = answer["first_call"], answer["peak"]
            row.note = row.note or answer["note"]
            sample = judge.results()
        # After the first call, which is to include what it compiles.
        if row.kind != FLOOR:
            answer = self._ask(row, {"do": "evaluate", "job": judge.job.to_dict(), "file": judge.file})
            if answer is not None:
                judge.judge(row, judge.results(), sample)
        if not self._resident(job) and not row.error:
            self._ask(row, {"do": "drop"})

    def _round(self, row: BenchRow, job: Job) -> None:
        if row.error:
            return
        answer = self._ask(row, {"do": "round", "budget": _ROUND_SECONDS, "most": _MOST_CALLS})
        if answer and row.kind == FLOOR:
            row.rounds.append(least_work(job).seconds(answer["copy_rate"], answer["product_rate"]))
            row.note = f"{words(job)} at {_rates(answer)}"
        elif answer:
            row.rounds.append(float(np.median(answer["seconds"])))
            row.calls += len(answer["seconds"])
        if not self._resident(job) and not row.error:
            self._ask(row, {"do": "drop"})

    def _resident(self, job: Job) -> bool:
        """Whether all processes may keep their inputs between rounds: on a CPU, where they fit."""
        if job.device != "cpu":
            return False
        return input_bytes(job) * len(self.workers) < free_memory() / 2

    def _ask(self, row: BenchRow, request: dict[str, Any]) -> dict[str, Any] | None:
        if row.error:
            return None
        self._guard(row, lambda: self.workers[row.implementation].send(request))
        return self._receive(row, self.timeout)

    def _receive(self, row: BenchRow, timeout: float) -> dict[str, Any] | None:
        """The answer, or None, and then the row has an error."""
        if row.error:
            return None
        answer: dict[str, Any] | None = self._guard(row, lambda: self.workers[row.implementation].receive(timeout))
        if answer and (reason := answer.get("unusable")):
            self._unusable(row, reason)
            return None
        if answer and (problem := answer.get("error")):
            row.error = problem
            return None
        return answer

    def _unusable(self, row: BenchRow, reason: str) -> None:
        """Not a failure of the implementation: it is listed apart."""
        row.error = reason
        missing = Missing(row.implementation, f"{row.loss}: {reason}")
        if missing not in self.report.missing:
            self.report.missing.append(missing)
        self.report.rows = [other for other in self.report.rows if other is not row]

    def _guard(self, row: BenchRow, action: Callable[[], Any]) -> Any:
        """Run an action on a row's process; a process that is gone becomes the row's error."""
        try:
            return action()
        except WorkerFailed as failure:
            row.error = row.error or str(failure)
            self._drop(row)
            return None

    def _drop(self, row: BenchRow) -> None:
        if worker := self.workers.pop(row.implementation, None):
            worker.stop()

    def late(self) -> bool:
        """Whether the time limit has been reached."""
        return self.deadline is not None and time.perf_counter() > self.deadline

    def _step(self, label: str, part: float) -> None:
        if self.progress:
            self.progress(self.done, self.total, label)


def _framework(row: BenchRow) -> str:
    if row.kind == PEER:
        return PEERS[row.implementation].framework
    if row.kind == FLAG:
        return parse_flag(row.implementation).backend
    return "jax" if PEERS["plain-torch"].missing() else "torch"


def _label(row: BenchRow) -> str:
    return f"{row.loss} {'x'.join(map(str, row.shape))} {row.dtype} {row.implementation}"


def _rates(answer: dict[str, float]) -> str:
    products = f", {answer['product_rate'] / 1e12:.3g} TFLOP/s" if answer["product_rate"] else ""
    return f"{answer['copy_rate'] / 1e9:.3g} GB/s copied (read + written){products}"
