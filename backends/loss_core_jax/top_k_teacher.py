"""What is accepted of a teacher of which K log-probabilities per token are known."""

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

# A log-probability is z - lse, each rounded: for logits up to 2^10 in float32 it is off by 2^-24 * 2^11.
_OFF = 2.0**-13


class Teacher(NamedTuple):
    """A teacher that has been checked.

    Attributes:
        classes: [..., K] int32, negative where an index is no class.
        log_p: [..., K] in the dtype of the arithmetic, 0 in ignored positions.
    """

    classes: jax.Array
    log_p: jax.Array


def check_teacher(labels: ArrayLike, indices: ArrayLike, logprobs: ArrayLike, vocab: int) -> None:
    """Integer indices and floating log-probabilities `[..., K]`, with the shape of labels in front.

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
    """The teacher, and the target of each position: INVALID where the teacher is no distribution.

    Args:
        target: of `read_labels`.
        vocab: number of classes, of all devices.
    Raises:
        ValueError: where values can be read, at a position that is not ignored: an index that is no class, or stands
            twice; a log-probability that is NaN or above 0, or a sum of probabilities above 1 by more than rounding.
    """
    if in_host_memory(target):
        _refuse(indices, logprobs, np.asarray(target) != IGNORED, vocab)
    classes, log_p = inputs.as_jax(_classes(indices, vocab)), inputs.as_jax(logprobs)
    target = inputs.as_jax(target)
    bad = [wrong.any(-1) for _, wrong in (*_of_indices(jnp, classes), *_of_logprobs(jnp, log_p))]
    # One by one: JAX stacks no rows whose explicit shardings differ.
    target = jnp.where((target != IGNORED) & functools.reduce(jnp.logical_or, bad), INVALID, target)
    ignored = (target == IGNORED)[..., None]
    # What an ignored position holds reaches nothing; its classes are any that differ.
    classes = jnp.where(ignored, jnp.arange(classes.shape[-1], dtype=classes.dtype), classes)
    return Teacher(classes, jnp.where(ignored, 0, log_p.astype(dtype))), target


def _refuse(indices: ArrayLike, logprobs: ArrayLike, valid: np.ndarray, vocab: int) -> None:
    """Raise for what can be read and is wrong."""
    faults = []
    if in_host_memory(indices):
        faults += _of_indices(np, _classes(np.asarray(indices), vocab))
    if in_host_memory(logprobs):
        # bfloat16 is no dtype of NumPy's own.
        faults += _of_logprobs(np, np.asarray(logprobs))
    for what, wrong in faults:
        wrong = np.broadcast_to(wrong, indices.shape) & valid[..., None]
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise ValueError(_message(what, at, indices, logprobs, vocab))


def _classes(indices: ArrayLike, vocab: int) -> Any:
    """Indices as int32, -1 for what is no class; NumPy's stay NumPy's, for JAX would cut 64 bits to 32."""
    xp: Any = jnp if isinstance(indices, jax.Array) else np
    inside = indices >= 0
    # A constant is compared only where the dtype can hold it.
    if vocab <= int(jnp.iinfo(indices.dtype).max):
        inside = inside & (indices < vocab)
    return xp.where(inside, indices.astype(np.int32), np.int32(-1))


def _of_indices(xp: Any, classes: Any) -> list[tuple[str, Any]]:
    """What may be wrong with indices, and where it is."""
    in_order = xp.sort(classes, axis=-1)
    repeated = (in_order[..., 1:] == in_order[..., :-1]).any(-1, keepdims=True)
    return [("outside", classes < 0), ("twice", repeated)]


def _of_logprobs(xp: Any, logprobs: Any) -> list[tuple[str, Any]]:
    """What may be wrong with log-probabilities, and where it is."""
    wide = logprobs.astype(np.float64 if xp is np else inputs.arithmetic_dtype(logprobs))
    p = xp.exp(wide)
    # Each was rounded to its dtype as well.
    sizes = xp.where(p == 0, 0, p * xp.abs(xp.where(p == 0, 0, wide)))
    most = 1 + _OFF + float(jnp.finfo(logprobs.dtype).eps) * sizes.sum(-1, keepdims=True)
    return [("above 0", ~(wide <= 0)), ("sum", p.sum(-1, keepdims=True) > most)]


def _message(what: str, at: tuple[int, ...], indices: Any, logprobs: Any, vocab: int) -> str:
    lead = list(at[:-1])
    if what == "outside":
        return f"teacher_indices{list(at)} is {int(indices[at])}, which is no class in [0, {vocab})."
    if what == "twice":
        row = sorted(int(i) for i in np.asarray(indices)[at[:-1]])
        twice = next(a for a, b in itertools.pairwise(row) if a == b)
        return f"teacher_indices{lead} holds {twice} twice; the indices of a token must differ."
    if what == "above 0":
        found = float(logprobs[at])
        return f"teacher_logprobs{list(at)} is {found:g}; logarithms of probabilities are accepted, which are <= 0."
    total = float(np.exp(np.asarray(logprobs[at[:-1]]).astype(np.float64)).sum())
    return (
        f"The probabilities in teacher_logprobs{lead} sum to {total:g}, which is more than 1 by more than rounding: "
        "pass log-probabilities over the whole vocabulary, not logits."
    )
