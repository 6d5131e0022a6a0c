"""Sets of kernels by name. A set is a module with the functions that `eager` has."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch

from loss_core_torch import eager

# Kernel of the flag -> module; imported when a loss is built with it. `te` is no such set: it has the loss whole.
_MODULES = {
    "eager": "loss_core_torch.eager",
    "compile": "loss_core_torch.compile_set",
    "triton": "loss_core_torch.triton_set",
    "te": "loss_core_torch.te",
}

# A plain dict of what is imported: torch.compile can look into it, not into an import.
_LOADED: dict[str, ModuleType] = {"eager": eager}


def load(name: str) -> str:
    """Import a set of kernels, so that `find` has it; returns the name."""
    if name not in _LOADED:
        _LOADED[name] = import_module(_MODULES[name])
    return name


def find(name: str) -> ModuleType:
    """The module that holds a set of kernels that was loaded."""
    return _LOADED[name]


def has_one_pass(name: str, loss: str, device: torch.device) -> bool:
    """Whether a set makes loss and gradient together on a device, by more functions.

    Args:
        loss: "cross_entropy" or "distillation"; the functions are `<loss>_with_grad` and `<loss>_scale_grad`, and
            `cross_entropy_rows`.
    """
    kernels = _LOADED[name]
    return hasattr(kernels, f"{loss}_with_grad") and bool(kernels.one_pass(device))
