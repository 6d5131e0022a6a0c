"""The ranks of one torch implementation: how they meet, count together, and begin each call at the same moment."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from loss_core.dispatch.protocol import BackendUnavailable

# Seconds to wait for the first rank, which may still be loading torch.
_MEET_LIMIT = 120.0


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the vocabulary; alone by default."""

    rank: int = 0
    ranks: int = 1

    def device(self, name: str) -> str:
        """This rank's device: of accelerators each has its own."""
        return name if self.ranks == 1 or name == "cpu" else f"{name}:{self.rank}"

    def least(self, value: int) -> int:
        """The smallest of the ranks' numbers. None returns before all have come."""
        if self.ranks == 1:
            return value
        number = torch.tensor(value)
        dist.all_reduce(number, dist.ReduceOp.MIN)
        return int(number)

    def ready(self, wanted: bool) -> bool:
        """Whether every rank wants another call, which then begins for all of them now."""
        return bool(self.least(int(wanted)))

    def line_up(self, device: str) -> None:
        """Make the device wait, behind its work so far, for the other ranks' devices; the host goes on."""
        if self.ranks > 1:
            dist.all_reduce(torch.zeros(1, device=device))


def join(rank: int, ranks: int, meet: str, device: str) -> Ranks:
    """Meet the other ranks in a process group, gloo on the CPU and NCCL on CUDA.

    Args:
        meet: an empty folder that all ranks know.
    Raises:
        BackendUnavailable: there are fewer devices than ranks.
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
    # A store over TCP, as torchrun gives it: over files, what the ranks ask each other there would take much longer.
    store = _store(rank, ranks, Path(meet) / "port")
    # CPU tensors go over gloo also beside NCCL: the ranks agree on how many calls they make without the device.
    dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", store=store, rank=rank,
                            world_size=ranks)  # fmt: skip
    return Ranks(rank, ranks)


def _store(rank: int, ranks: int, file: Path) -> Any:
    """The first rank takes a port that is free and leaves its number in the file."""
    # Not at the top: builds of torch without distributed have no such name.
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if rank == 0:
        store = TCPStore("127.0.0.1", 0, ranks, is_master=True, wait_for_workers=False)
        beside = file.with_suffix(".new")
        beside.write_text(str(store.port), "ascii")
        os.replace(beside, file)
        return store
    deadline = time.monotonic() + _MEET_LIMIT
    while not file.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank 0 did not come within {_MEET_LIMIT:.0f} s.")
        time.sleep(0.01)
    return TCPStore("127.0.0.1", int(file.read_text("ascii")), ranks, is_master=False, wait_for_workers=False)
