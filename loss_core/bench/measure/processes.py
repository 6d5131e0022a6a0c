"""The processes of one implementation, asked and answered as if they were one.

One process, or over tensor parallel on torch one for each rank; on JAX one process holds all ranks. They run
`loss_core_bench.worker`, which loads one framework, and which is therefore never imported here.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loss_core.bench.measure.job import Job
from loss_core.bench.measure.shards import Arrays
from loss_core.workers.pool import Pool, Start


@dataclass(frozen=True)
class Prepared:
    """What a process found when it made a call for the first time.

    Attributes:
        first_call: seconds.
        peak: most bytes held above the inputs during a later call.
        note: what the implementation chose.
        sample: of the call at the full shape what can be compared with float64: "loss"; "rows", the rows of the first
            gradient that belong to the sampled tokens; and where the loss makes its own logits "inner", the inner
            products of hidden states and weight with their gradients, which are equal.
    """

    first_call: float
    peak: int
    note: str
    sample: Arrays


@dataclass(frozen=True)
class Rates:
    """How fast the machine is: bytes read and written per second, operations of a matrix product per second."""

    copy: float
    product: float


class Processes:
    """Processes that measure one implementation. Use `stop` in a `finally`.

    Args:
        framework: "torch" or "jax".
        ranks: that share the vocabulary.
        threads: of all processes together, at least one each; on Linux also the number of cores that they may use.
        device: "cpu", or an accelerator, of which each rank has its own.
        imports: modules that register the user's losses.
        folder: of the run, where compilers keep what they made: with the caches of earlier runs a first call would cost
            less than it does.
        limit: seconds for one answer.
    """

    def __init__(
        self, framework: str, ranks: int, threads: int, device: str, imports: Sequence[str], folder: Path, limit: float
    ) -> None:
        self.limit = limit
        count = ranks if framework == "torch" else 1
        each = max(1, threads // count)
        environment = _environment(each, device, folder, ranks if framework == "jax" else 1)
        arguments = {
            "framework": framework, "device": device, "imports": tuple(imports), "ranks": ranks,
            # For the rendezvous of the ranks; a folder, because its name must be new.
            "meet": tempfile.mkdtemp(dir=folder),
        }  # fmt: skip
        self.pool: Pool = Pool(
            [
                Start(
                    f"rank {rank} of {ranks}" if count > 1 else "",
                    "loss_core_bench.worker:Worker",
                    {**arguments, "rank": rank},
                    environment,
                    _cores(rank * each % max(threads, 1), each),
                )
                for rank in range(count)
            ]
        )

    def started(self, limit: float) -> dict[str, Any]:
        """Wait for them; "versions" of the framework, and the "device" by its own name."""
        self.pool.wait_started(limit)
        about: dict[str, Any] = self.pool.call(self.limit, "about")[0]
        return about

    def setup(self, job: Job, kind: str, name: str) -> None:
        """Build the implementation: kind "flag", "baseline" or "roofline"."""
        self.pool.call(self.limit, "setup", job=job, kind=kind, name=name)

    def prepare(self) -> list[Prepared]:
        """The first calls of the job, by each process."""
        return self.pool.call(self.limit, "prepare")

    def evaluate(self, job: Job) -> list[Arrays]:
        """Loss and gradients of a job of another shape, by argument name, of each process."""
        return self.pool.call(self.limit, "evaluate", job=job)

    def times(self, budget: float, most: int) -> list[float]:
        """Seconds of calls, as many as fit the budget."""
        return slowest_times(self.pool.call(self.limit, "round", budget=budget, most=most))

    def rates(self, budget: float, most: int) -> Rates:
        """The rates of one rank while all are busy."""
        return slowest_rates(self.pool.call(self.limit, "round", budget=budget, most=most))

    def drop(self) -> None:
        """Give the memory of the inputs back."""
        self.pool.call(self.limit, "drop")

    def stop(self) -> None:
        """End the processes and everything that they started. May be called more than once."""
        self.pool.stop()


def slowest_times(of_ranks: Sequence[Sequence[float]]) -> list[float]:
    """Seconds of calls that all ranks began together: each as slow as on its slowest rank."""
    return [max(seconds) for seconds in zip(*of_ranks, strict=True)]


def slowest_rates(of_ranks: Sequence[Rates]) -> Rates:
    """The rates that every rank has."""
    return Rates(min(rates.copy for rates in of_ranks), min(rates.product for rates in of_ranks))


def _cores(first: int, count: int) -> list[int] | None:
    """Some of the cores of this process."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    known = sorted(os.sched_getaffinity(0))
    return [known[(first + i) % len(known)] for i in range(count)]


def _environment(threads: int, device: str, folder: Path, cpu_devices: int) -> dict[str, str]:
    environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    # Idle threads of one worker must not spin on the cores that another is being measured on.
    environment["OMP_WAIT_POLICY"] = "PASSIVE"
    # JAX takes three quarters of a GPU by default, which leaves nothing for the others.
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if device == "cpu":
        # Hides accelerators.
        environment["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
    if device == "cpu" and cpu_devices > 1:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={cpu_devices}"
        environment["XLA_FLAGS"] = flags.strip()
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    environment["TRITON_CACHE_DIR"] = str(folder / "triton")
    return environment
