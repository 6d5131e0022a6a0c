"""The ranks of one torch implementation: rendezvous, agreement on the count of calls, and barriers before each call."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from loss_core.dispatch.protocol import BackendUnavailable

# Seconds to wait for rank 0, which may still be importing torch.
_RENDEZVOUS_LIMIT = 120.0


@dataclass(frozen=True)
class Ranks:
    """Rank of this process among those that shard the vocabulary; a single process by default."""

    rank: int = 0
    world_size: int = 1

    def device(self, name: str) -> str:
        """This rank's device: one accelerator per rank, or the CPU."""
        return name if self.world_size == 1 or name == "cpu" else f"{name}:{self.rank}"

    def all_reduce_min(self, value: int) -> int:
        """Minimum of the value over all ranks; a barrier for the hosts."""
        if self.world_size == 1:
            return value
        smallest = torch.tensor(value)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        return int(smallest)

    def all_ready(self, ready: bool) -> bool:
        """Whether every rank is ready for another call; a barrier, so that all start it together."""
        return bool(self.all_reduce_min(int(ready)))

    def device_barrier(self, device: str) -> None:
        """Enqueue a barrier over the ranks' devices; the host does not wait."""
        if self.world_size > 1:
            dist.all_reduce(torch.zeros(1, device=device))


def join(rank: int, ranks: int, rendezvous: str, device: str) -> Ranks:
    """Join the process group of all ranks, gloo on the CPU and NCCL on CUDA.

    Args:
        rendezvous: path of an empty folder, the same for all ranks.
    Raises:
        BackendUnavailable: if there are fewer devices than ranks.
    """
    if ranks == 1:
        return Ranks()
    if device != "cpu":
        count = torch.cuda.device_count() if device == "cuda" else 0
        if count < ranks:
            raise BackendUnavailable(
                f"{ranks} ranks need {ranks} CUDA devices; torch sees {count} for device {device!r}."
            )
        torch.cuda.set_device(rank)
    # A TCP store, as with torchrun: a file store is much slower.
    store = _store(rank, ranks, Path(rendezvous) / "port")
    # Beside NCCL, gloo serves CPU tensors: the ranks agree on the count of calls without the device.
    dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", store=store, rank=rank,
                            world_size=ranks)  # fmt: skip
    return Ranks(rank, ranks)


def _store(rank: int, ranks: int, file: Path) -> Any:
    """The TCP store of the ranks. Rank 0 listens on a free port and writes its number to the file."""
    # Not at module level: builds of torch without distributed lack it.
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if rank == 0:
        store = TCPStore("127.0.0.1", 0, ranks, is_master=True, wait_for_workers=False)
        # Renamed into place, so that no rank reads an incomplete number.
        partial = file.with_suffix(".new")
        partial.write_text(str(store.port), "ascii")
        os.replace(partial, file)
        return store
    deadline = time.monotonic() + _RENDEZVOUS_LIMIT
    while not file.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank 0 did not publish its port within {_RENDEZVOUS_LIMIT:.0f} s.")
        time.sleep(0.01)
    return TCPStore("127.0.0.1", int(file.read_text("ascii")), ranks, is_master=False, wait_for_workers=False)
