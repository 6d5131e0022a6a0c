"""Validation of what a loss is called with, and the one reading of labels and mask that all losses share.

Nothing here waits for a device: values are read only when they lie in host memory (NumPy arrays and
concrete jax arrays on the CPU).
"""

# T = tokens (any leading dimensions), V = vocabulary, H = hidden

from __future__ import annotations

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# What a position is: a class in [0, V), or one of these.
IGNORED = -1
INVALID = -2  # outside [0, V) and not ignored: its loss and gradient are NaN
ELSEWHERE = -3  # a class of another shard of the vocabulary

ArrayLike = jax.Array | np.ndarray


def check_arrays(**arrays: Any) -> None:
    """TypeError unless every given value is a jax or NumPy array; None passes."""
    for name, value in arrays.items():
        if value is not None and not isinstance(value, jax.Array | np.ndarray | np.generic):
            raise TypeError(
                f"{name} must be a jax or NumPy array, got {type(value).__module__}.{type(value).__name__}; "
                f"convert it first, such as jnp.asarray({name})."
            )


def check_floating(**arrays: Any) -> None:
    """TypeError unless every array is floating."""
    for name, value in arrays.items():
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"{name} must be a floating array, got dtype {value.dtype}.")


def check_logits(name: str, logits: ArrayLike) -> None:
    """Logits must be `[..., V]` floating with V >= 1."""
    check_floating(**{name: logits})
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{name} has shape {logits.shape}; it must be [..., V] with a vocabulary V >= 1.")


def check_labels(name: str, scores: ArrayLike, labels: ArrayLike) -> None:
    """Labels must be integers whose shape is that of `scores` (the array called `name`) without its last axis.

    Raises:
        TypeError: floating or boolean labels.
        ValueError: shapes that do not match; names both.
    """
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers of any width, got dtype {labels.dtype}.")
    if labels.shape != scores.shape[:-1]:
        raise ValueError(
            f"labels has shape {labels.shape} but {name} has shape {scores.shape}, leading shape "
            f"{scores.shape[:-1]}; {name}.shape[:-1] == labels.shape must hold."
        )


def check_linear(hidden_states: ArrayLike, labels: ArrayLike, lm_weight: ArrayLike) -> None:
    """Hidden states `[..., H]` and weight `[V, H]` of one floating dtype, and labels that fit.

    Raises:
        TypeError: dtypes that differ or are not floating.
        ValueError: shapes that do not match; names both.
    """
    check_floating(hidden_states=hidden_states, lm_weight=lm_weight)
    if lm_weight.ndim != 2 or lm_weight.shape[0] == 0:
        raise ValueError(f"lm_weight has shape {lm_weight.shape}; it must be [V, H] with a vocabulary V >= 1.")
    if hidden_states.ndim == 0 or hidden_states.shape[-1] != lm_weight.shape[1]:
        raise ValueError(
            f"hidden_states has shape {hidden_states.shape} but lm_weight has shape {lm_weight.shape}; "
            "hidden_states.shape[-1] == lm_weight.shape[1] must hold."
        )
    if hidden_states.dtype != lm_weight.dtype:
        raise TypeError(
            f"hidden_states has dtype {hidden_states.dtype} but lm_weight has dtype {lm_weight.dtype}; they must "
            "match: cast one of them, such as lm_weight.astype(hidden_states.dtype)."
        )
    check_labels("hidden_states", hidden_states, labels)


def check_pair(student_logits: ArrayLike, teacher_logits: ArrayLike, labels: ArrayLike) -> None:
    """Two logits of one shape `[..., V]`, and labels that fit."""
    check_logits("student_logits", student_logits)
    check_logits("teacher_logits", teacher_logits)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits has shape {student_logits.shape} but teacher_logits has shape {teacher_logits.shape}; "
            "they must match."
        )
    check_labels("student_logits", student_logits, labels)


def check_mask(labels: ArrayLike, mask: ArrayLike | None) -> None:
    """A mask is bool, integer or float, and broadcasts to the shape of labels."""
    if mask is None:
        return
    if jnp.issubdtype(mask.dtype, jnp.complexfloating):
        raise TypeError(f"mask must be bool, integer or float, got dtype {mask.dtype}.")
    try:
        fits = np.broadcast_shapes(mask.shape, labels.shape) == labels.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"mask has shape {mask.shape} but labels has shape {labels.shape}; mask.shape == labels.shape "
            "must hold, or mask must broadcast to it."
        )


def check_reduction_arguments(
    reduction: str, labels: ArrayLike, num_label_tokens: Any, loss_weights: ArrayLike | None
) -> None:
    """`num_label_tokens` and `loss_weights` go with reduction "sum" only; their shapes are fixed."""
    for name, value in (("num_label_tokens", num_label_tokens), ("loss_weights", loss_weights)):
        if value is not None and reduction != "sum":
            raise ValueError(f"{name} is only supported when reduction is 'sum', got reduction {reduction!r}.")
    check_count("num_label_tokens", num_label_tokens)
    if loss_weights is None:
        return
    if jnp.issubdtype(loss_weights.dtype, jnp.complexfloating):
        raise TypeError(f"loss_weights must be real, got dtype {loss_weights.dtype}.")
    if loss_weights.shape != labels.shape:
        raise ValueError(
            f"loss_weights has shape {loss_weights.shape} but labels has shape {labels.shape}; they must match."
        )


def check_count(name: str, value: Any) -> None:
    """A count is None, a number >= 0 or a 0-d array."""
    if value is None:
        return
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        if math.isnan(value) or value < 0:
            raise ValueError(f"{name} must be >= 0, got {value!r}.")
    elif not isinstance(value, jax.Array | np.ndarray):
        raise TypeError(f"{name} must be an integer or a 0-d array, got {value!r}.")
    elif value.shape != ():
        raise ValueError(f"{name} has shape {value.shape}; it must be an integer or a 0-d array, shape ().")


def as_jax(array: ArrayLike) -> jax.Array:
    """The array for JAX; one that is JAX's already is not touched."""
    # Under jax.grad, jnp.asarray copies: for a weight of [V, H] that is a copy of it.
    return array if isinstance(array, jax.Array) else jnp.asarray(array)


def as_count(value: Any) -> Any:
    """A count as an array, so that its value is traced and a new one compiles nothing."""
    # As a float: a Python integer beyond 2**31 does not fit JAX's default integer.
    return np.float64(value) if isinstance(value, numbers.Real) else value


def read_labels(labels: ArrayLike, mask: ArrayLike | None, ignore_index: int, vocab: int) -> tuple[ArrayLike, int]:
    """Check the values of labels where that costs no device sync.

    Returns:
        labels that JAX can take without cutting them to 32 bits, and the ignore_index that belongs to them.
    Raises:
        ValueError: a label outside [0, V) that is not ignored; names position and value.
    """
    if not isinstance(labels, jax.Array) or in_host_memory(labels):
        host_labels = np.asarray(labels)
    else:
        return labels, ignore_index
    if mask is None or not isinstance(mask, jax.Array) or in_host_memory(mask):
        host_mask = None if mask is None else np.asarray(mask)
        invalid = np.asarray(classify(np, host_labels, host_mask, ignore_index, vocab) == INVALID)
        if invalid.any():
            position = tuple(int(i) for i in np.argwhere(invalid)[0])
            raise ValueError(
                f"labels{list(position) if position else ''} is {int(host_labels[position])}, outside [0, {vocab}) "
                f"and not ignore_index ({ignore_index}); {int(invalid.sum())} such label(s). Use ignore_index or a "
                "mask for positions to leave out."
            )
    if isinstance(labels, jax.Array):
        return labels, ignore_index
    return classify(np, host_labels, None, ignore_index, vocab), IGNORED


def in_host_memory(array: jax.Array) -> bool:
    """Whether the array has values that the CPU can read without waiting for a device."""
    if isinstance(array, jax.core.Tracer) or not array.is_fully_addressable:
        return False
    return all(device.platform == "cpu" for device in array.devices())


def classify(xp: Any, labels: Any, mask: Any, ignore_index: int, vocab: int) -> Any:
    """Class, IGNORED or INVALID per position, int32, for labels of any integer dtype.

    Args:
        xp: numpy or jax.numpy.
    """
    # Each constant is compared only where the labels' own dtype can hold it: -100 cast to uint8 is a class.
    info: Any = jnp.iinfo(labels.dtype)
    in_range = labels >= 0
    if vocab <= int(info.max):
        in_range = in_range & (labels < vocab)
    target = xp.where(in_range, labels.astype(np.int32), np.int32(INVALID))
    if int(info.min) <= ignore_index <= int(info.max):
        target = xp.where(labels == ignore_index, np.int32(IGNORED), target)
    if mask is not None:
        target = xp.where(mask != 0, target, np.int32(IGNORED))
    return target
