"""A user's own call of a loss, read from .npz or .safetensors and looked over before it is run."""

# T = tokens (all leading dimensions of labels), V = vocabulary, H = hidden

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.backend import install_line
from loss_core.build import LOSS_CONFIG_REGISTRY, config_class_for
from loss_core.cases import ALL_LOSSES
from loss_core.cli_configs import UsageProblem, closest
from loss_core.config import LossConfig
from loss_core.dtypes import FORMATS
from loss_core.oracle import kept_tokens

Array = NDArray[Any]

# Forward arguments by loss: floating inputs with their shapes, then what may be left out. labels go with each.
_LOGITS = {"logits": "[..., V]"}
_CE_EXTRAS = ("mask", "num_label_tokens", "loss_weights")
_ARGUMENTS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "MaskedCrossEntropy": (_LOGITS, _CE_EXTRAS),
    "TEParallelCrossEntropy": (_LOGITS, _CE_EXTRAS),
    "FusedLinearCrossEntropy": (
        {"hidden_states": "[..., H]", "lm_weight": "[V, H]"},
        ("num_label_tokens", "loss_weights"),
    ),
    "KDLoss": ({"student_logits": "[..., V]", "teacher_logits": "[..., V]"}, ("num_batch_labels",)),
}
_COUNTS = ("num_label_tokens", "num_batch_labels")


@dataclass(frozen=True)
class CapturedCall:
    """One call of a loss, as the user stored it.

    Attributes:
        arrays: arguments by name; bfloat16 as float32, which holds its values exactly.
        dtype: of the logits or hidden states in the file.
        notes: what the reader should know, such as inputs of another dtype.
    """

    arrays: dict[str, Array]
    dtype: str
    notes: tuple[str, ...]


def read_call(path: Path, loss: str | LossConfig) -> CapturedCall:
    """The arguments of one call, from a file that names them as the loss's forward does.

    Args:
        path: .npz (numpy.savez) or .safetensors.
        loss: what the call is for.
    Raises:
        UsageProblem: the file can't be read, an argument is missing, unknown, or of a wrong kind or shape.
    """
    if path.suffix not in (".npz", ".safetensors"):
        raise UsageProblem(f"--inputs {path}: expected a file that ends in .npz or .safetensors.")
    found, dtypes = _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
    config = config_class_for(loss)() if isinstance(loss, str) else loss
    name = _known_loss(config)
    try:
        _check_names(name, found)
        arrays = _checked(name, config, found)
    except UsageProblem as error:
        raise UsageProblem(f"--inputs {path}: {error}") from error
    floats = list(_ARGUMENTS[name][0])
    dtype = dtypes[floats[0]]
    others = {n: d for n, d in dtypes.items() if d in FORMATS and d != dtype and n in (*floats, "loss_weights")}
    notes = tuple(
        f"{path}: {other} is {d}, but {floats[0]} is {dtype}; all inputs are given in the dtype of the check."
        for other, d in others.items()
    )
    return CapturedCall(arrays, dtype, notes)


def _known_loss(config: LossConfig) -> str:
    for name in ALL_LOSSES:
        if isinstance(config, LOSS_CONFIG_REGISTRY[name]):
            return name
    raise UsageProblem(
        f"--inputs: the arguments of {type(config).__name__} are not known; use loss_core.check.compare."
    )


def _read_npz(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    try:
        # Opened here: np.load leaves a file open that it then finds broken.
        with path.open("rb") as opened:
            file = np.load(opened, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise UsageProblem(f"--inputs {path}: holds a single array; store arguments by name, with numpy.savez.")
            arrays = {name: np.asarray(file[name]) for name in file.files}
    except OSError as error:
        raise UsageProblem(f"--inputs {path} can't be read: {error.strerror or error}.") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageProblem(f"--inputs {path} is no .npz file of plain arrays: {error}.") from error
    for name, array in arrays.items():
        if array.dtype.kind == "V":
            raise UsageProblem(
                f"--inputs {path}: {name} has the type {array.dtype}, which NumPy can't read back "
                "(bfloat16, it may be); store such tensors as .safetensors."
            )
    native = {name: array.astype(array.dtype.newbyteorder("="), copy=False) for name, array in arrays.items()}
    return native, {name: array.dtype.name for name, array in native.items()}


_SAFETENSORS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
}  # fmt: skip


def _read_safetensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    try:
        from safetensors import SafetensorError, deserialize
    except ImportError as error:
        raise UsageProblem(f"--inputs {path} needs safetensors ({error}): {install_line('cli')}") from error
    try:
        entries: list[tuple[str, Any]] = list(deserialize(path.read_bytes()))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise UsageProblem(f"--inputs {path} can't be read: {error.strerror or error}.") from error
    except SafetensorError as error:
        raise UsageProblem(f"--inputs {path} is no .safetensors file: {error}.") from error
    arrays: dict[str, Array] = {}
    dtypes: dict[str, str] = {}
    for name, entry in entries:
        stored = entry["dtype"]
        if stored not in _SAFETENSORS:
            known = ", ".join(_SAFETENSORS)
            raise UsageProblem(f"--inputs {path}: {name} has the dtype {stored}; accepted are {known}.")
        dtypes[name] = _SAFETENSORS[stored]
        arrays[name] = _from_bytes(entry["data"], dtypes[name]).reshape(entry["shape"])
    return arrays, dtypes


def _from_bytes(data: bytes, dtype: str) -> Array:
    if dtype != "bfloat16":
        return np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).astype(dtype)
    # A bfloat16 is the upper half of a float32.
    return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)


def _check_names(loss: str, arrays: Mapping[str, Array]) -> None:
    required, optional = _ARGUMENTS[loss]
    shapes = {**required, "labels": "[...]"}
    takes = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    takes = f"{loss} takes {takes}, and optionally {', '.join(optional)}"
    unknown = [name for name in arrays if name not in (*shapes, *optional)]
    missing = [name for name in shapes if name not in arrays]
    if unknown:
        raise UsageProblem(f"unknown argument {unknown[0]!r}{closest(unknown[0], [*missing, *optional])} {takes}.")
    if missing:
        raise UsageProblem(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing. {takes}.")


def _checked(loss: str, config: LossConfig, found: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays, after what every backend would refuse has been refused with a message."""
    arrays = dict(found)
    labels = arrays["labels"]
    if labels.dtype.kind not in "iu":
        raise UsageProblem(f"labels must be integers, got {labels.dtype}.")
    if labels.size == 0:
        raise UsageProblem(f"labels is empty (shape {labels.shape}).")
    required = _ARGUMENTS[loss][0]
    for name in required:
        if arrays[name].dtype.kind != "f" or arrays[name].dtype.itemsize > 8:
            raise UsageProblem(f"{name} must be one of {', '.join(FORMATS)}, got {arrays[name].dtype}.")
    vocab = _check_shapes(required, arrays)
    for name in set(_COUNTS) & set(arrays):
        arrays[name] = _count(name, arrays[name])
    reduction = getattr(config, "reduction", "sum")
    for name in ("num_label_tokens", "loss_weights"):
        if name in arrays and reduction != "sum":
            raise UsageProblem(f"{name} goes with reduction 'sum' only, but the config has {reduction!r}.")
    _check_labels(arrays, vocab, int(getattr(config, "ignore_index", -100)))
    return arrays


def _check_shapes(required: Iterable[str], arrays: Mapping[str, Array]) -> int:
    """Compare all shapes with that of labels; returns V."""
    lead = arrays["labels"].shape
    size: int | None = None
    for name in required:
        shape = arrays[name].shape
        if name == "lm_weight":
            hidden = arrays["hidden_states"].shape[-1]
            if len(shape) != 2 or shape[1] != hidden:
                raise UsageProblem(f"lm_weight has shape {shape}, but must be [V, {hidden}], as hidden_states has it.")
            size = int(shape[0])
            continue
        if shape[:-1] != lead or not shape:
            raise UsageProblem(f"labels has shape {lead} but {name} has shape {shape}; its leading part must match.")
        if size is not None and shape[-1] != size:
            raise UsageProblem(f"student_logits has V = {size} but teacher_logits V = {shape[-1]}; they must match.")
        size = int(shape[-1])
    if not size:
        raise UsageProblem("the vocabulary is empty: V = 0.")
    if "loss_weights" in arrays and arrays["loss_weights"].shape != lead:
        raise UsageProblem(
            f"loss_weights has shape {arrays['loss_weights'].shape}, but labels {lead}; they must match."
        )
    if "mask" in arrays:
        try:
            np.broadcast_to(arrays["mask"], lead)
        except ValueError as error:
            raise UsageProblem(
                f"mask has shape {arrays['mask'].shape}, which does not broadcast to that of labels, {lead}."
            ) from error
    return size


def _count(name: str, value: Array) -> Array:
    if value.size != 1 or value.dtype.kind not in "iuf" or not float(value.reshape(())).is_integer():
        raise UsageProblem(f"{name} must be one whole number, got {value.dtype} of shape {value.shape}.")
    return np.asarray(int(value.reshape(())))


def _check_labels(arrays: Mapping[str, Array], vocab: int, ignore_index: int) -> None:
    labels = arrays["labels"]
    keep = kept_tokens(arrays, ignore_index).reshape(labels.shape)
    wrong = np.argwhere(keep & ((labels < 0) | (labels >= vocab)))
    if wrong.size:
        at = tuple(int(i) for i in wrong[0])
        place = "".join(f"[{i}]" for i in at)
        raise UsageProblem(
            f"labels{place} is {int(labels[at])}, which is outside [0, {vocab}) and not ignore_index ({ignore_index})."
        )
