"""Dumps: files with the results of a trainer and an inference engine for the same tokens; writing, reading, validation.

    labels               [...] integers; ignore_index at ignored positions
    trainer_logprobs     [...] log-probability of each label, computed by the trainer
    engine_logprobs      [...] the same, computed by the engine
    hidden_states        [..., H] input of the head; or trainer_hidden_states and engine_hidden_states
    lm_weight            [V, H] the head; lm_bias [V]
    temperature, logit_softcapping, logit_scale, ignore_index: scalars, as the run was configured

The last dimension of labels is the sequence. All but the first three are optional.
"""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, H = hidden

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.array_files import outside_vocab, read_arrays
from loss_core.usage import UsageProblem, closest

Array = NDArray[Any]

SYSTEMS = ("trainer", "engine")
_REQUIRED = ("labels", "trainer_logprobs", "engine_logprobs")
_HIDDEN = ("hidden_states", "trainer_hidden_states", "engine_hidden_states")
# The first three defaults are neutral: a scalar that is not in the file is not applied.
_SCALARS = {"temperature": 1.0, "logit_softcapping": 0.0, "logit_scale": 1.0, "ignore_index": -100.0}
_NAMES = (*_REQUIRED, *_HIDDEN, "lm_weight", "lm_bias", *_SCALARS)


@dataclass(frozen=True)
class Dump:
    """The results of two systems for the same tokens.

    Attributes:
        labels, trainer_logprobs, engine_logprobs: [...], of the same shape.
        trainer_hidden_states, engine_hidden_states: [T, H]; the same array if both share one, None without a head.
        lm_weight: [V, H], or None.
        lm_bias: [V], or None.
        temperature, logit_softcapping, logit_scale: as recorded; 1, 0 and 1 by default.
        ignore_index: label of ignored positions.
    """

    labels: Array
    trainer_logprobs: Array
    engine_logprobs: Array
    trainer_hidden_states: Array | None = None
    engine_hidden_states: Array | None = None
    lm_weight: Array | None = None
    lm_bias: Array | None = None
    temperature: float = 1.0
    logit_softcapping: float = 0.0
    logit_scale: float = 1.0
    ignore_index: int = -100

    @property
    def shares_hidden_states(self) -> bool:
        return self.trainer_hidden_states is self.engine_hidden_states

    def logprobs(self, system: str) -> NDArray[np.float64]:
        """Log-probabilities [T] of "trainer" or "engine", in float64."""
        return np.asarray(getattr(self, f"{system}_logprobs"), np.float64).reshape(-1)

    def hidden_states(self, system: str) -> Array | None:
        """Hidden states [T, H] of "trainer" or "engine"; None without a head."""
        found: Array | None = getattr(self, f"{system}_hidden_states")
        return found


def write_dump(path: str | os.PathLike[str], **arrays: Any) -> None:
    """Write a dump as .npz.

    Args:
        path: of the file; .npz.
        arrays: torch tensors, JAX or NumPy arrays, or numbers, named as the fields of `Dump`, or hidden_states for both
            systems. None is skipped. bfloat16 is stored as float32, which represents its values exactly.
    Raises:
        ValueError: the arrays are not a valid dump; or the file's name doesn't end in .npz.
    """
    if Path(path).suffix != ".npz":
        raise ValueError(f"write_dump writes .npz, got the name {os.fspath(path)!r}.")
    stored = {name: _as_numpy(array) for name, array in arrays.items() if array is not None}
    dump_of(stored)
    with Path(path).open("wb") as file:
        np.savez(file, allow_pickle=False, **stored)


def _as_numpy(values: Any) -> Array:
    if hasattr(values, "detach"):  # a tensor of torch
        values = values.detach().cpu()
        values = values.float() if str(values.dtype) == "torch.bfloat16" else values
    array = np.asarray(values)
    # JAX's bfloat16 is a dtype of ml_dtypes, which NumPy can't store.
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def read_dump(path: Path, option: str = "--logprobs") -> Dump:
    """Read a dump from a file.

    Args:
        path: .npz or .safetensors.
        option: prefix of error messages.
    Raises:
        UsageProblem: the file can't be read, or is not a valid dump.
    """
    arrays, _ = read_arrays(path, option)
    try:
        return dump_of(arrays)
    except ValueError as error:
        raise UsageProblem(f"{option} {path}: {error}") from error


def dump_of(arrays: Mapping[str, Array]) -> Dump:
    """A dump from arrays by name.

    Raises:
        ValueError: an array is missing, unknown, or of a wrong kind or shape.
    """
    _check_names(arrays)
    labels = arrays["labels"]
    if labels.dtype.kind not in "iu" or labels.ndim == 0:
        raise ValueError(f"labels must be integers [...], got {labels.dtype} of shape {labels.shape}.")
    if labels.size == 0:
        raise ValueError(f"labels is empty (shape {labels.shape}).")
    for name in _REQUIRED[1:]:
        _check_floats(name, arrays[name], labels.shape)
    scalars = {name: _scalar(name, arrays.get(name, np.asarray(default))) for name, default in _SCALARS.items()}
    head = _head_of(arrays, labels.shape) if "lm_weight" in arrays else {}
    ignore_index = int(scalars.pop("ignore_index"))
    keep = labels != ignore_index
    if problem := outside_vocab(labels, keep, len(head["lm_weight"]) if head else None, ignore_index):
        raise ValueError(problem)
    if not keep.any():
        raise ValueError(f"every label is ignore_index ({ignore_index}), so there is nothing to compare.")
    values: dict[str, Any] = {name: arrays[name] for name in _REQUIRED} | head | scalars
    return Dump(**values, ignore_index=ignore_index)


def _check_names(arrays: Mapping[str, Array]) -> None:
    takes = f"A dump has {', '.join(_REQUIRED)}, and optionally {', '.join(_NAMES[len(_REQUIRED) :])}."
    for name in arrays:
        if name not in _NAMES:
            raise ValueError(f"unknown array {name!r}{closest(name, [n for n in _NAMES if n not in arrays])} {takes}")
    missing = [name for name in _REQUIRED if name not in arrays]
    if missing:
        raise ValueError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing. {takes}")
    hidden = [name for name in _HIDDEN if name in arrays]
    if hidden and hidden not in ([_HIDDEN[0]], list(_HIDDEN[1:])):
        raise ValueError(f"got {', '.join(hidden)}; give hidden_states, or both of {_HIDDEN[1]} and {_HIDDEN[2]}.")
    if bool(hidden) != ("lm_weight" in arrays):
        got, lacks = (hidden[0], "lm_weight") if hidden else ("lm_weight", "hidden_states")
        raise ValueError(f"got {got} without {lacks}: the head's logits need both.")
    if "lm_bias" in arrays and not hidden:
        raise ValueError("got lm_bias without hidden_states and lm_weight.")


def _head_of(arrays: Mapping[str, Array], lead: tuple[int, ...]) -> dict[str, Array]:
    weight = arrays["lm_weight"]
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"lm_weight has shape {weight.shape}, but must be [V, H].")
    vocab, hidden = weight.shape
    _check_floats("lm_weight", weight, (vocab, hidden))
    head = {"lm_weight": weight}
    for name in _HIDDEN:
        if name in arrays:
            _check_floats(name, arrays[name], (*lead, hidden))
            rows = arrays[name].reshape(-1, hidden)
            head |= {name: rows} if name != _HIDDEN[0] else dict.fromkeys(_HIDDEN[1:], rows)
    if "lm_bias" in arrays:
        _check_floats("lm_bias", arrays["lm_bias"], (vocab,))
        head["lm_bias"] = arrays["lm_bias"]
    return head


def _check_floats(name: str, array: Array, shape: tuple[int, ...]) -> None:
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {array.dtype}.")
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, but must have {shape}, from labels and lm_weight.")


def _scalar(name: str, value: Array) -> float:
    if value.size != 1 or value.dtype.kind not in "iuf" or not np.isfinite(number := float(value.reshape(()))):
        raise ValueError(f"{name} must be one finite number, got {value.dtype} of shape {value.shape}.")
    if name in ("temperature", "logit_scale") and number <= 0:
        raise ValueError(f"{name} must be > 0, got {number:g}.")
    if name == "logit_softcapping" and number < 0:
        raise ValueError(f"{name} must be >= 0 (0 for none), got {number:g}.")
    if name == "ignore_index" and not number.is_integer():
        raise ValueError(f"{name} must be a whole number, got {number:g}.")
    return number
