"""Processes that compute one call together, the vocabulary sharded over them: how they are started, asked and ended.

A backend says what to start (`rank_setup`): a process for each rank, or one that holds all ranks. Each runs
`loss_core.rank_worker` and talks over a pipe. When one dies, or an answer does not come in time, the others are ended
and the caller gets a RanksFailed; when the caller dies, the pipes close and the processes end by themselves.
"""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, NoReturn, Self

from numpy.typing import NDArray

from loss_core.backend import BackendUnavailable, Evaluation, load_backend
from loss_core.config import LossConfig, is_runtime_field
from loss_core.vocab_split import together

# Seconds for a process to start and import its framework (machines are slow when busy), and to answer one call.
START_LIMIT = 180.0
CALL_LIMIT = 60.0


class RanksFailed(RuntimeError):
    """A rank died, or did not answer in time; all of them have been ended."""


class RankError(RuntimeError):
    """The call raised on the ranks, as it would have in this process; the message names type and text."""


@dataclass(frozen=True)
class Refusal:
    """What a process answers where the call raised: the name of the exception's type, and its text."""

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


@dataclass(frozen=True)
class Request:
    """One call, as it is sent to every process: the whole problem, of which each rank takes its part.

    Attributes:
        config: without runtime fields, which a process sets for itself.
        sizes: classes of each rank's shard, in rank order.
        The others: as in `loss_core.backend.Backend.evaluate`.
    """

    config: LossConfig
    flag: str
    arrays: Mapping[str, NDArray[Any]]
    dtype: str
    upstream: NDArray[Any] | None
    grad_of: tuple[str, ...]
    sizes: tuple[int, ...]


class Ranks:
    """The processes of one backend and number of ranks. A context manager: they end with the block.

    Args:
        backend: "torch" or "jax".
        ranks: how many share the vocabulary.
        modules: Python modules to import in each process, which register the caller's losses.
        call_limit: seconds within which every rank must answer a call.
    """

    def __init__(
        self, backend: str, ranks: int, *, modules: Sequence[str] = (), call_limit: float = CALL_LIMIT
    ) -> None:
        self.backend, self.ranks, self.call_limit = backend, ranks, call_limit
        setup = load_backend(backend).rank_setup(ranks)
        self.splits = setup.splits
        self._folder = tempfile.TemporaryDirectory(prefix="loss-core-ranks-")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        try:
            for rank in range(setup.processes):
                self._start(rank, setup.environment, modules)
            self._answers(START_LIMIT, "to start")
        except BaseException:
            self.close()
            raise

    def _start(self, rank: int, environment: Mapping[str, str], modules: Sequence[str]) -> None:
        ours, theirs = Pipe()
        command = [
            sys.executable, "-m", "loss_core.rank_worker", str(theirs.fileno()), self.backend, str(rank),
            str(self.ranks), self._folder.name, *modules,
        ]  # fmt: skip
        # What can be imported here can be imported there, whichever way it came on the path.
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        with open(self._log(rank), "wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **environment, "PYTHONPATH": paths},
            )
        # With our copy of its end closed, the pipe ends when the process does.
        theirs.close()
        self._processes.append(process)
        self._pipes.append(ours)

    def evaluate(self, request: Request) -> Evaluation:
        """The call's loss and gradients, put together from all ranks.

        Raises:
            BackendUnavailable: the flag can't compute this call over ranks.
            RankError: the call raised on every rank.
            RanksFailed: a rank died or did not answer in time.
        """
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send(request)
            except OSError:
                self._fail(f"{self._who(rank)} {self._end(rank)}")
        answers = self._answers(self.call_limit, "to compute a call")
        refusals = {rank: answer for rank, answer in enumerate(answers) if isinstance(answer, Refusal)}
        if not refusals:
            return together([found for answer in answers for found in answer])
        if len(refusals) < len(answers):
            # The others went on, so that the next collective of these processes would not match.
            self._fail("; ".join(f"{self._who(rank)} raised {refusal}" for rank, refusal in refusals.items()))
        if refusals[0].kind == BackendUnavailable.__name__:
            raise BackendUnavailable(refusals[0].text)
        raise RankError(str(refusals[0]))

    def _answers(self, limit: float, purpose: str) -> list[Any]:
        """The answer of each process, in order."""
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + limit
        while len(answers) < len(self._pipes):
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            ready = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0.0))
            if not ready:
                late = ", ".join(self._who(rank) for rank in waiting.values())
                raised = [f"{self._who(r)} raised {a}" for r, a in answers.items() if isinstance(a, Refusal)]
                self._fail("; ".join([f"{late} took more than {limit:.0f} s {purpose}", *raised]))
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting[pipe]
                try:
                    answers[rank] = pipe.recv()
                except (EOFError, OSError):
                    self._fail(f"{self._who(rank)} {self._end(rank)}")
        return [answers[rank] for rank in range(len(self._pipes))]

    def _fail(self, what: str) -> NoReturn:
        self.close()
        others = "; the others have been ended" if len(self._pipes) > 1 else ""
        raise RanksFailed(f"{what}{others}.")

    def _who(self, rank: int) -> str:
        if len(self._pipes) == 1:
            return f"the {self.backend} process of {self.ranks} ranks"
        return f"rank {rank} of {self.ranks} on {self.backend}"

    def _end(self, rank: int) -> str:
        """How a process ended, with its last line."""
        try:
            code = self._processes[rank].wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = None
        if code is None:
            how = "closed its pipe"
        elif code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        else:
            how = f"ended with exit code {code}"
        lines = self._log(rank).read_text("utf-8", "replace").strip().splitlines()
        return how + (f" ({lines[-1].strip()})" if lines else "")

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name) / f"rank-{rank}.log"

    def close(self) -> None:
        """End the processes, at once: they hold nothing that must be kept."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def without_runtime_fields(config: LossConfig) -> LossConfig:
    """A copy that can be sent to another process: handles of this one are taken out."""
    twin = copy.copy(config)
    for f in fields(config):
        if is_runtime_field(f):
            setattr(twin, f.name, None)
    return twin
