"""The processes of one implementation, asked and answered as if they were one.

One process, or over tensor parallel on torch one for each rank; on JAX one process holds all ranks. When a rank dies,
or its answer does not come in time, the others wait for it in a collective: all of them are ended.
"""

from __future__ import annotations

import json
import queue
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from loss_core.bench_process import WorkerFailed, WorkerProcess
from loss_core.bench_shards import Arrays

# Seconds for the others after one rank has failed: they may meet the same error, or be ended by a dead one.
_GRACE = 5.0

# What a request or an answer says about a call that can't be made.
_FAILURES = ("error", "unusable")


class Team:
    """Processes that measure one implementation. Use `stop` in a `finally`.

    Args:
        framework: "torch" or "jax".
        ranks: that share the vocabulary.
        threads: of all processes together, at least one each.
        device: "cpu", or an accelerator, of which each rank has its own.
        folder: of the run.
    """

    def __init__(self, framework: str, ranks: int, threads: int, device: str, folder: Path) -> None:
        self.framework, self.ranks, self.device = framework, ranks, device
        self.processes: list[WorkerProcess] = []
        self._inbox: queue.Queue[tuple[WorkerProcess, str | None]] = queue.Queue()
        # The ranks meet over it; a folder, because its name must be new.
        self._meet = tempfile.mkdtemp(dir=folder)
        count = ranks if framework == "torch" else 1
        each = max(1, threads // count)
        try:
            for rank in range(count):
                self.processes.append(
                    WorkerProcess(
                        each, device, folder, first_core=rank * each % max(threads, 1), inbox=self._inbox,
                        cpu_devices=ranks if framework == "jax" else 1,
                    )
                )  # fmt: skip
        except BaseException:
            self.stop()
            raise

    def load(self, imports: Sequence[str]) -> None:
        """Ask for the framework and the user's modules; `receive` gives the answer."""
        self.send({"do": "import", "framework": self.framework, "device": self.device, "imports": list(imports)})

    def send(self, request: Mapping[str, Any]) -> None:
        """Ask every process.

        Raises:
            WorkerFailed: one is gone; the others have been stopped.
        """
        for rank, process in enumerate(self.processes):
            own = dict(request)
            if own["do"] == "import":
                own |= {"rank": rank, "ranks": self.ranks, "meet": self._meet}
            if "file" in own:
                own["file"] = _file_of(own["file"], rank)
            try:
                process.send(own)
            except WorkerFailed as failure:
                self._fail(f"{self._who(rank)}{failure}")

    def receive(self, timeout: float) -> dict[str, Any]:
        """One answer for all of them: times and memory of the slowest and the largest, rates of the slowest.

        Raises:
            WorkerFailed: a process died, gave no answer in time, or failed where others did not; all have been stopped.
        """
        answers: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < len(self.processes):
            try:
                process, line = self._inbox.get(timeout=max(deadline - time.monotonic(), 0.0))
            except queue.Empty:
                break
            rank = self.processes.index(process)
            if line is None:
                self._fail(f"{self._who(rank)}{process.last_words()}")
            answers[rank] = json.loads(line)
            if _failure(answers[rank]):
                deadline = min(deadline, time.monotonic() + _GRACE)
        failed = {rank: text for rank, answer in answers.items() if (text := _failure(answer))}
        if failed and len(failed) < len(self.processes):
            self._fail("; ".join(f"{self._who(rank)}{text}" for rank, text in sorted(failed.items())))
        if len(answers) < len(self.processes):
            late = [self._who(rank) for rank in range(len(self.processes)) if rank not in answers]
            self._fail(f"{late[0]}stopped: no result within {timeout:.0f} s")
        return _together([answers[rank] for rank in range(len(self.processes))])

    def results(self, file: str) -> list[Arrays]:
        """What each process left in its file, in rank order."""
        found = []
        for rank in range(len(self.processes)):
            with np.load(_file_of(file, rank)) as stored:
                found.append({name: np.asarray(stored[name]) for name in stored.files})
        return found

    def stop(self) -> None:
        """End the processes and everything that they started. May be called more than once."""
        for process in self.processes:
            process.stop()

    def _fail(self, text: str) -> NoReturn:
        self.stop()
        raise WorkerFailed(text)

    def _who(self, rank: int) -> str:
        return "" if len(self.processes) == 1 else f"rank {rank} of {self.ranks}: "


def _file_of(file: str, rank: int) -> str:
    return f"{file}.{rank}"


def _failure(answer: Mapping[str, Any]) -> str:
    return next((str(answer[name]) for name in _FAILURES if answer.get(name)), "")


def _together(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The answers to one request, in rank order, as one."""
    first = answers[0]
    found = dict(first)
    if "seconds" in first:  # the same number of calls on every rank, each begun together
        found["seconds"] = [max(times) for times in zip(*(answer["seconds"] for answer in answers), strict=True)]
    for name in ("first_call", "peak"):
        if name in first:
            found[name] = max(answer[name] for answer in answers)
    for name in ("copy_rate", "product_rate"):
        if name in first:
            found[name] = min(answer[name] for answer in answers)
    return found
