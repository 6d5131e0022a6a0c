"""Validation of the arguments of all losses, and their common preprocessing of labels and mask.

Nothing here waits for a device: values are read only in host memory (NumPy arrays, and JAX arrays on the CPU that are
not traced).
"""

# T = tokens (any leading dimensions), V = vocabulary, H = hidden

from __future__ import annotations

import functools
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loss_core_jax import compat

# A target is a class in [0, V) or one of these.
IGNORED = -1
INVALID = -2  # outside [0, V) and not ignored: its loss and gradient are NaN
ELSEWHERE = -3  # a class of another shard of the vocabulary

ArrayLike = jax.Array | np.ndarray

_HALF = ("bfloat16", "float16")


def check_arrays(**arrays: Any) -> None:
    """TypeError unless every value is a JAX or NumPy array or None."""
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


def check_logits(name: str, logits: ArrayLike, labels: ArrayLike) -> None:
    """Check that logits are `[..., V]` floating with V >= 1, and labels as `check_labels` does."""
    check_floating(**{name: logits})
    if logits.ndim == 0:
        raise ValueError(f"{name} has shape (); it must be [..., V].")
    if logits.shape[-1] == 0:
        raise ValueError(f"{name} has shape {logits.shape}: the vocabulary (last dimension) must not be empty.")
    check_labels(name, logits, labels)


def check_labels(name: str, scores: ArrayLike, labels: ArrayLike) -> None:
    """Check that labels are integers of shape `scores.shape[:-1]`, where `name` is the argument name of `scores`.

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


def check_linear(hidden_states: ArrayLike, labels: ArrayLike, lm_weight: ArrayLike, prefix: str = "") -> None:
    """Check hidden states `[..., H]`, weight `[V, H]` and labels `[...]`.

    Args:
        prefix: of the argument names of hidden states and weight, such as "student_".
    Raises:
        TypeError: dtypes that are not floating, or that differ and are not 16 bits beside a float32 weight.
        ValueError: shapes that do not match or are empty; names both.
    """
    check_floating(**{f"{prefix}hidden_states": hidden_states, f"{prefix}lm_weight": lm_weight})
    if lm_weight.ndim != 2:
        raise ValueError(f"{prefix}lm_weight has shape {lm_weight.shape}; it must be [V, H].")
    if hidden_states.ndim == 0 or hidden_states.shape[-1] != lm_weight.shape[1]:
        raise ValueError(
            f"{prefix}hidden_states has shape {hidden_states.shape} but {prefix}lm_weight has shape {lm_weight.shape}; "
            f"{prefix}hidden_states.shape[-1] == {prefix}lm_weight.shape[1] must hold."
        )
    if hidden_states.shape[-1] == 0:
        raise ValueError(
            f"{prefix}hidden_states has shape {hidden_states.shape}: the hidden dimension must not be empty."
        )
    if lm_weight.shape[0] == 0:
        raise ValueError(
            f"{prefix}lm_weight has shape {lm_weight.shape}: the vocabulary (first dimension) must not be empty."
        )
    if hidden_states.dtype != lm_weight.dtype and not _is_master_weight(hidden_states, lm_weight):
        raise TypeError(
            f"{prefix}hidden_states has dtype {hidden_states.dtype} but {prefix}lm_weight has dtype {lm_weight.dtype}; "
            "they must match, or be bfloat16 or float16 beside a float32 weight: cast one of them, such as "
            f"{prefix}lm_weight.astype({prefix}hidden_states.dtype)."
        )
    check_labels(f"{prefix}hidden_states", hidden_states, labels)


def check_bias(lm_weight: ArrayLike, lm_bias: ArrayLike | None) -> None:
    """Check that a bias is floating `[V]` for a weight `[V, H]`, or None."""
    if lm_bias is None:
        return
    check_arrays(lm_bias=lm_bias)
    check_floating(lm_bias=lm_bias)
    if lm_bias.shape != lm_weight.shape[:1]:
        raise ValueError(
            f"lm_bias has shape {lm_bias.shape} but lm_weight has shape {lm_weight.shape}; it must be [V] with "
            f"V = {lm_weight.shape[0]}."
        )


def _is_master_weight(hidden_states: ArrayLike, lm_weight: ArrayLike) -> bool:
    return str(hidden_states.dtype) in _HALF and lm_weight.dtype == jnp.float32


def check_pair(student_logits: ArrayLike, teacher_logits: ArrayLike, labels: ArrayLike) -> None:
    """Check two logits of the same shape `[..., V]`, and labels."""
    check_floating(teacher_logits=teacher_logits)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits has shape {student_logits.shape} but teacher_logits has shape {teacher_logits.shape}; "
            "they must match."
        )
    check_logits("student_logits", student_logits, labels)


def check_weights_have_count(loss_weights: Any, num_batch_labels: Any) -> None:
    """ValueError for weights of a distillation without the count that divides the weighted sum."""
    if loss_weights is not None and num_batch_labels is None:
        raise ValueError(
            "loss_weights is only supported with num_batch_labels, without which the loss is a mean over the "
            "valid tokens; pass the number by which the weighted sum is to be divided."
        )


def check_mask(labels: ArrayLike, mask: ArrayLike | None) -> None:
    """Check that a mask is bool, integer or float and broadcasts to the shape of labels."""
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
    """Check that `num_label_tokens` and `loss_weights` come with reduction "sum", and the weights' dtype and shape."""
    for name, value in (("num_label_tokens", num_label_tokens), ("loss_weights", loss_weights)):
        if value is not None and reduction != "sum":
            raise ValueError(f"{name} is only supported when reduction is 'sum', got reduction {reduction!r}.")
    if loss_weights is None:
        return
    if jnp.issubdtype(loss_weights.dtype, jnp.complexfloating):
        raise TypeError(f"loss_weights must be real, got dtype {loss_weights.dtype}.")
    if loss_weights.shape != labels.shape:
        raise ValueError(
            f"loss_weights has shape {loss_weights.shape} but labels has shape {labels.shape}; they must match."
        )


def read_count(name: str, count: Any) -> Any:
    """A count as a 0-d array, so that another value needs no compilation; None stays None.

    Raises:
        TypeError: neither a real number nor an array.
        ValueError: an array that is not 0-d; a readable value that is negative or NaN.
    """
    if count is None:
        return None
    if not isinstance(count, jax.Array | np.ndarray) and (
        not isinstance(count, numbers.Real) or isinstance(count, bool)
    ):
        raise TypeError(f"{name} must be a number or a 0-d array, got {count!r}.")
    # As a float: a Python integer above 2**31 does not fit JAX's default integer.
    array: ArrayLike = np.asarray(float(count)) if isinstance(count, numbers.Real) else count
    if array.shape != ():
        raise ValueError(f"{name} has shape {array.shape}; it must be a number or a 0-d array, shape ().")
    if in_host_memory(array) and not float(array) >= 0:
        raise ValueError(f"{name} must be >= 0, got {float(array):g}.")
    return array


def read_batch_count(labels: ArrayLike, num_batch_labels: Any, loss_weights: ArrayLike | None) -> Any:
    """The count of a distillation as `read_count` returns it, after a check of its weights."""
    check_weights_have_count(loss_weights, num_batch_labels)
    check_reduction_arguments("sum", labels, None, loss_weights)
    return read_count("num_batch_labels", num_batch_labels)


def read_labels(labels: ArrayLike, mask: ArrayLike | None, ignore_index: int, vocab: int | None) -> ArrayLike:
    """Target of each position, as `classify` returns it; labels in host memory are checked.

    Returns:
        A NumPy array where labels and mask are NumPy arrays, so that it is readable under jit, too.
    Raises:
        ValueError: a label outside [0, vocab) that is not ignored; names position and value.
    """
    if in_host_memory(labels) and (mask is None or in_host_memory(mask)):
        host_labels = np.asarray(labels)
        invalid = classify(np, host_labels, None if mask is None else np.asarray(mask), ignore_index, vocab) == INVALID
        if invalid.any():
            position = tuple(int(i) for i in np.argwhere(invalid)[0])
            raise ValueError(
                f"labels{list(position) if position else ''} is {int(host_labels[position])}, outside [0, {vocab}) "
                f"and not ignore_index ({ignore_index}); {int(invalid.sum())} such label(s). Use ignore_index or a "
                "mask for positions to leave out."
            )
    if not isinstance(labels, jax.Array):
        # Not in JAX, which would truncate 64-bit labels to 32 bits.
        if not isinstance(mask, jax.Array):
            numpy_target: np.ndarray = classify(np, labels, mask, ignore_index, vocab)
            return numpy_target
        # The targets go through `_classify` once more as labels, with the mask.
        labels, ignore_index = classify(np, labels, None, ignore_index, vocab), IGNORED
    target: jax.Array = _classify(labels, mask, ignore_index, vocab)
    return target


def classify(xp: Any, labels: Any, mask: Any, ignore_index: int, vocab: int | None) -> Any:
    """Class, IGNORED or INVALID per position, int32, for labels of any integer dtype.

    Args:
        xp: numpy or jax.numpy.
        vocab: number of classes; None: any label that is not ignored becomes class 0.
    """
    # Each constant is compared only if the labels' dtype can hold it: -100 cast to uint8 is a class.
    info: Any = jnp.iinfo(labels.dtype)
    if vocab is None:
        target = xp.zeros(labels.shape, np.int32)
    else:
        in_range = labels >= 0
        if vocab <= int(info.max):
            in_range = in_range & (labels < vocab)
        target = xp.where(in_range, labels.astype(np.int32), np.int32(INVALID))
    if int(info.min) <= ignore_index <= int(info.max):
        target = xp.where(labels == ignore_index, np.int32(IGNORED), target)
    if mask is not None:
        target = xp.where(xp.broadcast_to(mask, labels.shape) != 0, target, np.int32(IGNORED))
    return target


_classify = jax.jit(functools.partial(classify, jnp), static_argnums=(2, 3))


def local_columns(columns: jax.Array, start: Any, stop: Any, offset: Any) -> jax.Array:
    """`columns - offset`, but ELSEWHERE outside [start, stop); negative columns are unchanged."""
    owned = (columns >= start) & (columns < stop)
    return jnp.where(columns < 0, columns, jnp.where(owned, columns - offset, ELSEWHERE))


def in_host_memory(array: ArrayLike) -> bool:
    """Whether the array's values can be read on the host without waiting for a device."""
    if not isinstance(array, jax.Array):
        return True
    if compat.is_tracer(array) or not array.is_fully_addressable:
        return False
    return all(device.platform == "cpu" for device in array.devices())


def as_jax(array: ArrayLike) -> jax.Array:
    """The array as a jax.Array; a jax.Array is returned as it is."""
    # Under jax.grad, jnp.asarray would copy it, even a weight [V, H].
    return array if isinstance(array, jax.Array) else jnp.asarray(array)


def arithmetic_dtype(*arrays: jax.Array) -> Any:
    """float64 if any array is float64, else float32."""
    return jnp.dtype("float64" if any(a.dtype == jnp.float64 for a in arrays) else "float32")
