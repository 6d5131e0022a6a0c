"""Read named arrays from .npz and .safetensors files as NumPy arrays."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.dispatch.flags import install_line
from loss_core.usage import UsageProblem

Array = NDArray[Any]


def read_arrays(path: Path, option: str) -> tuple[dict[str, Array], dict[str, str]]:
    """Read the arrays of a file; bfloat16 as float32, which represents its values exactly.

    Args:
        option: command-line option that error messages begin with.
    Returns:
        Arrays by name, and the name of the dtype in which each is stored.
    Raises:
        UsageProblem: the file can't be read, has another format, or has a dtype that is not supported.
    """
    if path.suffix not in (".npz", ".safetensors"):
        raise UsageProblem(f"{option} {path}: expected a file that ends in .npz or .safetensors.")
    return _read_npz(path, option) if path.suffix == ".npz" else _read_safetensors(path, option)


def outside_vocab(labels: Array, keep: NDArray[np.bool_], vocab: int | None, ignore_index: int) -> str:
    """Message for the first valid label outside [0, vocab); "" if there is none.

    Args:
        keep: valid tokens, shape of labels.
        vocab: None if unknown: then only labels below 0 are outside.
    """
    above = False if vocab is None else labels >= vocab
    wrong = np.argwhere(keep & ((labels < 0) | above))
    if not wrong.size:
        return ""
    first = tuple(int(i) for i in wrong[0])
    index, end = "".join(f"[{i}]" for i in first), "..." if vocab is None else vocab
    return f"labels{index} is {int(labels[first])}, which is outside [0, {end}) and not ignore_index ({ignore_index})."


def _read_npz(path: Path, option: str) -> tuple[dict[str, Array], dict[str, str]]:
    try:
        # Opened here: np.load does not close a file that turns out to be corrupt.
        with path.open("rb") as opened:
            file = np.load(opened, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise UsageProblem(f"{option} {path}: holds a single array; store arguments by name, with numpy.savez.")
            arrays = {name: np.asarray(file[name]) for name in file.files}
    except OSError as error:
        raise UsageProblem(f"{option} {path} can't be read: {error.strerror or error}.") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageProblem(f"{option} {path} is no .npz file of plain arrays: {error}.") from error
    for name, array in arrays.items():
        if array.dtype.kind == "V":
            raise UsageProblem(
                f"{option} {path}: {name} has the type {array.dtype}, which NumPy can't read back "
                "(bfloat16, it may be); store such tensors as .safetensors."
            )
    native = {name: array.astype(array.dtype.newbyteorder("="), copy=False) for name, array in arrays.items()}
    return native, {name: array.dtype.name for name, array in native.items()}


_SAFETENSORS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
}  # fmt: skip


def _read_safetensors(path: Path, option: str) -> tuple[dict[str, Array], dict[str, str]]:
    try:
        from safetensors import SafetensorError, deserialize
    except ImportError as error:
        raise UsageProblem(f"{option} {path} needs safetensors ({error}): {install_line('cli')}") from error
    try:
        entries: list[tuple[str, Any]] = list(deserialize(path.read_bytes()))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise UsageProblem(f"{option} {path} can't be read: {error.strerror or error}.") from error
    except SafetensorError as error:
        raise UsageProblem(f"{option} {path} is no .safetensors file: {error}.") from error
    arrays: dict[str, Array] = {}
    dtypes: dict[str, str] = {}
    for name, entry in entries:
        stored = entry["dtype"]
        if stored not in _SAFETENSORS:
            known = ", ".join(_SAFETENSORS)
            raise UsageProblem(f"{option} {path}: {name} has the dtype {stored}; accepted are {known}.")
        dtypes[name] = _SAFETENSORS[stored]
        arrays[name] = _from_bytes(entry["data"], dtypes[name]).reshape(entry["shape"])
    return arrays, dtypes


def _from_bytes(data: bytes, dtype: str) -> Array:
    if dtype != "bfloat16":
        return np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).astype(dtype)
    # A bfloat16 is the upper half of a float32.
    return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
