"""A captured call of a loss, read from .npz or .safetensors and validated before it is run."""

# T = tokens (all leading dimensions of labels), V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.array_files import outside_vocab, read_arrays
from loss_core.dtypes import FORMATS
from loss_core.loss_config import LossConfig
from loss_core.losses import Argument, LossDef, definition_of
from loss_core.losses.reduction import valid_tokens
from loss_core.registry import config_class_for
from loss_core.usage import UsageProblem, closest

Array = NDArray[Any]


@dataclass(frozen=True)
class CapturedCall:
    """One call of a loss, as stored by the user.

    Attributes:
        arrays: arguments by name; bfloat16 as float32, which represents its values exactly.
        dtype: of the logits or hidden states in the file.
        notes: remarks for the user, such as inputs of another dtype.
    """

    arrays: dict[str, Array]
    dtype: str
    notes: tuple[str, ...]


def read_call(path: Path, loss: str | LossConfig) -> CapturedCall:
    """Read the arguments of one call from a file whose array names are those of the loss's forward.

    Args:
        path: .npz (numpy.savez) or .safetensors.
        loss: the loss that is called.
    Raises:
        UsageProblem: the file can't be read, an argument is missing, unknown, or of a wrong kind or shape.
    """
    found, dtypes = read_arrays(path, "--inputs")
    config = config_class_for(loss)() if isinstance(loss, str) else loss
    definition = definition_of(config)
    if definition is None:
        raise UsageProblem(
            f"--inputs: the arguments of {type(config).__name__} are not known; use loss_core.check.compare."
        )
    try:
        _check_names(loss if isinstance(loss, str) else type(loss).__name__, definition, found)
        arrays = _checked(definition, config, found)
    except UsageProblem as error:
        raise UsageProblem(f"--inputs {path}: {error}") from error
    floats = [argument.name for argument in definition.inputs]
    dtype = dtypes[floats[0]]
    others = {n: d for n, d in dtypes.items() if d in FORMATS and d != dtype and n in (*floats, "loss_weights")}
    notes = tuple(
        f"{path}: {other} is {d}, but {floats[0]} is {dtype}; all inputs are rounded to the dtype of the check."
        for other, d in others.items()
    )
    return CapturedCall(arrays, dtype, notes)


def _check_names(loss: str, definition: LossDef, arrays: Mapping[str, Array]) -> None:
    required = [a for a in definition.arguments if not a.optional]
    optional = [a.name for a in definition.arguments if a.optional]
    # Floating arguments first, then labels.
    required.sort(key=lambda a: a.kind != "float")
    takes = ", ".join(f"{a.name} {_shape_text(a)}" for a in required)
    takes = f"{loss} takes {takes}" + (f", and optionally {', '.join(optional)}" if optional else "")
    names = [a.name for a in required]
    unknown = [name for name in arrays if name not in (*names, *optional)]
    missing = [name for name in names if name not in arrays]
    if unknown:
        raise UsageProblem(f"unknown argument {unknown[0]!r}{closest(unknown[0], [*missing, *optional])} {takes}.")
    if missing:
        raise UsageProblem(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing. {takes}.")


def _shape_text(argument: Argument) -> str:
    return f"[{', '.join('...' if dim == 'T' else dim for dim in argument.dims)}]"


def _checked(definition: LossDef, config: LossConfig, found: Mapping[str, Array]) -> dict[str, Array]:
    """Validate the arrays, so that errors come before any backend runs; returns them with counts as integers."""
    arrays = dict(found)
    labels = arrays["labels"]
    if labels.dtype.kind not in "iu":
        raise UsageProblem(f"labels must be integers, got {labels.dtype}.")
    if labels.size == 0:
        raise UsageProblem(f"labels is empty (shape {labels.shape}).")
    for argument in definition.inputs:
        dtype = arrays[argument.name].dtype
        if dtype.kind != "f" or dtype.itemsize > 8:
            raise UsageProblem(f"{argument.name} must be one of {', '.join(FORMATS)}, got {dtype}.")
    vocab = _check_shapes(definition, arrays)
    count = next((argument.name for argument in definition.arguments if argument.kind == "count"), None)
    for argument in definition.arguments:
        if argument.name in arrays and not definition.accepts(config, argument.name):
            reduction = definition.reduction(config)
            raise UsageProblem(f"{argument.name} goes with reduction 'sum' only, but the config has {reduction!r}.")
        if argument.name in arrays and argument.with_count and count not in arrays:
            raise UsageProblem(f"{argument.name} goes with {count} only, which is not there.")
        if argument.name in arrays and argument.kind in ("count", "hint"):
            arrays[argument.name] = _count(argument.name, arrays[argument.name])
    if definition.find("label") is not None:
        ignore_index = int(getattr(config, "ignore_index", -100))
        keep = valid_tokens(arrays, ignore_index).reshape(labels.shape)
        if problem := outside_vocab(labels, keep, vocab, ignore_index):
            raise UsageProblem(problem)
    return arrays


def _check_shapes(definition: LossDef, arrays: Mapping[str, Array]) -> int:
    """Check all shapes against that of labels, and against each other; returns V."""
    lead = arrays["labels"].shape
    sizes: dict[str, tuple[int, str]] = {}
    for argument in definition.arguments:
        if argument.name not in arrays or argument.kind not in ("float", "mask"):
            continue
        name, shape = argument.name, arrays[argument.name].shape
        if argument.kind == "mask":
            _check_broadcast(name, shape, lead)
            continue
        leading, dims = (len(lead), argument.dims[1:]) if argument.dims[0] == "T" else (0, argument.dims)
        if leading and shape[:leading] != lead:
            raise UsageProblem(f"labels has shape {lead} but {name} has shape {shape}; its leading part must match.")
        if len(shape) != leading + len(dims):
            raise UsageProblem(f"{name} has shape {shape}, but must be {_shape_text(argument)}.")
        for dim, size in zip(dims, shape[leading:], strict=True):
            known, other = sizes.setdefault(dim, (size, name))
            if size != known:
                raise UsageProblem(
                    f"{name} has shape {shape}, so {dim} = {size}, but {other} has {dim} = {known}; they must match."
                )
    vocab = sizes["V"][0]
    if not vocab:
        raise UsageProblem("the vocabulary is empty: V = 0.")
    return vocab


def _check_broadcast(name: str, shape: tuple[int, ...], lead: tuple[int, ...]) -> None:
    try:
        np.broadcast_to(np.empty(shape, np.bool_), lead)
    except ValueError as error:
        raise UsageProblem(f"{name} has shape {shape}, which does not broadcast to that of labels, {lead}.") from error


def _count(name: str, value: Array) -> Array:
    if value.size != 1 or value.dtype.kind not in "iuf" or not float(value.reshape(())).is_integer():
        raise UsageProblem(f"{name} must be one whole number, got {value.dtype} of shape {value.shape}.")
    return np.asarray(int(value.reshape(())))
