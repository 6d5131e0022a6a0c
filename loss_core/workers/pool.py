"""A pool of processes that execute the same method calls together, as the ranks of a process group do.

`check --tp` has a process per rank; `bench` has a pool per implementation, over tensor parallel with a process per
rank. Each process runs `loss_core.workers.serve` and communicates over a pipe. When one dies or does not answer in
time, all are killed, since the others may wait for it in a collective. When the caller dies, the pipes close and the
processes exit. Ctrl-C on a terminal reaches only the caller, whose `stop` ends the pool.
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

# Seconds for the others after a call raised in one process: they may raise too, or wait for it in a collective.
_ERROR_LIMIT = 10.0


class WorkerFailed(RuntimeError):
    """A process died, timed out, or raised where others did not; all processes of the pool have been killed."""


class RequestFailed(RuntimeError):
    """The call raised in every process; the message has type and text of the exception."""


class RemoteError(NamedTuple):
    """The answer of a process in which a call raised.

    Attributes:
        text: type and message of the exception; only the message for a BackendUnavailable.
        unavailable: whether it was a BackendUnavailable.
    """

    text: str
    unavailable: bool


@dataclass(frozen=True)
class Start:
    """Specification of one process.

    Attributes:
        name: used in messages, such as "rank 1 of 2"; may be empty.
        factory: "module:function" that constructs the object whose methods are called.
        arguments: keyword arguments of the factory.
        environment: variables to add before anything is imported.
        cores: indices of the CPU cores that it may use; None for all. Linux only.
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
        # A file, not a pipe: long output must not block, and its last line explains an exit.
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  (closed in stop)
        # The same sys.path, so that the process can import whatever this one can.
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "loss_core.workers.serve", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            pass_fds=[theirs.fileno()],
            env={**os.environ, **start.environment, "PYTHONPATH": paths},
            # A separate process group, which Ctrl-C does not reach, and which can be killed with all its children.
            start_new_session=True,
        )
        # With our copy of its end closed, the pipe closes when the process exits.
        theirs.close()
        if start.cores is not None and hasattr(os, "sched_setaffinity"):
            with contextlib.suppress(OSError):
                os.sched_setaffinity(self.pid, start.cores)
        # If the process is already dead, `receive` reports it.
        with contextlib.suppress(OSError):
            self.send(start.factory, start.arguments)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process is still running."""
        return self._process.poll() is None

    def send(self, method: str, arguments: Mapping[str, Any]) -> None:
        """Send a method call; its answer arrives on `pipe`."""
        self.pipe.send((method, dict(arguments)))

    def stop(self) -> None:
        """Kill the process and its children. May be called more than once."""
        self.pipe.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        self._output.close()

    def exit_report(self) -> str:
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
        self._output.seek(0)
        lines = self._output.read().decode("utf-8", "replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{how}: {last[:300]}" if last else how


class Pool:
    """Processes that execute the same calls. A context manager: leaving it kills them.

    The constructor starts all of them in parallel; `wait_started` waits until they are ready.
    """

    def __init__(self, starts: Sequence[Start]) -> None:
        self.workers: list[Worker] = []
        try:
            for start in starts:
                self.workers.append(Worker(start))
        except BaseException:
            self.stop()
            raise

    def wait_started(self, limit: float = START_LIMIT) -> None:
        """Wait until every process has constructed its object.

        Raises:
            BackendUnavailable, RequestFailed, WorkerFailed: as `call`; the pool has been stopped.
        """
        try:
            self.receive(limit)
        except BaseException:
            self.stop()
            raise

    def call(self, limit: float, method: str, **arguments: Any) -> list[Any]:
        """Call a method in every process.

        Args:
            limit: seconds within which all must answer.
        Returns:
            The result of each process, in order.
        Raises:
            BackendUnavailable: the call raised it in every process. The pool stays usable.
            RequestFailed: the call raised something else in every process. The pool stays usable.
            WorkerFailed: a process died, timed out, or raised where others did not. All have been killed.
        """
        for worker in self.workers:
            try:
                worker.send(method, arguments)
            except OSError:
                self._fail([(worker, worker.exit_report())])
        return self.receive(limit)

    def receive(self, limit: float) -> list[Any]:
        """Wait for the results of the calls that were sent; as `call`."""
        answers: dict[Worker, Any] = {}
        errors: dict[Worker, RemoteError] = {}
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
                    self._fail([(worker, worker.exit_report())])
                if isinstance(answers[worker], RemoteError):
                    errors[worker] = answers[worker]
                    deadline = min(deadline, time.monotonic() + _ERROR_LIMIT)
        if errors and len(errors) < len(self.workers):
            # The others continued, so the next collectives of these processes would not match.
            self._fail([(worker, error.text) for worker, error in errors.items()])
        if waiting:
            self._fail([(worker, f"no answer within {limit:.0f} s") for worker in waiting.values()])
        if errors:
            first = errors[self.workers[0]]
            raise (BackendUnavailable if first.unavailable else RequestFailed)(first.text)
        return [answers[worker] for worker in self.workers]

    def stop(self) -> None:
        """Kill the processes, which hold no state that must be saved. May be called more than once."""
        for worker in self.workers:
            worker.stop()

    def _fail(self, reasons: Sequence[tuple[Worker, str]]) -> NoReturn:
        self.stop()
        text = "; ".join(f"{worker.name}: {reason}" if worker.name else reason for worker, reason in reasons)
        others = "; the others have been ended" if len(self.workers) > len(reasons) else ""
        raise WorkerFailed(f"{text}{others}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
