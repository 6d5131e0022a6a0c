"""The course of a benchmark: every implementation prepared, then rounds in random order, then the next call.

The processes live through the whole run; one works at a time.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from loss_core.bench.measure.accuracy import Judge
from loss_core.bench.measure.job import Job, gradient_bytes, input_bytes
from loss_core.bench.measure.machine import free_memory
from loss_core.bench.measure.processes import Processes, Rates
from loss_core.bench.measure.roofline import least_work, left_out, words
from loss_core.bench.report import BASELINE, ROOFLINE, BenchReport, BenchRow, Missing, call_text
from loss_core.dispatch.protocol import BackendUnavailable
from loss_core.workers.pool import RequestFailed, WorkerFailed

Progress = Callable[[int, int, str], None]

# Seconds of timed calls of one implementation in one round; at least one call is made.
_ROUND_SECONDS = 0.5
_MOST_CALLS = 1000

# A process that loads torch or JAX, on a machine that is busy.
_IMPORT_SECONDS = 120.0


class Run:
    """The processes of a run, which serve all its groups. A context manager: they end with the block.

    Args:
        report: gets the rows.
        threads: of each implementation.
        imports: modules that register the user's losses.
        timeout: seconds after which one answer is given up.
        deadline: of `time.perf_counter`, after which no round and no baseline is begun; None for none.
        seed: of the orders.
        progress: called as progress(done, total, label).
    """

    def __init__(
        self, report: BenchReport, threads: int, imports: Sequence[str], timeout: float, deadline: float | None,
        seed: int, progress: Progress | None,
    ) -> None:  # fmt: skip
        self.report = report
        self.threads = threads
        self.imports = imports
        self.timeout = timeout
        self.deadline = deadline
        self.random: random.Random = random.Random(seed)
        self.progress = progress
        self.total: int = 0
        self.done: int = 0
        self.running: dict[str, Processes] = {}
        self.folder: tempfile.TemporaryDirectory[str] = tempfile.TemporaryDirectory(
            prefix="loss-core-bench-", ignore_cleanup_errors=True
        )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        for processes in self.running.values():
            processes.stop()
        self.folder.cleanup()

    def group(self, rows: Sequence[BenchRow], job: Job, rounds: int) -> None:
        """Measure one call on every implementation, of which the first is the roofline."""
        rows[0].note = f"{words(job)}{left_out(job)}"
        self.report.rows += rows
        self._start(rows, job)
        judge = Judge(job)
        for row in rows:
            self._step(f"{_label(row)} prepare")
            if self.late() and row.kind == BASELINE:
                row.error = row.error or "left out: the time limit was reached"
            self._measure(row, job, lambda row=row: self._prepare(row, job, judge))  # type: ignore[misc]
        judge.compare_losses(rows)
        self.done += 1
        orders: list[list[str]] = []
        for _ in range(rounds):
            order = [row for row in rows if not row.error]
            self.random.shuffle(order)
            if self.late() and orders:
                break
            orders.append([row.implementation for row in order])
            for row in order:
                self._step(f"{_label(row)} round {len(orders)} of {rounds}")
                self._measure(row, job, lambda row=row: self._round(row, job))  # type: ignore[misc]
            self.done += 1
        self.done += rounds - len(orders)
        self.report.orders.append(orders)
        for row in rows:
            # XLA keeps what it once took of an accelerator until its process ends.
            if job.device != "cpu" and row.framework == "jax":
                self._end(row)
            elif not row.error:
                with self._noted(row):
                    self.running[row.implementation].drop()

    def late(self) -> bool:
        """Whether the time limit has been reached."""
        return self.deadline is not None and time.perf_counter() > self.deadline

    def _start(self, rows: Sequence[BenchRow], job: Job) -> None:
        """Start what is not running, all at once: they only load their libraries."""
        new = [row for row in rows if row.implementation not in self.running]
        for row in new:
            self.running[row.implementation] = Processes(
                row.framework, job.tp, self.threads, job.device, self.imports, Path(self.folder.name), self.timeout
            )
        for row in new:
            self._step(f"{_label(row)} import")
            with self._noted(row):
                about = self.running[row.implementation].started(max(self.timeout, _IMPORT_SECONDS))
                self.report.versions |= about["versions"]
                self.report.machine.setdefault("device", about["device"])
            if row.error:
                self._end(row)

    def _measure(self, row: BenchRow, job: Job, action: Callable[[], None]) -> None:
        """Do something with a row that has not failed, and give its inputs' memory back where not all fit."""
        if row.error:
            return
        with self._noted(row):
            action()
            # On a CPU all processes may keep their inputs between rounds, where they fit.
            if job.device != "cpu" or input_bytes(job) * len(self.running) >= free_memory() / 2:
                self.running[row.implementation].drop()

    def _prepare(self, row: BenchRow, job: Job, judge: Judge) -> None:
        """Build, make the first calls, compare with float64."""
        processes = self.running[row.implementation]
        processes.setup(job, row.kind, row.implementation)
        prepared = processes.prepare()
        row.first_call = max(found.first_call for found in prepared)
        row.peak = max(found.peak for found in prepared)
        row.note = row.note or prepared[0].note
        # After the first call, which is to include what it compiles.
        if row.kind != ROOFLINE:
            row.gradients = gradient_bytes(job)
            judge.judge(row, processes.evaluate(judge.job), [found.sample for found in prepared])

    def _round(self, row: BenchRow, job: Job) -> None:
        processes = self.running[row.implementation]
        if row.kind == ROOFLINE:
            rates = processes.rates(_ROUND_SECONDS, _MOST_CALLS)
            row.rounds.append(least_work(job).seconds(rates.copy, rates.product))
            row.note = f"{words(job)} at {_rates(rates)}{left_out(job)}"
        else:
            times = processes.times(_ROUND_SECONDS, _MOST_CALLS)
            row.rounds.append(float(np.median(times)))
            row.calls += len(times)

    @contextlib.contextmanager
    def _noted(self, row: BenchRow) -> Iterator[None]:
        """What goes wrong in a row's processes becomes the row's error; what can't run here is listed apart."""
        try:
            yield
        except WorkerFailed as failure:
            row.error = str(failure)
            self._end(row)
        except RequestFailed as failure:
            row.error = " ".join(str(failure).split())[:600]
        except BackendUnavailable as reason:
            row.error = str(reason)
            missing = Missing(row.implementation, f"{row.loss}: {reason}")
            if missing not in self.report.missing:
                self.report.missing.append(missing)
            self.report.rows = [other for other in self.report.rows if other is not row]

    def _end(self, row: BenchRow) -> None:
        if processes := self.running.pop(row.implementation, None):
            processes.stop()

    def _step(self, label: str) -> None:
        if self.progress:
            self.progress(self.done, self.total, label)


def _label(row: BenchRow) -> str:
    return f"{call_text(*row.group)} {row.implementation}"


def _rates(rates: Rates) -> str:
    products = f", {rates.product / 1e12:.3g} TFLOP/s" if rates.product else ""
    return f"{rates.copy / 1e9:.3g} GB/s copied (read + written){products}"
