"""The JAX implementation of `loss_core.dispatch.protocol.Backend`: builders of the losses, and the usable flags."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

import loss_core_jax
from loss_core.dispatch.protocol import FlagStatus, KernelChoice
from loss_core.loss_config import LossConfig
from loss_core_jax.evaluate import evaluate, host_reads
from loss_core_jax.losses.base import Loss
from loss_core_jax.parallel.ranks import evaluate_shards, join_ranks, rank_setup

__all__ = [
    "batch_invariant",
    "builders",
    "choose_kernel",
    "evaluate",
    "evaluate_shards",
    "host_reads",
    "join_ranks",
    "kernel_status",
    "rank_setup",
]

_LOSSES: tuple[type[Loss], ...] = tuple(getattr(loss_core_jax, name) for name in loss_core_jax.__all__)

_BUILDERS = {(loss.config_class, "xla"): loss.from_config for loss in _LOSSES}


def kernel_status(kernel: str) -> FlagStatus:
    """Whether a kernel can be used here, and why not."""
    return FlagStatus(f"jax:{kernel}", True, "", f"jax {jax.__version__}", "")


def builders() -> Mapping[tuple[type[LossConfig], str], Callable[[Any], Any]]:
    """The table (config class, kernel) -> builder."""
    return _BUILDERS


def choose_kernel(config: LossConfig, candidates: tuple[str, ...]) -> KernelChoice:
    """The kernel that `auto` chooses among those that are built and usable."""
    return KernelChoice(f"jax:{candidates[0]}", "the only kernel on jax")


def batch_invariant(kernel: str, row_bytes: int) -> bool:
    """False: XLA compiles a program for each shape, and the order in which it sums a row may differ between them."""
    return False
