"""Shared by the commands: options, validation of their values, output files, the progress bar, exit codes."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loss_core.cli.configs import read_configs
from loss_core.dispatch.flags import install_line
from loss_core.dtypes import FORMATS
from loss_core.loss_config import LossConfig
from loss_core.usage import UsageProblem, closest

# Options of more than one command; an option of a single command is declared in its signature.
Configs = Annotated[
    list[str] | None,
    typer.Option(
        "--config",
        metavar="CONFIG",
        help="Loss name, YAML file, or mapping such as '{name: KDLoss, temperature: 2.0}'. Default: all losses.",
    ),
]
Backends = Annotated[
    list[str] | None, typer.Option("--backend", metavar="FLAG", help="Flag such as torch:plain, torch:eager or jax.")
]
Dtypes = Annotated[
    list[str] | None,
    typer.Option("--dtype", metavar="DTYPE", help="Of the inputs: float32, bfloat16, float16 or float64."),
]
_SHAPE = typer.Option("--shape", metavar="T,V[,H]", help="Tokens, vocabulary and hidden size.")
Shape = Annotated[str | None, _SHAPE]
Shapes = Annotated[list[str] | None, _SHAPE]
# With an explicit name: typer 0.27 creates no --device without it.
Device = Annotated[str | None, typer.Option("--device", metavar="DEVICE", help="Device such as cpu or cuda.")]
Seed = Annotated[int, typer.Option(metavar="S", min=0, help="Random seed.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON.")]
Page = Annotated[Path | None, typer.Option("--report", metavar="FILE", help="Write the report as an HTML page.")]
Modules = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="MODULE", help="Python module that registers user-defined losses."),
]

# Libraries needed for an HTML report.
_PAGE_LIBRARIES = ("jinja2", "matplotlib")
_INTERRUPTED = 130

P = ParamSpec("P")


def command(run: Callable[P, int]) -> Callable[P, None]:
    """Make a typer command of a function that returns the exit code.

    A UsageProblem or Ctrl-C prints one line instead of a traceback.
    """

    @functools.wraps(run)
    def wrapped(*args: P.args, **options: P.kwargs) -> None:
        try:
            code = run(*args, **options)
        except UsageProblem as problem:
            print(f"loss-core: {problem}", file=sys.stderr)
            code = 2
        except KeyboardInterrupt:
            print("loss-core: stopped.", file=sys.stderr)
            code = _INTERRUPTED
        raise typer.Exit(code)

    return wrapped


def add_working_directory_to_path() -> None:
    """Let imports find modules in the working directory."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def import_modules(names: Sequence[str]) -> None:
    """Import the user's modules, which register their losses."""
    if names:
        add_working_directory_to_path()
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # an error in a user's module is reported in one line
            raise UsageProblem(f"--import {name}: {type(error).__name__}: {error}") from error


def read_losses(sources: Iterable[str] | None) -> list[str | LossConfig]:
    """The losses of --config, without duplicates."""
    losses = [loss for source in sources or () for loss in read_configs(source)]
    return [loss for i, loss in enumerate(losses) if loss not in losses[:i]]


def reject_others(ctx: typer.Context, mode: str, accepted: Sequence[str]) -> None:
    """Raise UsageProblem if options were given that the option `mode` would ignore.

    Args:
        mode: parameter of the command.
        accepted: parameters that may be combined with it.
    """
    options = {str(parameter.name): parameter.opts[0] for parameter in ctx.command.params}
    sources = {name: ctx.get_parameter_source(name) for name in options if name not in (mode, *accepted)}
    given = [options[name] for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if given:
        *most, last = (options[name] for name in accepted)
        raise UsageProblem(
            f"{', '.join(given)} can't be used beside {options[mode]}, which takes {', '.join(most)} and {last}."
        )


def check_outputs(json: Path | None, page: Path | None) -> None:
    """Raise UsageProblem before a long run if its results could not be written."""
    for name, path in (("--json", json), ("--report", page)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            problem = "is a folder" if path.is_dir() else f"can't be written: there is no folder {path.parent}"
            raise UsageProblem(f"{name} {path} {problem}.")
    for library in _PAGE_LIBRARIES if page is not None else ():
        try:
            importlib.import_module(library)
        except ImportError as error:
            raise UsageProblem(f"--report needs {library} ({error}): {install_line('cli')}") from error


def write_outputs(files: Sequence[tuple[Path | None, Callable[[], str]]], err: Console) -> None:
    """Write each text to its file, and print the paths."""
    for path, text in files:
        if path is not None:
            with reporting_write_errors():
                path.write_text(text(), "utf-8")
            print_text(err, f"wrote {path}")


@contextmanager
def reporting_write_errors() -> Iterator[None]:
    """Convert an OSError of writing a file to a UsageProblem."""
    try:
        yield
    except OSError as error:
        raise UsageProblem(f"{error.filename} can't be written: {error.strerror or error}.") from error


def print_text(console: Console, text: str) -> None:
    """Print a text without markup or wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def checked_choice(option: str, word: str, known: Iterable[str], also: str = "") -> str:
    """Return the value of an option if it is one of the known choices.

    Raises:
        UsageProblem: it is not; the message has the closest choice and all of them.
    """
    known = list(known)
    if word not in known:
        raise UsageProblem(f"{option} {word!r} is unknown{closest(word, known)} Known: {', '.join(known)}{also}.")
    return word


def checked_dtypes(dtypes: Iterable[str] | None) -> list[str]:
    """The values of --dtype, validated."""
    return [checked_choice("--dtype", dtype, FORMATS) for dtype in dtypes or ()]


def parse_shape(text: str) -> tuple[int, ...]:
    """Parse the value of --shape: T,V or T,V,H."""
    parts = text.split(",")
    if len(parts) not in (2, 3) or not all(part.strip().isdecimal() and int(part) >= 1 for part in parts):
        raise UsageProblem(f"--shape {text!r}: expected T,V or T,V,H with whole numbers >= 1, such as 64,1000,32.")
    return tuple(int(part) for part in parts)


@contextmanager
def progress_bar(err: Console) -> Iterator[Callable[[int, int, str], None] | None]:
    """A progress bar on stderr, removed when done; yields its update function, or None if stderr is no terminal."""
    if not err.is_terminal:
        yield None
        return
    columns: tuple[Any, ...] = (
        BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("loading backends", total=None)
        yield lambda done, total, label: bar.update(task, completed=done, total=total, description=label)
