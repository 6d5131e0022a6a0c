"""How a benchmark goes on: every implementation prepared, then rounds in random order, then the next call.

The processes live through the whole run; one works at a time.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loss_core.backend import parse_flag
from loss_core.bench_errors import Judge
from loss_core.bench_floor import least_work, left_out, words
from loss_core.bench_job import Job, gradient_bytes, input_bytes, kind_of
from loss_core.bench_machine import free_memory
from loss_core.bench_peers import PEERS, peers_for
from loss_core.bench_process import WorkerFailed
from loss_core.bench_report import FLAG, FLOOR, PEER, BenchReport, BenchRow, Missing, call_text
from loss_core.bench_team import Team

Progress = Callable[[int, int, str], None]

# Seconds of timed calls of one implementation in one round; at least one call is made.
_ROUND_SECONDS = 0.5
_MOST_CALLS = 1000

# A process that loads torch or JAX, on a machine that is busy.
_IMPORT_SECONDS = 120.0


class Run:
    """The processes of a run, which serve all its groups. Use `stop` in a `finally`.

    Args:
        report: gets the rows.
        threads: of each process.
        timeout: seconds after which one answer is given up.
        deadline: of `time.perf_counter`, after which no round and no peer is begun; None for none.
        seed: of the orders.
        progress: called as progress(done, total, label).
    """

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
        self.teams: dict[str, Team] = {}
        self.folder = tempfile.TemporaryDirectory(prefix="loss-core-bench-", ignore_cleanup_errors=True)

    def group(self, loss: str, job: Job, flags: Sequence[str], peers: Sequence[str], rounds: int) -> None:
        """Measure one call on every implementation."""
        fitting = {peer.name for peer in peers_for(kind_of(job.loss_config()), job.dtype, job.tp)}
        names = [
            (FLOOR, FLOOR),
            *((flag, FLAG) for flag in flags),
            *((name, PEER) for name in peers if name in fitting),
        ]
        entries = [
            BenchRow(loss, name, kind, job.shape, job.dtype, dict(job.config), job.ignored) for name, kind in names
        ]
        entries[0].note = f"{words(job)}{left_out(job)}"
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
        for team in self.teams.values():
            team.stop()
        self.folder.cleanup()

    def _start(self, rows: Sequence[BenchRow], job: Job) -> None:
        """Start what is not running, all at once: they only load their libraries."""
        started = [row for row in rows if row.implementation not in self.teams]
        for row in started:
            framework = _framework(row)
            team = Team(framework, job.tp, self.threads, job.device, Path(self.folder.name))
            self.teams[row.implementation] = team
            self._guard(row, lambda team=team: team.load(job.imports))  # type: ignore[misc]
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
            row.gradients = None if row.kind == FLOOR else gradient_bytes(job)
            row.note = row.note or answer["note"]
            sample = self.teams[row.implementation].results(judge.file)
        # After the first call, which is to include what it compiles.
        if row.kind != FLOOR:
            answer = self._ask(row, {"do": "evaluate", "job": judge.job.to_dict(), "file": judge.file})
            if answer is not None:
                judge.judge(row, self.teams[row.implementation].results(judge.file), sample)
        if not self._resident(job) and not row.error:
            self._ask(row, {"do": "drop"})

    def _round(self, row: BenchRow, job: Job) -> None:
        if row.error:
            return
        answer = self._ask(row, {"do": "round", "budget": _ROUND_SECONDS, "most": _MOST_CALLS})
        if answer and row.kind == FLOOR:
            row.rounds.append(least_work(job).seconds(answer["copy_rate"], answer["product_rate"]))
            row.note = f"{words(job)} at {_rates(answer)}{left_out(job)}"
        elif answer:
            row.rounds.append(float(np.median(answer["seconds"])))
            row.calls += len(answer["seconds"])
        if not self._resident(job) and not row.error:
            self._ask(row, {"do": "drop"})

    def _resident(self, job: Job) -> bool:
        """Whether all processes may keep their inputs between rounds: on a CPU, where they fit."""
        if job.device != "cpu":
            return False
        return input_bytes(job) * len(self.teams) < free_memory() / 2

    def _ask(self, row: BenchRow, request: dict[str, Any]) -> dict[str, Any] | None:
        if row.error:
            return None
        self._guard(row, lambda: self.teams[row.implementation].send(request))
        return self._receive(row, self.timeout)

    def _receive(self, row: BenchRow, timeout: float) -> dict[str, Any] | None:
        """The answer, or None, and then the row has an error."""
        if row.error:
            return None
        answer: dict[str, Any] | None = self._guard(row, lambda: self.teams[row.implementation].receive(timeout))
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
        """Run an action on a row's processes; one that is gone becomes the row's error."""
        try:
            return action()
        except WorkerFailed as failure:
            row.error = row.error or str(failure)
            self._drop(row)
            return None

    def _drop(self, row: BenchRow) -> None:
        if team := self.teams.pop(row.implementation, None):
            team.stop()

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
    return f"{call_text(*row.group)} {row.implementation}"


def _rates(answer: dict[str, float]) -> str:
    products = f", {answer['product_rate'] / 1e12:.3g} TFLOP/s" if answer["product_rate"] else ""
    return f"{answer['copy_rate'] / 1e9:.3g} GB/s copied (read + written){products}"
