"""Validation of a teacher given as K log-probabilities per token."""

# T = tokens (any leading dimensions), K = classes of the teacher, V = vocabulary

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from loss_core_jax import inputs
from loss_core_jax.inputs import IGNORED, INVALID, ArrayLike, in_host_memory

# A log-probability is z - lse, each rounded: for logits up to 2^10 in float32 the error is 2^-24 * 2^11.
_LOG_P_ERROR = 2.0**-13


class Teacher(NamedTuple):
    """A checked teacher.

    Attributes:
        classes: [..., K] int32, negative where an index is not a class.
        log_p: [..., K] in the dtype of the arithmetic, 0 in ignored positions.
    """

    classes: jax.Array
    log_p: jax.Array


def check_teacher(labels: ArrayLike, indices: ArrayLike, logprobs: ArrayLike, vocab: int) -> None:
    """Check dtypes and shapes: integer indices and floating log-probabilities `[*labels.shape, K]`.

    Raises:
        TypeError: other dtypes.
        ValueError: shapes that do not match, or K outside [1, vocab].
    """
    inputs.check_arrays(teacher_indices=indices, teacher_logprobs=logprobs)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"teacher_indices must be integers of any width, got dtype {indices.dtype}.")
    inputs.check_floating(teacher_logprobs=logprobs)
    for name, value in (("teacher_indices", indices), ("teacher_logprobs", logprobs)):
        if value.ndim == 0 or value.shape[:-1] != labels.shape:
            raise ValueError(
                f"{name} has shape {value.shape} but labels has shape {labels.shape}; {name} must be [..., K] with "
                "that shape in front."
            )
    if indices.shape != logprobs.shape:
        raise ValueError(
            f"teacher_indices has shape {indices.shape} but teacher_logprobs has shape {logprobs.shape}; they must "
            "match."
        )
    if not 1 <= indices.shape[-1] <= vocab:
        raise ValueError(
            f"teacher_indices has {indices.shape[-1]} classes per token, but there are {vocab}; K must be in [1, V]."
        )


def read_teacher(
    indices: ArrayLike, logprobs: ArrayLike, target: ArrayLike, vocab: int, dtype: Any
) -> tuple[Teacher, jax.Array]:
    """The teacher, and the target of each position: INVALID where the teacher is not a distribution.

    Args:
        target: as `read_labels` returns it.
        vocab: number of classes, of all devices.
    Raises:
        ValueError: where values are readable, at a position that is not ignored: an index that is not a class or
            occurs twice; a log-probability that is NaN or above 0, or a sum of probabilities above 1 by more than
            rounding.
    """
    if in_host_memory(target):
        _check_readable(indices, logprobs, np.asarray(target) != IGNORED, vocab)
    classes, log_p = inputs.as_jax(_classes(indices, vocab)), inputs.as_jax(logprobs)
    target = inputs.as_jax(target)
    bad = [wrong.any(-1) for _, wrong in (*_index_faults(jnp, classes), *_logprob_faults(jnp, log_p))]
    # A reduce, not a stack: JAX can't stack arrays whose explicit shardings differ.
    target = jnp.where((target != IGNORED) & functools.reduce(jnp.logical_or, bad), INVALID, target)
    ignored = (target == IGNORED)[..., None]
    # An ignored position may hold anything: it gets distinct classes, and log_p = 0.
    classes = jnp.where(ignored, jnp.arange(classes.shape[-1], dtype=classes.dtype), classes)
    return Teacher(classes, jnp.where(ignored, 0, log_p.astype(dtype))), target


def _check_readable(indices: ArrayLike, logprobs: ArrayLike, valid: np.ndarray, vocab: int) -> None:
    """ValueError for the first fault in arrays that are in host memory."""
    faults = []
    if in_host_memory(indices):
        faults += _index_faults(np, _classes(np.asarray(indices), vocab))
    if in_host_memory(logprobs):
        faults += _logprob_faults(np, np.asarray(logprobs))
    for fault, wrong in faults:
        wrong = np.broadcast_to(wrong, indices.shape) & valid[..., None]
        if wrong.any():
            position = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise ValueError(_message(fault, position, indices, logprobs, vocab))


def _classes(indices: ArrayLike, vocab: int) -> Any:
    """Indices as int32, -1 where they are not a class; NumPy arrays stay NumPy: JAX would truncate 64 bits to 32."""
    xp: Any = jnp if isinstance(indices, jax.Array) else np
    inside = indices >= 0
    # The comparison is valid only if the dtype of the indices can hold `vocab`.
    if vocab <= int(jnp.iinfo(indices.dtype).max):
        inside = inside & (indices < vocab)
    return xp.where(inside, indices.astype(np.int32), np.int32(-1))


def _index_faults(xp: Any, classes: Any) -> list[tuple[str, Any]]:
    """Possible faults of indices, each with a bool array of where it occurs, [..., K] or [..., 1]."""
    in_order = xp.sort(classes, axis=-1)
    repeated = (in_order[..., 1:] == in_order[..., :-1]).any(-1, keepdims=True)
    return [("outside", classes < 0), ("twice", repeated)]


def _logprob_faults(xp: Any, logprobs: Any) -> list[tuple[str, Any]]:
    """Possible faults of log-probabilities; as `_index_faults`."""
    log_p = logprobs.astype(np.float64 if xp is np else inputs.arithmetic_dtype(logprobs))
    p = xp.exp(log_p)
    # Each log-probability has also been rounded to its dtype.
    sizes = xp.where(p == 0, 0, p * xp.abs(xp.where(p == 0, 0, log_p)))
    max_sum = 1 + _LOG_P_ERROR + float(jnp.finfo(logprobs.dtype).eps) * sizes.sum(-1, keepdims=True)
    return [("above 0", ~(log_p <= 0)), ("sum", p.sum(-1, keepdims=True) > max_sum)]


def _message(fault: str, position: tuple[int, ...], indices: Any, logprobs: Any, vocab: int) -> str:
    lead = list(position[:-1])
    if fault == "outside":
        return f"teacher_indices{list(position)} is {int(indices[position])}, which is no class in [0, {vocab})."
    if fault == "twice":
        row = sorted(int(i) for i in np.asarray(indices)[position[:-1]])
        repeated = next(a for a, b in itertools.pairwise(row) if a == b)
        return f"teacher_indices{lead} holds {repeated} twice; the indices of a token must differ."
    if fault == "above 0":
        name, value = f"teacher_logprobs{list(position)}", float(logprobs[position])
        return f"{name} is {value:g}; logarithms of probabilities are accepted, which are <= 0."
    total = float(np.exp(np.asarray(logprobs[position[:-1]]).astype(np.float64)).sum())
    return (
        f"The probabilities in teacher_logprobs{lead} sum to {total:g}, which is more than 1 by more than rounding: "
        "pass log-probabilities over the whole vocabulary, not logits."
    )
