"""The JAX backend as `loss_core.dispatch.protocol.Backend` has it: who makes which loss, what can be used here."""

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

# What the package exports is the table of losses.
_LOSSES: tuple[type[Loss], ...] = tuple(getattr(loss_core_jax, name) for name in loss_core_jax.__all__)

_BUILDERS = {(loss.config_class, "xla"): loss.from_config for loss in _LOSSES}


def kernel_status(kernel: str) -> FlagStatus:
    """Whether a kernel can be used here, and why not."""
    return FlagStatus(f"jax:{kernel}", True, "", f"jax {jax.__version__}", "")


def builders() -> Mapping[tuple[type[LossConfig], str], Callable[[Any], Any]]:
    """The table (config class, kernel) -> builder."""
    return _BUILDERS


def choose_kernel(config: LossConfig, candidates: tuple[str, ...]) -> KernelChoice:
    """What `auto` takes among the kernels that are built and usable."""
    return KernelChoice(f"jax:{candidates[0]}", "the only kernel on jax")


def batch_invariant(kernel: str, row_bytes: int) -> bool:
    """No promise: XLA compiles a program for each shape, and may order the sum of a row in another way in each."""
    return False
