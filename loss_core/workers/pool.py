"""Processes that answer one request together: how they are started, asked and ended.

`check --tp` has a process for each rank; `bench` has a pool for each implementation, which over tensor parallel is a
process for each rank, too. Each process runs `loss_core.workers.serve` and talks over a pipe. When one dies, or gives
no answer in time, all are ended: the others may wait for it in a collective. When the caller dies, the pipes close and
the processes end by themselves. Ctrl-C on a terminal reaches the caller alone, whose `stop` ends the pool.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NamedTuple, NoReturn, Self

from loss_core.dispatch.protocol import BackendUnavailable

# Seconds for a process to start and import its framework (machines are slow when busy).
START_LIMIT = 180.0

# Seconds for the others after one process has refused: they may meet the same error, or wait for it in a collective.
_REFUSAL_LIMIT = 10.0


class WorkerFailed(RuntimeError):
    """A process died, gave no answer in time, or failed where others did not; all of the pool have been ended."""


class RequestFailed(RuntimeError):
    """The request raised in every process, as it would have in this one; the message names type and text."""


class Refusal(NamedTuple):
    """What a process answers where a request raised.

    Attributes:
        text: type and message of the exception; of a BackendUnavailable the message alone.
        unavailable: whether it was one.
    """

    text: str
    unavailable: bool


@dataclass(frozen=True)
class Start:
    """What one process is.

    Attributes:
        name: in messages, such as "rank 1 of 2"; may be empty.
        factory: "module:function", which makes the object that is served.
        arguments: of the factory.
        environment: variables to add, before anything is imported.
        cores: numbers of the cores that it may use; None for all. Heeded on Linux.
    """

    name: str
    factory: str
    arguments: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)
    cores: Sequence[int] | None = None


class Worker:
    """The caller's side of one process."""

    def __init__(self, start: Start) -> None:
        self.name: str = start.name
        self.pipe: Connection[Any, Any]
        self.pipe, theirs = Pipe()
        # A file, not a pipe: a library that prints much must not block, and its last words explain a death.
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115  (closed in stop)
        # What can be imported here can be imported there, whichever way it came on the path.
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "loss_core.workers.serve", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=self._printed,
            stderr=self._printed,
            pass_fds=[theirs.fileno()],
            env={**os.environ, **start.environment, "PYTHONPATH": paths},
            # A group of its own, which Ctrl-C does not reach, and which is ended with all that it started.
            start_new_session=True,
        )
        # With our copy of its end closed, the pipe ends when the process does.
        theirs.close()
        if start.cores is not None and hasattr(os, "sched_setaffinity"):
            with contextlib.suppress(OSError):
                os.sched_setaffinity(self.pid, start.cores)
        # What is sent to a process that is gone is told by the answer that does not come.
        with contextlib.suppress(OSError):
            self.send(start.factory, start.arguments)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def send(self, method: str, arguments: Mapping[str, Any]) -> None:
        """Ask for a call of a method of what is served."""
        self.pipe.send((method, dict(arguments)))

    def stop(self) -> None:
        """End the process and everything that it started. May be called more than once."""
        self.pipe.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        self._printed.close()

    def last_words(self) -> str:
        """How the process ended, and the last line that it printed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        code = self._process.returncode
        if code is None:
            how = "its process closed its pipe"
        elif code < 0:
            name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
            how = f"its process was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        else:
            how = f"its process ended with exit code {code}"
        self._printed.seek(0)
        lines = self._printed.read().decode("utf-8", "replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{how}: {last[:300]}" if last else how


class Pool:
    """Processes that are asked together. A context manager: they end with the block.

    They start at once, and beside each other; `started` waits for them.
    """

    def __init__(self, starts: Sequence[Start]) -> None:
        self.workers: list[Worker] = []
        try:
            for start in starts:
                self.workers.append(Worker(start))
        except BaseException:
            self.stop()
            raise

    def started(self, limit: float = START_LIMIT) -> None:
        """Wait until every process has made its object.

        Raises:
            BackendUnavailable, RequestFailed, WorkerFailed: as `ask`; the pool has been stopped.
        """
        try:
            self.receive(limit)
        except BaseException:
            self.stop()
            raise

    def ask(self, limit: float, method: str, **arguments: Any) -> list[Any]:
        """Call a method in every process.

        Args:
            limit: seconds within which all must have answered.
        Returns:
            The answer of each process, in order.
        Raises:
            BackendUnavailable: the call raised it in every process. They go on.
            RequestFailed: the call raised something else in every process. They go on.
            WorkerFailed: a process died, did not answer in time, or raised where others did not. All have been ended.
        """
        for worker in self.workers:
            try:
                worker.send(method, arguments)
            except OSError:
                self._fail([(worker, worker.last_words())])
        return self.receive(limit)

    def receive(self, limit: float) -> list[Any]:
        """The answers to what has been sent; as `ask`."""
        answers: dict[Worker, Any] = {}
        refusals: dict[Worker, Refusal] = {}
        deadline = time.monotonic() + limit
        while waiting := {worker.pipe: worker for worker in self.workers if worker not in answers}:
            ready = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0.0))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                worker = waiting[pipe]
                try:
                    answers[worker] = pipe.recv()
                except (EOFError, OSError):
                    self._fail([(worker, worker.last_words())])
                if isinstance(answers[worker], Refusal):
                    refusals[worker] = answers[worker]
                    deadline = min(deadline, time.monotonic() + _REFUSAL_LIMIT)
        if refusals and len(refusals) < len(self.workers):
            # The others went on, so that the next collective of these processes would not match.
            self._fail([(worker, refusal.text) for worker, refusal in refusals.items()])
        if waiting:
            self._fail([(worker, f"no answer within {limit:.0f} s") for worker in waiting.values()])
        if refusals:
            first = refusals[self.workers[0]]
            raise (BackendUnavailable if first.unavailable else RequestFailed)(first.text)
        return [answers[worker] for worker in self.workers]

    def stop(self) -> None:
        """End the processes, at once: they hold nothing that must be kept. May be called more than once."""
        for worker in self.workers:
            worker.stop()

    def _fail(self, whys: Sequence[tuple[Worker, str]]) -> NoReturn:
        self.stop()
        text = "; ".join(f"{worker.name}: {why}" if worker.name else why for worker, why in whys)
        others = "; the others have been ended" if len(self.workers) > len(whys) else ""
        raise WorkerFailed(f"{text}{others}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
