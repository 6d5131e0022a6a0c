"""What the commands share: options, words that are checked, files to write, the progress bar, exit codes."""

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

# Options that more than one command has; an option of one command is declared in its signature.
Configs = Annotated[
    list[str] | None,
    typer.Option(
        "--config",
        metavar="CONFIG",
        help="Loss name, YAML file, or a mapping like '{name: KDLoss, temperature: 2.0}'. Default: all losses.",
    ),
]
Backends = Annotated[
    list[str] | None, typer.Option("--backend", metavar="FLAG", help="Such as torch:plain, torch:eager or jax.")
]
Dtypes = Annotated[
    list[str] | None, typer.Option("--dtype", metavar="DTYPE", help="float32, bfloat16, float16 or float64.")
]
_SHAPE = typer.Option("--shape", metavar="T,V[,H]", help="Tokens, vocabulary and hidden size.")
Shape = Annotated[str | None, _SHAPE]
Shapes = Annotated[list[str] | None, _SHAPE]
# With its name spelled out: typer 0.27 has no --device without.
Device = Annotated[str | None, typer.Option("--device", metavar="DEVICE", help="Such as cpu or cuda.")]
Seed = Annotated[int, typer.Option(metavar="S", min=0, help="Seed of what is random.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON.")]
Page = Annotated[Path | None, typer.Option("--report", metavar="FILE", help="Write the report as an HTML page.")]
Modules = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="MODULE", help="Python module that registers losses of your own."),
]

# What an HTML report needs.
_PAGE_LIBRARIES = ("jinja2", "matplotlib")
_INTERRUPTED = 130

P = ParamSpec("P")


def command(run: Callable[P, int]) -> Callable[P, None]:
    """A command of typer from a function that returns the exit code.

    What a user can mend, and Ctrl-C, are one line instead of a traceback.
    """

    @functools.wraps(run)
    def told(*args: P.args, **options: P.kwargs) -> None:
        try:
            code = run(*args, **options)
        except UsageProblem as problem:
            print(f"loss-core: {problem}", file=sys.stderr)
            code = 2
        except KeyboardInterrupt:
            print("loss-core: stopped.", file=sys.stderr)
            code = _INTERRUPTED
        raise typer.Exit(code)

    return told


def look_in_working_directory() -> None:
    """The working directory counts as on the path of imports."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def import_modules(names: Sequence[str]) -> None:
    """Import the user's modules, which register their losses."""
    if names:
        look_in_working_directory()
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a user's module raises is told in one line
            raise UsageProblem(f"--import {name}: {type(error).__name__}: {error}") from error


def read_losses(sources: Iterable[str] | None) -> list[str | LossConfig]:
    """The losses of --config, each once."""
    losses = [loss for source in sources or () for loss in read_configs(source)]
    return [loss for i, loss in enumerate(losses) if loss not in losses[:i]]


def only_options(ctx: typer.Context, mode: str, taken: Sequence[str]) -> None:
    """Refuse options of a command that were given and that one of them, the mode, would ignore.

    Args:
        mode: parameter of the command.
        taken: parameters that mean something beside it.
    """
    options = {str(parameter.name): parameter.opts[0] for parameter in ctx.command.params}
    sources = {name: ctx.get_parameter_source(name) for name in options if name not in (mode, *taken)}
    given = [options[name] for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if given:
        *most, last = (options[name] for name in taken)
        raise UsageProblem(
            f"{', '.join(given)} can't be used beside {options[mode]}, which takes {', '.join(most)} and {last}."
        )


def check_outputs(json: Path | None, page: Path | None) -> None:
    """Find out before the work, which takes a while, that its results can be written."""
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
    """Write each text to its file, and say so."""
    for path, text in files:
        if path is not None:
            with writing():
                path.write_text(text(), "utf-8")
            note(err, f"wrote {path}")


@contextmanager
def writing() -> Iterator[None]:
    """A file that can't be written is wrong usage."""
    try:
        yield
    except OSError as error:
        raise UsageProblem(f"{error.filename} can't be written: {error.strerror or error}.") from error


def note(err: Console, text: str) -> None:
    """A line beside the output, as it is."""
    err.print(text, markup=False, highlight=False, soft_wrap=True)


def known_word(option: str, word: str, known: Iterable[str], also: str = "") -> str:
    """The word, where it is known.

    Raises:
        UsageProblem: with the nearest word and all that are known.
    """
    known = list(known)
    if word not in known:
        raise UsageProblem(f"{option} {word!r} is unknown{closest(word, known)} Known: {', '.join(known)}{also}.")
    return word


def known_dtypes(dtypes: Iterable[str] | None) -> list[str]:
    """The dtypes of --dtype."""
    return [known_word("--dtype", dtype, FORMATS) for dtype in dtypes or ()]


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
    columns: tuple[Any, ...] = (
        BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("loading backends", total=None)
        yield lambda done, total, label: bar.update(task, completed=done, total=total, description=label)
