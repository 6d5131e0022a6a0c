"""Calls with a sharded vocabulary for `loss_core check --tp`: gloo on the CPU, one process for each rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from loss_core.dispatch.protocol import Evaluation, RankSetup
from loss_core.workers.ranks import Request
from loss_core.workers.vocab_split import shard, vocab_axes
from loss_core_torch.evaluate import evaluate


def rank_setup(ranks: int) -> RankSetup:
    """One process for each rank; any split of the vocabulary."""
    return RankSetup(ranks, {}, ("whole", "even", "uneven", "empty"))


def join_ranks(rank: int, ranks: int, folder: Path) -> None:
    """Initialise the process group of the ranks."""
    # The ranks share the cores.
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(folder / "store").as_uri(), rank=rank, world_size=ranks)


def evaluate_shards(request: Request) -> list[Evaluation]:
    """This rank's part of a call."""
    rank = dist.get_rank()
    axes = vocab_axes(request.config)
    parts = {name: shard(axes.get(name), array, request.sizes, rank) for name, array in request.arrays.items()}
    config: Any = replace(request.config, tp_group=dist.group.WORLD)
    return [
        evaluate(
            config.build(backend=request.flag),
            parts,
            dtype=request.dtype,
            upstream=request.upstream,
            grad_of=request.grad_of,
        )
    ]
