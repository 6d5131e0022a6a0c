"""Sets of kernels by name. A set is a module with the functions that `eager` has."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from loss_core_torch import eager

# Kernel of the flag -> module; imported when a loss is built with it. `te` is no such set: it has the loss whole.
_MODULES = {
    "eager": "loss_core_torch.eager",
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


def has_one_pass(name: str) -> bool:
    """Whether a set also has `cross_entropy_with_grad`, `cross_entropy_rows` and `cross_entropy_scale_grad`."""
    return hasattr(_LOADED[name], "cross_entropy_with_grad")
