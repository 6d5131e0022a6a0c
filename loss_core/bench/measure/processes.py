"""The worker processes of one implementation, called as one.

There is one process; over tensor parallel on torch there is one per rank, on JAX one for the devices of all ranks. They
run `loss_core_bench.worker`, which loads one framework and is therefore never imported here.
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
    """Results of the first calls of one process.

    Attributes:
        first_call: seconds, compilation included.
        peak: peak bytes above the inputs during a later call.
        note: what the implementation chose.
        sample: results of the call at the full shape to compare with float64: "loss"; "rows", the rows of the first
            gradient at the sampled tokens; and for a loss that computes its logits "inner", the inner products of
            hidden states and weight with their gradients, which are equal.
    """

    first_call: float
    peak: int
    note: str
    sample: Arrays


@dataclass(frozen=True)
class Rates:
    """Rates of the machine: bytes read and written per second by a copy, operations per second of a matrix product."""

    copy: float
    product: float


class Processes:
    """Processes that measure one implementation. Call `stop` in a `finally`.

    Args:
        framework: "torch" or "jax".
        ranks: count of ranks that shard the vocabulary.
        threads: total over the processes, at least one each; on Linux also the count of cores that they may use.
        device: "cpu", or an accelerator, one per rank.
        imports: modules that register the user's losses.
        folder: of the run, for compiler caches: with the caches of earlier runs a first call would be too fast.
        limit: timeout of one request in seconds.
    """

    def __init__(
        self, framework: str, ranks: int, threads: int, device: str, imports: Sequence[str], folder: Path, limit: float
    ) -> None:
        self.limit = limit
        count = ranks if framework == "torch" else 1
        threads_each = max(1, threads // count)
        environment = _environment(threads_each, device, folder, ranks if framework == "jax" else 1)
        arguments = {
            "framework": framework, "device": device, "imports": tuple(imports), "ranks": ranks,
            # A new folder for each start: a port file of an earlier one would be stale.
            "rendezvous": tempfile.mkdtemp(dir=folder),
        }  # fmt: skip
        self.pool: Pool = Pool(
            [
                Start(
                    f"rank {rank} of {ranks}" if count > 1 else "",
                    "loss_core_bench.worker:Worker",
                    {**arguments, "rank": rank},
                    environment,
                    _cores(rank * threads_each % max(threads, 1), threads_each),
                )
                for rank in range(count)
            ]
        )

    def wait_started(self, limit: float) -> dict[str, Any]:
        """Wait until all have started; return the "versions" of the framework and the name of the "device"."""
        self.pool.wait_started(limit)
        info: dict[str, Any] = self.pool.call(self.limit, "info")[0]
        return info

    def setup(self, job: Job, kind: str, name: str) -> None:
        """Build an implementation of kind "flag", "baseline" or "roofline"."""
        self.pool.call(self.limit, "setup", job=job, kind=kind, name=name)

    def prepare(self) -> list[Prepared]:
        """Run the first calls; return one result per process."""
        return self.pool.call(self.limit, "prepare")

    def evaluate(self, job: Job) -> list[Arrays]:
        """Loss and gradients by argument name of a job of another shape, one dict per process."""
        return self.pool.call(self.limit, "evaluate", job=job)

    def times(self, budget: float, max_calls: int) -> list[float]:
        """Seconds of each timed call, as many as fit the budget in seconds."""
        return slowest_times(self.pool.call(self.limit, "round", budget=budget, max_calls=max_calls))

    def rates(self, budget: float, max_calls: int) -> Rates:
        """Rates of one rank while all are busy."""
        return slowest_rates(self.pool.call(self.limit, "round", budget=budget, max_calls=max_calls))

    def unload(self) -> None:
        """Free the memory of the inputs."""
        self.pool.call(self.limit, "unload")

    def stop(self) -> None:
        """End the processes and their children. May be called more than once."""
        self.pool.stop()


def slowest_times(per_rank: Sequence[Sequence[float]]) -> list[float]:
    """Seconds of calls that all ranks start together: for each call, those of its slowest rank."""
    return [max(seconds) for seconds in zip(*per_rank, strict=True)]


def slowest_rates(per_rank: Sequence[Rates]) -> Rates:
    """The smallest of each rate over the ranks."""
    return Rates(min(rates.copy for rates in per_rank), min(rates.product for rates in per_rank))


def _cores(first: int, count: int) -> list[int] | None:
    """`count` of the cores that this process may use, from index `first`, wrapping around; None where not supported."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    allowed = sorted(os.sched_getaffinity(0))
    return [allowed[(first + i) % len(allowed)] for i in range(count)]


def _environment(threads: int, device: str, folder: Path, cpu_devices: int) -> dict[str, str]:
    environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    # Idle threads of one worker must not spin on the cores on which another is measured.
    environment["OMP_WAIT_POLICY"] = "PASSIVE"
    # JAX preallocates three quarters of a GPU's memory by default, which leaves too little for the others.
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
