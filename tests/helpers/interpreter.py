"""Tests of torch:triton in Triton's interpreter: one process runs all of them.

Triton selects interpreter or compiler when it is imported. So the tests of a session whose parameter `flag` is
"torch:triton" ("cells") run together in another pytest process with TRITON_INTERPRET=1, which reports their results.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from loss_core import (
    ChunkedCEConfig,
    FusedLinearCEConfig,
    LossConfig,
    MaskedCrossEntropyConfig,
    TEParallelCEConfig,
)

FLAG = "torch:triton"
# All cells are in one group of pytest-xdist, so that only one worker waits for their results.
GROUP = "interpreted"
ON = os.environ.get("TRITON_INTERPRET") == "1"

_WANTED = "LOSS_CORE_TESTS_INTERPRETED"
_RESULTS = "LOSS_CORE_TESTS_RESULTS"


def possible() -> bool:
    """Whether Triton is installed, so that its kernels can be interpreted."""
    return importlib.util.find_spec("triton") is not None


def patch_once() -> None:
    """Let Triton's interpreter patch triton.language once for each launch of a kernel.

    Triton 3.9 searches all members of its modules for built-in functions and replaces them at each call of a jitted
    function, also within a kernel: four fifths of the time of a call. Versions without these names are not patched.
    """
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    needed = ("_patch_builtin", "_patch_attr", "_patch_lang", "_LangPatchScope", "tl")
    if not all(hasattr(interpreter, name) for name in needed):
        return

    @functools.cache
    def names(module: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(module) if is_builtin(member)]

    def patch_builtin(module: Any, *rest: Any) -> None:
        for name in names(module):
            if is_builtin(member := getattr(module, name)):
                interpreter._patch_attr(module, name, member, *rest)

    patch_lang = interpreter._patch_lang

    def patch_lang_once(fn: Any) -> Any:
        # A launch restores what it has patched: these are built-in functions only outside of one.
        patched = not any(is_builtin(module.load) for module in (interpreter.tl, interpreter.tl.core))
        return interpreter._LangPatchScope() if patched else patch_lang(fn)

    interpreter._patch_builtin = patch_builtin
    interpreter._patch_lang = patch_lang_once


def is_interpreted(item: pytest.Item) -> bool:
    """Whether a test is a cell of torch:triton."""
    callspec = getattr(item, "callspec", None)
    return callspec is not None and callspec.params.get("flag") == FLAG


def results(session: pytest.Session, folder: Path) -> dict[str, str]:
    """The result of each of the session's cells: "" if it passed, else the report of the failure.

    Args:
        folder: shared by the processes of pytest-xdist; the first one runs the cells, the others wait.
    """
    from filelock import FileLock

    stored = folder / "interpreted.json"
    with FileLock(folder / "interpreted.lock"):
        if not stored.exists():
            stored.write_text(json.dumps(_run([cell(item) for item in session.items if is_interpreted(item)], folder)))
    found: dict[str, str] = json.loads(stored.read_text())
    return found


def cell(item: pytest.Item) -> str:
    """The id of a test, without the group that pytest-xdist adds."""
    return item.nodeid.removesuffix(f"@{GROUP}")


def _run(nodeids: list[str], folder: Path) -> dict[str, str]:
    wanted, stored = folder / "interpreted_wanted.json", folder / "interpreted_results.json"
    wanted.write_text(json.dumps(nodeids))
    files = sorted({nodeid.partition("::")[0] for nodeid in nodeids})
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", _WANTED: str(wanted), _RESULTS: str(stored)}
    # Without the options of the session for processes and reports.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    if not stored.exists():
        return dict.fromkeys(nodeids, f"the interpreter's process failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    found: dict[str, str] = json.loads(stored.read_text())
    return {nodeid: found.get(nodeid, "the interpreter's process ended before it") for nodeid in nodeids}


def deselected(items: Sequence[pytest.Item]) -> set[pytest.Item]:
    """Tests that a process does not run.

    A call takes tenths of a second in the interpreter, so each test runs only its first cell per loss, regardless of
    options and other parameters. The cells of test_matrix.py cover every option, and torch:eager runs all of these
    tests. The interpreter's process runs only the cells that the session selected.
    """
    if _WANTED in os.environ:
        wanted = set(json.loads(Path(os.environ[_WANTED]).read_text()))
        return {item for item in items if item.nodeid not in wanted}
    seen, dropped = set(), set()
    for item in filter(is_interpreted, items):
        parameters = item.callspec.params
        cell_of = _autograd_of(parameters["config"]) if "config" in parameters else item.nodeid
        key = (item.nodeid.partition("[")[0], cell_of)
        if key in seen:
            dropped.add(item)
        seen.add(key)
    return dropped


def _autograd_of(config: LossConfig) -> type[LossConfig]:
    """Class of the loss that has the same autograd function, whatever the options.

    TEParallelCrossEntropy is MaskedCrossEntropy less a field, ChunkedCrossEntropy FusedLinearCrossEntropy with a bound.
    """
    same = {TEParallelCEConfig: MaskedCrossEntropyConfig, ChunkedCEConfig: FusedLinearCEConfig}
    return same.get(type(config), type(config))


def store(nodeid: str, report: Any) -> None:
    """In the interpreter's process: store the result of a cell at once, so that a crash loses no other."""
    if _RESULTS in os.environ and (report.when == "call" or not report.passed):
        path = Path(os.environ[_RESULTS])
        found = json.loads(path.read_text()) if path.exists() else {}
        text = "" if report.passed else ("skipped: " if report.skipped else "") + str(report.longrepr)
        path.write_text(json.dumps(found | {nodeid: found.get(nodeid) or text}))
