"""The fastest flag on this machine: the cache that `loss-core bench --tune` writes and `auto` may read.

One JSON file, in $LOSS_CORE_CACHE or else the user's cache folder. An entry is valid for one loss, dtype, device and
shape class (sizes rounded to powers of two), and for the versions and number of threads with which it was measured;
with others, another kernel may be faster.
"""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from loss_core import __version__

FORMAT = 1


def cache_file() -> Path:
    """Path of the cache of this machine; the file need not exist."""
    if named := os.environ.get("LOSS_CORE_CACHE"):
        folder = Path(named)
    elif sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "loss-core"
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches" / "loss-core"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loss-core"
    return folder / "choices.json"


def shape_class(shape: Sequence[int]) -> list[int]:
    """Each size rounded to a power of two.

    >>> shape_class((8192, 128256, 4096))
    [8192, 131072, 4096]
    """
    return [2 ** round(math.log2(size)) if size > 0 else 0 for size in shape]


def tuned_choice(
    loss: str, device: str, dtype: str, shape: Sequence[int], *, version: str, threads: int, backend: str = "torch",
    file: Path | None = None,
) -> str | None:  # fmt: skip
    """The fastest flag for such calls, or None if nothing was measured.

    Args:
        loss: registry name, such as "KDLoss".
        device: "cpu", or the framework's name of the accelerator, such as "NVIDIA H100 80GB HBM3".
        dtype: such as "bfloat16".
        shape: (T, V), or (T, V, H) for the fused loss.
        version: of the framework, such as "2.13.0+cpu".
        threads: number of threads of the framework on a CPU; ignored for an accelerator.
        backend: "torch" or "jax": only its flags are considered.
        file: used instead of `cache_file()`.
    Returns:
        A flag that names a kernel. Entries with other or missing versions or threads are ignored, and so is a file
        that can't be read: the cache never causes an error.
    """
    path = cache_file() if file is None else file
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        return None
    wanted = _key(loss, device, dtype, shape, backend, version, threads)
    for entry in _read(path, changed):
        if all(entry.get(name) == value for name, value in wanted.items()):
            flag = entry.get("flag")
            return flag if isinstance(flag, str) and flag.startswith(f"{backend}:") else None
    return None


def store_choices(entries: Sequence[Mapping[str, Any]], file: Path | None = None) -> Path:
    """Add choices to the cache; entries for the same calls are replaced.

    Args:
        entries: each with loss, device, dtype, shape, backend, version, threads (as in `tuned_choice`) and flag.
    Raises:
        OSError: the file can't be written.
    """
    path = cache_file() if file is None else file
    try:
        kept = list(_read(path, path.stat().st_mtime_ns))
    except OSError:
        kept = []
    for entry in entries:
        key = _key(*(entry[name] for name in ("loss", "device", "dtype", "shape", "backend", "version", "threads")))
        kept = [old for old in kept if any(old.get(name) != value for name, value in key.items())]
        kept.append({**entry, **key})
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written to a temporary file and renamed: readers never see a partial file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps({"format": FORMAT, "choices": kept}, indent=1) + "\n", "utf-8")
    temporary.replace(path)
    return path


def _key(
    loss: str, device: str, dtype: str, shape: Sequence[int], backend: str, version: str, threads: int
) -> dict[str, Any]:
    """The fields by which entries are matched; `threads` is None unless the device is a CPU."""
    return {
        "loss": loss, "device": device, "dtype": dtype, "shape_class": shape_class(shape), "backend": backend,
        "loss_core": __version__, "version": version, "threads": threads if device == "cpu" else None,
    }  # fmt: skip


@lru_cache(maxsize=8)
def _read(path: Path, changed: int) -> tuple[dict[str, Any], ...]:
    """The entries of a file; `changed`, its modification time, invalidates the cached result when it is rewritten."""
    try:
        data = json.loads(path.read_text("utf-8"))
        entries = data["choices"] if data["format"] == FORMAT else []
        return tuple(entry for entry in entries if isinstance(entry, dict))
    except (OSError, ValueError, KeyError, TypeError):
        return ()
