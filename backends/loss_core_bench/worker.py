"""The object that a worker process of `loss-core bench` serves: one implementation after another, on one framework."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

from loss_core.bench.measure.job import Job, make_inputs, sampled_tokens
from loss_core.bench.measure.processes import Prepared, Rates
from loss_core.bench.measure.shards import Arrays
from loss_core.dispatch.protocol import BackendUnavailable
from loss_core_bench.runner import Runner

# Runner module by framework. Imported on use, so that a worker loads one framework.
_RUNNERS = {"torch": "loss_core_bench.torch_runner", "jax": "loss_core_bench.jax_runner"}


class Worker:
    """One rank's side of `loss_core.bench.measure.processes.Processes`, whose methods call these.

    Raises:
        BackendUnavailable: if a device or module is missing, or there are fewer devices than ranks.
    """

    def __init__(
        self, framework: str, device: str, imports: Sequence[str], rank: int = 0, ranks: int = 1, rendezvous: str = ""
    ) -> None:
        with _import_errors_as_unavailable():
            self.module: Any = importlib.import_module(_RUNNERS[framework])
            for name in imports:
                importlib.import_module(name)
        self.device = self.module.device_name(device)
        self.ranks = self.module.join(rank, ranks, rendezvous, device)
        self.job: Job | None = None
        self.runner: Runner | None = None

    def info(self) -> dict[str, Any]:
        """Versions that timings depend on, and the name of the device."""
        return {"versions": self.module.versions(), "device": self.device}

    def setup(self, job: Job, kind: str, name: str) -> None:
        """Build an implementation."""
        self.runner, self.job = None, job
        with _import_errors_as_unavailable():
            self.runner = self.module.make_runner(job, kind, name, self.ranks)

    def evaluate(self, job: Job) -> Arrays:
        """Loss and gradients of a reduced call, for the comparison with float64."""
        return self._runner.evaluate(*make_inputs(job))

    def prepare(self) -> Prepared:
        """Load the inputs and run the first calls: time with compilation, peak memory, a sample of the results."""
        assert self.job is not None
        self._runner.load(*make_inputs(self.job))
        with _import_errors_as_unavailable():
            return self._runner.prepare(sampled_tokens(self.job))

    def round(self, budget: float, max_calls: int) -> list[float] | Rates:
        """Timed calls, as many as fit the budget in seconds, after one that is not timed.

        In a training loop one call follows another; here the process was idle while others worked, and memory that it
        freed may have to be mapped again.
        """
        assert self.job is not None
        if not self._runner.loaded:
            self._runner.load(*make_inputs(self.job))
        self._runner.warm_up()
        return self._runner.round(budget, max_calls)

    def unload(self) -> None:
        """Free the memory of the inputs."""
        self._runner.unload()

    @property
    def _runner(self) -> Runner:
        assert self.runner is not None, "setup comes first"
        return self.runner


@contextlib.contextmanager
def _import_errors_as_unavailable() -> Iterator[None]:
    """Raise an ImportError as BackendUnavailable; an incomplete package may raise it as late as its first call."""
    try:
        yield
    except ImportError as error:
        raise BackendUnavailable(str(error)) from error
