"""What the commands share: modules of the user's own, shapes, files to write, the progress bar."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loss_core.backend import install_line
from loss_core.cli_configs import UsageProblem

if TYPE_CHECKING:
    from rich.console import Console

# What an HTML report needs.
PAGE_LIBRARIES = ("jinja2", "matplotlib")


def import_modules(names: Sequence[str]) -> None:
    """Import the user's modules, which register their losses; the working directory counts as on the path."""
    if names and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a user's module raises is told in one line
            raise UsageProblem(f"--import {name}: {type(error).__name__}: {error}") from error


def check_output(name: str, path: Path | None, needs: Sequence[str] = ()) -> None:
    """Find out before the work, which takes a while, that its result can be written to an option's file."""
    if path is None:
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        problem = "is a folder" if path.is_dir() else f"can't be written: there is no folder {path.parent}"
        raise UsageProblem(f"{name} {path} {problem}.")
    for library in needs:
        try:
            importlib.import_module(library)
        except ImportError as error:
            raise UsageProblem(f"{name} needs {library} ({error}): {install_line('cli')}") from error


def shape_of(text: str) -> tuple[int, ...]:
    """A shape as it is typed: T,V or T,V,H."""
    parts = text.split(",")
    if len(parts) not in (2, 3) or not all(part.strip().isdecimal() and int(part) >= 1 for part in parts):
        raise UsageProblem(f"--shape {text!r}: expected T,V or T,V,H with whole numbers >= 1, such as 64,1000,32.")
    return tuple(int(part) for part in parts)


@contextmanager
def progress_bar(err: Console) -> Iterator[Callable[[int, int, str], None] | None]:
    """A bar on the terminal, gone when done; nothing where stderr is none."""
    if not err.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns: tuple[Any, ...] = (
        BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("loading backends", total=None)
        yield lambda done, total, label: bar.update(task, completed=done, total=total, description=label)
