"""The temperature of the losses over one distribution: a number, or one for each token."""

from __future__ import annotations

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loss_core_jax.inputs import ArrayLike, as_jax, in_host_memory

# Below it, differences of logits times 1 / temperature would overflow; at it the distribution is already the limit.
_MIN_TEMPERATURE = 2.0**-63


def inverse_temperature(value: Any, default: float, labels: ArrayLike, dtype: Any) -> jax.Array | None:
    """1 / temperature of each position, shape of labels; None where it is 1 for all.

    Args:
        value: a number, or a floating array, 0-d or of the shape of labels; None for the default.
    Raises:
        TypeError: neither a number nor a floating array.
        ValueError: another shape, or a readable value that is not > 0 (a value that is not readable gives NaN).
    """
    value = default if value is None else value
    if not isinstance(value, jax.Array | np.ndarray):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"temperature must be a number or a floating array, got {type(value).__name__}.")
        if value == 1:
            return None
        value = np.asarray(float(value))
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"temperature must be a number or a floating array, got dtype {value.dtype}.")
    if value.shape not in ((), labels.shape):
        raise ValueError(
            f"temperature has shape {value.shape} but labels has shape {labels.shape}; it must have that shape or be "
            "one number."
        )
    if in_host_memory(value) and not (np.asarray(value, np.float64) > 0).all():
        bad = np.asarray(value, np.float64)
        raise ValueError(f"temperature must be > 0, got {bad[~(bad > 0)].flat[0]:g}.")
    temperature = jnp.broadcast_to(as_jax(value).astype(dtype), labels.shape)
    return jnp.where(temperature > 0, 1 / jnp.maximum(temperature, _MIN_TEMPERATURE), jnp.nan)
