"""The measurement loop: for each call, prepare every implementation, then time it in rounds of random order.

The worker processes live through the whole run; one works at a time.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from loss_core.bench.measure.accuracy import AccuracyCheck
from loss_core.bench.measure.job import Job, gradient_bytes, input_bytes
from loss_core.bench.measure.machine import free_memory
from loss_core.bench.measure.processes import Processes, Rates
from loss_core.bench.measure.roofline import counted_text, least_work, uncounted_text
from loss_core.bench.report import BASELINE, ROOFLINE, BenchReport, BenchRow, Missing, call_text
from loss_core.dispatch.protocol import BackendUnavailable
from loss_core.workers.pool import RequestFailed, WorkerFailed

Progress = Callable[[int, int, str], None]

# Seconds of timed calls of one implementation in one round, at least one call.
_ROUND_SECONDS = 0.5
_MAX_CALLS = 1000

# For a process to import torch or JAX on a busy machine.
_IMPORT_SECONDS = 120.0


class Run:
    """The worker processes of a run, which measure all its calls. A context manager: they end with the block.

    Args:
        report: rows are appended to it.
        threads: per implementation.
        imports: modules that register the user's losses.
        timeout: of one request, in seconds.
        deadline: value of `time.perf_counter` after which no round and no baseline is started; None for no limit.
        seed: of the order of each round.
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
        self.processes: dict[str, Processes] = {}
        self.folder: tempfile.TemporaryDirectory[str] = tempfile.TemporaryDirectory(
            prefix="loss-core-bench-", ignore_cleanup_errors=True
        )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        for processes in self.processes.values():
            processes.stop()
        self.folder.cleanup()

    def measure_group(self, rows: Sequence[BenchRow], job: Job, rounds: int) -> None:
        """Measure one call on every implementation; the first row is the roofline."""
        rows[0].note = f"{counted_text(job)}{uncounted_text(job)}"
        self.report.rows += rows
        self._start(rows, job)
        check = AccuracyCheck(job)
        for row in rows:
            self._report_progress(f"{_label(row)} prepare")
            if self.past_deadline() and row.kind == BASELINE:
                row.error = row.error or "left out: the time limit was reached"
            self._measure(row, job, lambda row=row: self._prepare(row, job, check))  # type: ignore[misc]
        check.compare_losses(rows)
        self.done += 1
        orders: list[list[str]] = []
        for _ in range(rounds):
            order = [row for row in rows if not row.error]
            self.random.shuffle(order)
            if self.past_deadline() and orders:
                break
            orders.append([row.implementation for row in order])
            for row in order:
                self._report_progress(f"{_label(row)} round {len(orders)} of {rounds}")
                self._measure(row, job, lambda row=row: self._round(row, job))  # type: ignore[misc]
            self.done += 1
        self.done += rounds - len(orders)
        self.report.orders.append(orders)
        for row in rows:
            # XLA frees memory of an accelerator only when its process ends.
            if job.device != "cpu" and row.framework == "jax":
                self._stop(row)
            elif not row.error:
                with self._record_errors(row):
                    self.processes[row.implementation].unload()

    def past_deadline(self) -> bool:
        """Whether the time limit has been reached."""
        return self.deadline is not None and time.perf_counter() > self.deadline

    def _start(self, rows: Sequence[BenchRow], job: Job) -> None:
        """Start the processes that are not running, all at once: they only import their libraries."""
        new = [row for row in rows if row.implementation not in self.processes]
        for row in new:
            self.processes[row.implementation] = Processes(
                row.framework, job.tp, self.threads, job.device, self.imports, Path(self.folder.name), self.timeout
            )
        for row in new:
            self._report_progress(f"{_label(row)} import")
            with self._record_errors(row):
                info = self.processes[row.implementation].wait_started(max(self.timeout, _IMPORT_SECONDS))
                self.report.versions |= info["versions"]
                self.report.machine.setdefault("device", info["device"])
            if row.error:
                self._stop(row)

    def _measure(self, row: BenchRow, job: Job, action: Callable[[], None]) -> None:
        """Run an action for a row without an error, then free its inputs if those of all processes do not fit."""
        if row.error:
            return
        with self._record_errors(row):
            action()
            # On a CPU, inputs stay loaded between rounds where those of all processes fit.
            if job.device != "cpu" or input_bytes(job) * len(self.processes) >= free_memory() / 2:
                self.processes[row.implementation].unload()

    def _prepare(self, row: BenchRow, job: Job, check: AccuracyCheck) -> None:
        """Build, run the first calls, compare with float64."""
        processes = self.processes[row.implementation]
        processes.setup(job, row.kind, row.implementation)
        prepared = processes.prepare()
        row.first_call = max(result.first_call for result in prepared)
        row.peak = max(result.peak for result in prepared)
        row.note = row.note or prepared[0].note
        # After the first call, whose time includes compilation.
        if row.kind != ROOFLINE:
            row.gradients = gradient_bytes(job)
            check.fill_errors(row, processes.evaluate(check.job), [result.sample for result in prepared])

    def _round(self, row: BenchRow, job: Job) -> None:
        processes = self.processes[row.implementation]
        if row.kind == ROOFLINE:
            rates = processes.rates(_ROUND_SECONDS, _MAX_CALLS)
            row.rounds.append(least_work(job).seconds(rates.copy, rates.product))
            row.note = f"{counted_text(job)} at {_rates_text(rates)}{uncounted_text(job)}"
        else:
            times = processes.times(_ROUND_SECONDS, _MAX_CALLS)
            row.rounds.append(float(np.median(times)))
            row.calls += len(times)

    @contextlib.contextmanager
    def _record_errors(self, row: BenchRow) -> Iterator[None]:
        """Turn a failure of a row's processes into the row's error; list what can't run here as missing instead."""
        try:
            yield
        except WorkerFailed as failure:
            row.error = str(failure)
            self._stop(row)
        except RequestFailed as failure:
            row.error = " ".join(str(failure).split())[:600]
        except BackendUnavailable as reason:
            row.error = str(reason)
            missing = Missing(row.implementation, f"{row.loss}: {reason}")
            if missing not in self.report.missing:
                self.report.missing.append(missing)
            self.report.rows = [other for other in self.report.rows if other is not row]

    def _stop(self, row: BenchRow) -> None:
        if processes := self.processes.pop(row.implementation, None):
            processes.stop()

    def _report_progress(self, label: str) -> None:
        if self.progress:
            self.progress(self.done, self.total, label)


def _label(row: BenchRow) -> str:
    return f"{call_text(*row.group)} {row.implementation}"


def _rates_text(rates: Rates) -> str:
    products = f", {rates.product / 1e12:.3g} TFLOP/s" if rates.product else ""
    return f"{rates.copy / 1e9:.3g} GB/s copied (read + written){products}"
