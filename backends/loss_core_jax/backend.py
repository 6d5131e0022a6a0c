"""The JAX backend as `loss_core.dispatch.protocol.Backend` has it: who makes which loss, what can be used here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from loss_core.config import (
    FusedLinearCEConfig,
    KDLossConfig,
    LossConfig,
    MaskedCrossEntropyConfig,
    TEParallelCEConfig,
)
from loss_core.dispatch.protocol import FlagStatus, KernelChoice
from loss_core_jax.evaluate import evaluate
from loss_core_jax.losses.cross_entropy import MaskedCrossEntropy, TEParallelCrossEntropy
from loss_core_jax.losses.distillation import KDLoss
from loss_core_jax.losses.linear_cross_entropy import FusedLinearCrossEntropy
from loss_core_jax.parallel.ranks import evaluate_shards, join_ranks, rank_setup

__all__ = [
    "builders",
    "choose_kernel",
    "evaluate",
    "evaluate_shards",
    "join_ranks",
    "kernel_status",
    "rank_setup",
]

_BUILDERS: dict[tuple[type[LossConfig], str], Callable[[Any], Any]] = {
    (MaskedCrossEntropyConfig, "xla"): MaskedCrossEntropy.from_config,
    (FusedLinearCEConfig, "xla"): FusedLinearCrossEntropy.from_config,
    (TEParallelCEConfig, "xla"): TEParallelCrossEntropy.from_config,
    (KDLossConfig, "xla"): KDLoss.from_config,
}


def kernel_status(kernel: str) -> FlagStatus:
    """Whether a kernel can be used here, and why not."""
    return FlagStatus(f"jax:{kernel}", True, "", f"jax {jax.__version__}", "")


def builders() -> Mapping[tuple[type[LossConfig], str], Callable[[Any], Any]]:
    """The table (config class, kernel) -> builder."""
    return _BUILDERS


def choose_kernel(config: LossConfig, candidates: tuple[str, ...]) -> KernelChoice:
    """What `auto` takes among the kernels that are built and usable."""
    return KernelChoice(f"jax:{candidates[0]}", "the only kernel on jax")
