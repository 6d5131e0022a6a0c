"""Megatron-core's vocabulary-parallel cross entropy, with the full vocabulary on one rank."""

from __future__ import annotations

import importlib
from typing import Any

from loss_core_baselines import Loss, Losses, reduced


def _cross_entropy(config: Any) -> Loss:
    module = importlib.import_module("megatron.core.tensor_parallel.cross_entropy")
    _start_group_of_one()

    def loss(logits: Any, labels: Any) -> Any:
        return reduced(module.vocab_parallel_cross_entropy(logits, labels, config.label_smoothing), labels, config)

    return loss


def _start_group_of_one() -> None:
    """Set up the group over which it reduces, with this process only, unless the program has set one up."""
    dist, state = (importlib.import_module(name) for name in ("torch.distributed", "megatron.core.parallel_state"))
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not state.model_parallel_is_initialized():
        state.initialize_model_parallel()


LOSSES: Losses = {"cross_entropy": (_cross_entropy, ("reduction", "label_smoothing"))}
