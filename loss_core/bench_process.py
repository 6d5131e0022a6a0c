"""The parent's side of one worker process: start it, ask it, stop it; never wait for it without a limit."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The worker's module; it imports torch or JAX, so it is started, never imported.
WORKER = "loss_core_bench.worker"


class WorkerFailed(Exception):
    """A worker that died, was killed, or did not answer in time; the message says which."""


class WorkerProcess:
    """A process that measures one implementation. Use `stop` in a `finally`.

    Args:
        threads: OpenMP and BLAS threads, and on Linux the number of cores that it may use.
        device: "cpu" hides accelerators from JAX.
        folder: of the run, where compilers keep what they made: with the caches of earlier runs a first call
            would cost less than it does.
        first_core: of the cores that it may use, among those of this process.
        cpu_devices: as how many devices JAX shows the CPU.
        inbox: where its lines are put, as (process, line), with None for its end; for who waits for several.
    """

    def __init__(
        self, threads: int, device: str, folder: Path, *, first_core: int = 0, cpu_devices: int = 1,
        inbox: queue.Queue[tuple[WorkerProcess, str | None]] | None = None,
    ) -> None:  # fmt: skip
        # A file, not a pipe: a library that prints much must not block, and its last words explain a death.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed in stop)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=_environment(threads, device, folder, cpu_devices),
            text=True,
            # A group of its own: Ctrl-C reaches the parent alone, which then stops the whole group.
            start_new_session=True,
        )
        self._inbox: queue.Queue[tuple[WorkerProcess, str | None]] = queue.Queue() if inbox is None else inbox
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if hasattr(os, "sched_setaffinity"):
            known = sorted(os.sched_getaffinity(0))
            cores = {known[(first_core + i) % len(known)] for i in range(threads)}
            with contextlib.suppress(OSError):
                os.sched_setaffinity(self._process.pid, cores)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError, OSError):
            for line in self._process.stdout:
                self._inbox.put((self, line))
        self._inbox.put((self, None))

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def send(self, request: Mapping[str, Any]) -> None:
        """Send a request; `receive` gives its answer.

        Raises:
            WorkerFailed: the process is gone.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except (OSError, ValueError) as error:
            raise WorkerFailed(self.last_words()) from error

    def receive(self, timeout: float) -> dict[str, Any]:
        """The answer to the request before.

        Raises:
            WorkerFailed: no answer within `timeout` seconds, after which the process is stopped; or it died.
        """
        try:
            _, line = self._inbox.get(timeout=timeout)
        except queue.Empty:
            self.stop()
            raise WorkerFailed(f"stopped: no result within {timeout:.0f} s") from None
        if line is None:
            raise WorkerFailed(self.last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Send and receive."""
        self.send(request)
        return self.receive(timeout)

    def stop(self) -> None:
        """End the process and everything that it started. May be called more than once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        self._reader.join(timeout=10)
        for pipe in (self._process.stdin, self._process.stdout, self._stderr):
            if pipe is not None and not self._reader.is_alive():
                with contextlib.suppress(OSError):
                    pipe.close()

    def last_words(self) -> str:
        """How the process ended, and the last line that it printed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        code = self._process.returncode
        if code is not None and code < 0:
            name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
            how = f"its process was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        else:
            how = f"its process ended with exit code {code}"
        with contextlib.suppress(OSError, ValueError):
            self._stderr.seek(0)
            lines = [line.strip() for line in self._stderr.read().decode("utf-8", "replace").splitlines()]
            if last := next((line for line in reversed(lines) if line), ""):
                how += f": {last[:300]}"
        return how


def _environment(threads: int, device: str, folder: Path, cpu_devices: int) -> dict[str, str]:
    environment = dict(os.environ)
    # Idle threads of one worker must not spin on the cores that another is being measured on.
    environment["OMP_WAIT_POLICY"] = "PASSIVE"
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[name] = str(threads)
    # JAX takes three quarters of a GPU by default, which leaves nothing for the others.
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if device == "cpu":
        environment.setdefault("JAX_PLATFORMS", "cpu")
    if device == "cpu" and cpu_devices > 1:
        flags = f"{environment.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={cpu_devices}"
        environment["XLA_FLAGS"] = flags.strip()
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    environment["TRITON_CACHE_DIR"] = str(folder / "triton")
    # The worker finds what the parent finds, also where that came from sys.path alone.
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return environment
