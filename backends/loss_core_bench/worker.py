"""One implementation in a process of its own: told what to measure by lines of JSON, answers with lines of JSON.

    python -m loss_core_bench.worker      # started by loss_core.bench

Requests, each with its answer; an exception becomes {"error": ...}, a peer that can't run {"unusable": ...}:

    {"do": "import", "framework", "device", "imports", "rank", "ranks", "meet"}    -> {"versions", "device"}
    {"do": "setup", "job", "kind", "name"}           -> {}
    {"do": "evaluate", "job", "file"}                -> {}, loss and gradients in the .npz file
    {"do": "prepare", "file"}                        -> {"first_call", "peak", "note"}, what to compare in the .npz file
    {"do": "round", "budget", "most"}                -> {"seconds": [...]} or {"copy_rate", "product_rate"}
    {"do": "drop"}                                   -> {}, the inputs are given back
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TextIO

import numpy as np

from loss_core.bench_job import Job, make_inputs, sampled_tokens
from loss_core_bench.runner import Runner, Unusable

# By framework: the module that measures on it. Imported when asked for, so that a worker loads one framework.
_RUNNERS = {"torch": "loss_core_bench.torch_runner", "jax": "loss_core_bench.jax_runner"}


class Worker:
    """Answers one request after the other."""

    def __init__(self) -> None:
        self.module: Any = None
        self.team: Any = None
        self.job: Job | None = None
        self.runner: Runner | None = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Do what a request asks for."""
        actions: dict[str, Callable[..., dict[str, Any]]] = {
            "import": self.load,
            "setup": self.setup,
            "evaluate": self.evaluate,
            "prepare": self.prepare,
            "round": self.round,
            "drop": self.drop,
        }
        return actions[request["do"]](**{key: value for key, value in request.items() if key != "do"})

    def load(
        self, framework: str, device: str, imports: list[str], rank: int = 0, ranks: int = 1, meet: str = ""
    ) -> dict[str, Any]:
        """Import the framework and the user's modules, and meet the other ranks."""
        self.module = importlib.import_module(_RUNNERS[framework])
        for name in imports:
            importlib.import_module(name)
        device_name = self.module.device_name(device)
        self.team = self.module.join(rank, ranks, meet, device)
        return {"versions": self.module.versions(), "device": device_name}

    def setup(self, job: Mapping[str, Any], kind: str, name: str) -> dict[str, Any]:
        """Build the implementation: kind "flag", "peer" or "floor"."""
        self.runner = None
        self.job = Job.from_dict(job)
        self.runner = self.module.make_runner(self.job, kind, name, self.team)
        return {}

    def evaluate(self, job: Mapping[str, Any], file: str) -> dict[str, Any]:
        """Loss and gradients of a reduced call, for the comparison with float64."""
        results = self._runner.evaluate(*make_inputs(Job.from_dict(job)))
        with open(file, "wb") as out:
            np.savez(out, **results)  # type: ignore[arg-type]
        return {}

    def prepare(self, file: str) -> dict[str, Any]:
        """First call, with what it compiles, and one for the memory; what can be compared with float64 in the file."""
        assert self.job is not None
        self._runner.load(*make_inputs(self.job))
        prepared, sample = self._runner.prepare(sampled_tokens(self.job))
        with open(file, "wb") as out:
            np.savez(out, **sample)  # type: ignore[arg-type]
        return prepared

    def round(self, budget: float, most: int) -> dict[str, Any]:
        """Timed calls, as many as fit the budget in seconds, behind one that is not timed.

        In a training loop a call follows another; here the process has slept while others worked, and what memory it
        gave back may be gone from the machine.
        """
        assert self.job is not None
        if not self._runner.loaded:
            self._runner.load(*make_inputs(self.job))
        self._runner.warm_up()
        return self._runner.round(budget, most)

    def drop(self) -> dict[str, Any]:
        """Give the memory of the inputs back."""
        self._runner.unload()
        return {}

    @property
    def _runner(self) -> Runner:
        assert self.runner is not None, "setup comes first"
        return self.runner


def serve(requests: Iterable[str], answers: TextIO) -> None:
    """Answer each request with a line."""
    worker = Worker()
    for line in requests:
        try:
            reply = worker.answer(json.loads(line))
        except Unusable as reason:
            reply = {"unusable": str(reason)}
        except ImportError as error:  # BackendUnavailable is one, with the reason; of a peer a part may be missing
            reply = {"unusable": str(error)}
        except Exception as error:  # whatever a kernel raises is told, not the end of the benchmark
            text = " ".join(str(error).split())
            reply = {"error": f"{type(error).__name__}: {text[:600]}"}
        with contextlib.suppress(BrokenPipeError):
            answers.write(json.dumps(reply) + "\n")
            answers.flush()


def _listen(requests: queue.SimpleQueue[str]) -> None:
    """Pass the lines on; end the process when the parent is gone, also in the middle of a collective."""
    for line in sys.stdin:
        requests.put(line)
    # Frameworks keep threads that can abort while the interpreter is taken down.
    sys.stderr.flush()
    os._exit(0)


def main() -> None:
    """Serve the parent over stdin and stdout, as long as it is there."""
    # What libraries print must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    serve(iter(requests.get, None), answers)


if __name__ == "__main__":
    main()
