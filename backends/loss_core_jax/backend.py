"""What `loss_core.backend` asks of the JAX backend: which kernel makes which loss, what can be used here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from loss_core.backend import FlagStatus, KernelChoice
from loss_core.config import (
    FusedLinearCEConfig,
    KDLossConfig,
    LossConfig,
    MaskedCrossEntropyConfig,
    TEParallelCEConfig,
)
from loss_core_jax.evaluate import evaluate
from loss_core_jax.losses import FusedLinearCrossEntropy, KDLoss, MaskedCrossEntropy, TEParallelCrossEntropy
from loss_core_jax.ranks import evaluate_shards, join_ranks, rank_setup

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
    (MaskedCrossEntropyConfig, "xla"): lambda c: MaskedCrossEntropy(
        c.fp32_upcast, c.ignore_index, c.reduction, c.tp_group, c.inplace_grad
    ),
    (FusedLinearCEConfig, "xla"): lambda c: FusedLinearCrossEntropy(
        c.ignore_index, c.logit_softcapping, c.reduction, c.tp_group, c.sequence_parallel, c.skip_ignored
    ),
    (TEParallelCEConfig, "xla"): lambda c: TEParallelCrossEntropy(
        c.ignore_index, c.reduction, c.tp_group, c.inplace_grad
    ),
    (KDLossConfig, "xla"): lambda c: KDLoss(c.ignore_index, c.temperature, c.fp32_upcast, c.tp_group, c.chunk_size),
}


def kernel_status(kernel: str) -> FlagStatus:
    """Whether a kernel can be used here, and why not."""
    version = f"jax {jax.__version__}"
    if kernel == "xla":
        return FlagStatus("jax:xla", True, "", version, "")
    reason = f"'jax:{kernel}' has no kernels in this version: use 'jax:xla'."
    return FlagStatus(f"jax:{kernel}", False, reason, version, "")


def builders() -> Mapping[tuple[type[LossConfig], str], Callable[[Any], Any]]:
    """The table (config class, kernel) -> builder."""
    return _BUILDERS


def choose_kernel(config: LossConfig, candidates: tuple[str, ...]) -> KernelChoice:
    """What `auto` takes among the kernels that are built and usable."""
    return KernelChoice(f"jax:{candidates[0]}", "the only kernel of this version on jax")
