"""The temperature of the losses over one distribution: a number, or one for each token."""

# T = tokens (all leading dimensions of labels, flattened)

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from loss_core_torch import inputs
from loss_core_torch.tracing import is_readable

# Below it, differences of logits times 1 / temperature would overflow; at it, the result is the limit already.
_MIN_TEMPERATURE = 2.0**-63


def inverse_temperature(value: Any, default: float, labels_T: Tensor, shape: torch.Size, dtype: torch.dtype) -> Any:
    """1 / temperature of each token [T] in the dtype of the arithmetic; None where it is 1 for all.

    Args:
        value: a number, or a floating tensor of one number or of the shape of labels; None for the default.
    Raises:
        ValueError: another shape, a tensor that requires a gradient; a temperature that is not > 0, where it is
            readable (elsewhere the token is NaN).
        TypeError: neither a number nor a floating tensor.
    """
    value = default if value is None else value
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"temperature must be a number or a floating tensor, got {type(value).__name__}.")
        if not float(value) > 0:
            raise ValueError(f"temperature must be > 0, got {value}.")
        if value == 1:
            return None
        return torch.full_like(labels_T, 1.0 / max(float(value), _MIN_TEMPERATURE), dtype=dtype)
    value = inputs.tensor("temperature", value)
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError("temperature requires a gradient, and it has none here: pass temperature.detach().")
    if not value.dtype.is_floating_point:
        raise TypeError(f"temperature must be a number or a floating tensor, got {value.dtype}.")
    if value.dim() and value.shape != shape:
        raise ValueError(
            f"temperature has shape {tuple(value.shape)} but labels has shape {tuple(shape)}; it must have that shape "
            "or be one number."
        )
    value_T = value.to(device=labels_T.device, dtype=dtype).broadcast_to(shape).reshape(-1)
    if is_readable(value_T) and not bool((value_T > 0).all()):
        raise ValueError(f"temperature must be > 0, got {float(value_T[~(value_T > 0)][0]):g}.")
    return value_T.clamp(min=_MIN_TEMPERATURE).reciprocal().masked_fill(~(value_T > 0), torch.nan)
