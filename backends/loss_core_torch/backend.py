"""What `loss_core.backend` asks of the torch backend: which kernel makes which loss, what can be used here."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from loss_core.backend import FlagStatus, KernelChoice, install_line
from loss_core.config import (
    FusedLinearCEConfig,
    KDLossConfig,
    LossConfig,
    MaskedCrossEntropyConfig,
    TEParallelCEConfig,
)
from loss_core_torch import auto, compiled, te
from loss_core_torch.evaluate import evaluate
from loss_core_torch.modules import FusedLinearCrossEntropy, KDLoss, MaskedCrossEntropy, TEParallelCrossEntropy
from loss_core_torch.ranks import evaluate_shards, join_ranks, rank_setup

__all__ = [
    "builders",
    "choose_kernel",
    "evaluate",
    "evaluate_shards",
    "join_ranks",
    "kernel_status",
    "rank_setup",
]


def _masked(c: MaskedCrossEntropyConfig) -> MaskedCrossEntropy:
    return MaskedCrossEntropy(c.fp32_upcast, c.ignore_index, c.reduction, c.tp_group, c.inplace_grad)


def _fused(c: FusedLinearCEConfig) -> FusedLinearCrossEntropy:
    return FusedLinearCrossEntropy(
        c.ignore_index, c.logit_softcapping, c.reduction, c.tp_group, c.sequence_parallel, c.skip_ignored
    )


def _parallel(c: TEParallelCEConfig) -> TEParallelCrossEntropy:
    return TEParallelCrossEntropy(c.ignore_index, c.reduction, c.tp_group, c.inplace_grad)


def _distillation(c: KDLossConfig) -> KDLoss:
    return KDLoss(c.ignore_index, c.temperature, c.fp32_upcast, c.tp_group, c.chunk_size)


_BUILDERS: dict[tuple[type[LossConfig], str], Callable[[Any], Any]] = {
    (MaskedCrossEntropyConfig, "eager"): _masked,
    (FusedLinearCEConfig, "eager"): _fused,
    (TEParallelCEConfig, "eager"): _parallel,
    (KDLossConfig, "eager"): _distillation,
    (MaskedCrossEntropyConfig, "compile"): _masked,
    (TEParallelCEConfig, "compile"): _parallel,
    (KDLossConfig, "compile"): _distillation,
    (MaskedCrossEntropyConfig, "triton"): _masked,
    (FusedLinearCEConfig, "triton"): _fused,
    (TEParallelCEConfig, "triton"): _parallel,
    (KDLossConfig, "triton"): _distillation,
    (MaskedCrossEntropyConfig, "te"): _masked,
    (TEParallelCEConfig, "te"): _parallel,
}


# The modules' names, by which `auto` knows the losses.
_LOSSES: dict[type[LossConfig], str] = {
    MaskedCrossEntropyConfig: "MaskedCrossEntropy",
    FusedLinearCEConfig: "FusedLinearCrossEntropy",
    TEParallelCEConfig: "TEParallelCrossEntropy",
    KDLossConfig: "KDLoss",
}


def builders() -> Mapping[tuple[type[LossConfig], str], Callable[[Any], Any]]:
    """The table (config class, kernel) -> builder."""
    return _BUILDERS


def kernel_status(kernel: str) -> FlagStatus:
    """Whether a kernel can be used here, and why not."""
    if kernel == "te":
        return te.status()
    if kernel == "compile":
        return compiled.status()
    flag, version = f"torch:{kernel}", f"torch {torch.__version__}"
    if kernel == "triton":
        return _triton_status(flag)
    if any(name == kernel for _, name in _BUILDERS):
        return FlagStatus(flag, True, "", version, "")
    return FlagStatus(flag, False, f"'{flag}' has no kernels in this version of loss-core: use 'torch:eager'.", "", "")


def _triton_status(flag: str) -> FlagStatus:
    """`torch:triton` needs Triton, and a GPU or Triton's interpreter."""
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        install = install_line("triton")
        return FlagStatus(flag, False, f"'{flag}' needs triton ({error}): {install}", "", install)
    version = f"triton {triton.__version__}"
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return FlagStatus(flag, True, "", version, "")
    reason = (
        f"'{flag}' needs an NVIDIA or AMD GPU, and torch sees none here: use 'torch:eager'. With TRITON_INTERPRET=1 "
        "in the environment it runs on the CPU, slowly, for tests."
    )
    return FlagStatus(flag, False, reason, version, "")


def choose_kernel(config: LossConfig, candidates: tuple[str, ...]) -> KernelChoice:
    """What `auto` takes until it sees a tensor; see `loss_core_torch.auto`."""
    loss = next(name for cls, name in _LOSSES.items() if isinstance(config, cls))
    return auto.by_rule(loss, "cuda" if torch.cuda.is_available() else "cpu", candidates)
