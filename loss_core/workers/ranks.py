"""Ranks that compute one call together, with the vocabulary sharded over them.

The backend's `rank_setup` determines the processes: one per rank, or one for all ranks.
"""

from __future__ import annotations

import copy
import importlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from numpy.typing import NDArray

from loss_core.dispatch.flags import load_backend
from loss_core.dispatch.protocol import Backend, Evaluation
from loss_core.field_checks import is_runtime_field
from loss_core.loss_config import LossConfig
from loss_core.workers.pool import Pool, RequestFailed, Start, WorkerFailed
from loss_core.workers.vocab_split import merge

# Seconds per call.
CALL_LIMIT = 60.0


@dataclass(frozen=True)
class Request:
    """One call as it is sent to every process: the unsharded arguments, of which each rank takes its shard.

    Attributes:
        config: without runtime handles, which each process sets itself.
        sizes: vocabulary size of each rank's shard, in rank order.
        The others: as in `loss_core.dispatch.protocol.Backend.evaluate`.
    """

    config: LossConfig
    flag: str
    arrays: Mapping[str, NDArray[Any]]
    dtype: str
    upstream: NDArray[Any] | None
    grad_of: tuple[str, ...]
    sizes: tuple[int, ...]


class Ranks:
    """The processes of one backend for a number of ranks. A context manager: leaving it ends them.

    Args:
        backend: "torch" or "jax".
        ranks: number of ranks over which the vocabulary is sharded.
        modules: Python modules to import in each process, which register the caller's losses.
        call_limit: seconds within which every rank must answer a call.
    Raises:
        WorkerFailed: a process could not start.
    """

    def __init__(
        self, backend: str, ranks: int, *, modules: Sequence[str] = (), call_limit: float = CALL_LIMIT
    ) -> None:
        setup = load_backend(backend).rank_setup(ranks)
        self.splits: tuple[str, ...] = setup.splits
        self.call_limit: float = call_limit
        self._folder = tempfile.TemporaryDirectory(prefix="loss-core-ranks-")
        alone = f"the {backend} process of {ranks} ranks"
        self.pool: Pool = Pool(
            [
                Start(
                    f"rank {rank} of {ranks} on {backend}" if setup.processes > 1 else alone,
                    "loss_core.workers.ranks:join_ranks",
                    {"backend": backend, "rank": rank, "ranks": ranks, "folder": self._folder.name, "modules": modules},
                    setup.environment,
                )
                for rank in range(setup.processes)
            ]
        )
        try:
            self.pool.wait_started()
        except RequestFailed as error:
            self.close()
            raise WorkerFailed(f"the ranks on {backend} could not start: {error}") from error
        except BaseException:
            self.close()
            raise

    def evaluate(self, request: Request) -> Evaluation:
        """Loss and gradients of a call, merged from all ranks.

        Raises:
            BackendUnavailable: the flag can't compute this call over ranks.
            RequestFailed: the call raised on every rank.
            WorkerFailed: a rank died or timed out.
        """
        results = self.pool.call(self.call_limit, "evaluate_shards", request=request)
        return merge(request.config, [evaluation for of_process in results for evaluation in of_process])

    def close(self) -> None:
        """End the processes. May be called more than once."""
        self.pool.stop()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def join_ranks(backend: str, rank: int, ranks: int, folder: str, modules: Sequence[str]) -> Backend:
    """Factory of the pool: the backend, with the process group of all ranks set up."""
    for module in modules:
        importlib.import_module(module)
    loaded = load_backend(backend)
    loaded.join_ranks(rank, ranks, Path(folder))
    return loaded


def without_runtime_fields(config: LossConfig) -> LossConfig:
    """A copy that can be sent to another process: runtime handles are None."""
    twin = copy.copy(config)
    for f in fields(config):
        if is_runtime_field(f):
            setattr(twin, f.name, None)
    return twin
