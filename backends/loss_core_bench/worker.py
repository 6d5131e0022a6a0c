"""What a worker process of `loss-core bench` serves: one implementation after the other, on one framework."""

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

# By framework: the module that measures on it. Imported when asked for, so that a worker loads one framework.
_RUNNERS = {"torch": "loss_core_bench.torch_runner", "jax": "loss_core_bench.jax_runner"}


class Worker:
    """Serves `loss_core.bench.measure.processes.Processes`; its methods are described there.

    Raises:
        BackendUnavailable: there is no such device or module, or fewer devices than ranks.
    """

    def __init__(
        self, framework: str, device: str, imports: Sequence[str], rank: int = 0, ranks: int = 1, meet: str = ""
    ) -> None:
        with _missing_modules_told():
            self.module: Any = importlib.import_module(_RUNNERS[framework])
            for name in imports:
                importlib.import_module(name)
        self.device = self.module.device_name(device)
        self.ranks = self.module.join(rank, ranks, meet, device)
        self.job: Job | None = None
        self.runner: Runner | None = None

    def about(self) -> dict[str, Any]:
        """Versions that a time depends on, and the device."""
        return {"versions": self.module.versions(), "device": self.device}

    def setup(self, job: Job, kind: str, name: str) -> None:
        """Build an implementation."""
        self.runner, self.job = None, job
        with _missing_modules_told():
            self.runner = self.module.make_runner(job, kind, name, self.ranks)

    def evaluate(self, job: Job) -> Arrays:
        """Loss and gradients of a reduced call, for the comparison with float64."""
        return self._runner.evaluate(*make_inputs(job))

    def prepare(self) -> Prepared:
        """First call, with what it compiles, and one for the memory."""
        assert self.job is not None
        self._runner.load(*make_inputs(self.job))
        with _missing_modules_told():
            return self._runner.prepare(sampled_tokens(self.job))

    def round(self, budget: float, most: int) -> list[float] | Rates:
        """Timed calls, as many as fit the budget in seconds, behind one that is not timed.

        In a training loop a call follows another; here the process has slept while others worked, and what memory it
        gave back may be gone from the machine.
        """
        assert self.job is not None
        if not self._runner.loaded:
            self._runner.load(*make_inputs(self.job))
        self._runner.warm_up()
        return self._runner.round(budget, most)

    def drop(self) -> None:
        """Give the memory of the inputs back."""
        self._runner.unload()

    @property
    def _runner(self) -> Runner:
        assert self.runner is not None, "setup comes first"
        return self.runner


@contextlib.contextmanager
def _missing_modules_told() -> Iterator[None]:
    """Part of a package may be missing, which it finds out as late as in its first call."""
    try:
        yield
    except ImportError as error:
        raise BackendUnavailable(str(error)) from error
