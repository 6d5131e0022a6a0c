"""The torch backend, as declared by `loss_core.dispatch.protocol.Backend`: builders of losses and status of kernels."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

import loss_core_torch
from loss_core.dispatch.flags import AUTO, install_line
from loss_core.dispatch.protocol import FlagStatus, KernelChoice
from loss_core.loss_config import LossConfig
from loss_core_torch import auto
from loss_core_torch import kernels as kernel_sets
from loss_core_torch.evaluate import evaluate, host_reads
from loss_core_torch.kernels import te
from loss_core_torch.kernels.compiled import programs
from loss_core_torch.modules.base import LossModule
from loss_core_torch.ranks import evaluate_shards, join_ranks, rank_setup

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


_LOSSES: tuple[type[LossModule], ...] = tuple(getattr(loss_core_torch, name) for name in loss_core_torch.__all__)

_BUILDERS = {(loss.config_class, kernel): loss.from_config for loss in _LOSSES for kernel in loss.kernel_names}


def builders() -> Mapping[tuple[type[LossConfig], str], Callable[[Any], Any]]:
    """The table (config class, kernel) -> builder."""
    return _BUILDERS


def kernel_status(kernel: str) -> FlagStatus:
    """Whether a kernel is usable on this machine, and if not, why."""
    flag = f"torch:{kernel}"
    if kernel == "te":
        return te.KERNELS.status()
    if kernel == "compile":
        return programs.status()
    if kernel == "triton":
        return _triton_status(flag)
    return FlagStatus(flag, True, "", f"torch {torch.__version__}", "")


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
    """The kernel that `auto` names before the first call; see `loss_core_torch.auto`."""
    return auto.by_rule("cuda" if torch.cuda.is_available() else "cpu", candidates)


def batch_invariant(kernel: str, row_bytes: int) -> bool:
    """Whether a kernel guarantees that results of a row of logits do not depend on the other rows, bitwise."""
    return kernel != AUTO and kernel_sets.find(kernel).batch_invariant(row_bytes)
