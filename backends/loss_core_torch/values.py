"""Two questions that every kernel asks about a tensor: how to compute with it, and whether its values may be read."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the arithmetic inside: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def may_read(x: Tensor) -> bool:
    """Whether the program may depend on values: on a CPU, outside of a trace; elsewhere that would be a host sync."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
