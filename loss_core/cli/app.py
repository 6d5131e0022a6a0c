"""The typer application of `loss-core`, with its smaller commands; the others are imported."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from loss_core import __version__
from loss_core.cli.bench import bench_command
from loss_core.cli.check import check_command
from loss_core.cli.common import Modules, command, import_modules
from loss_core.cli.compare import compare_command
from loss_core.cli.listing import print_backends, print_losses
from loss_core.cli.schema import recipe_schema
from loss_core.dispatch.flags import all_flags, flag_status

app: typer.Typer = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="LLM training losses for PyTorch and JAX, each from one typed config, and checks that they agree.",
)
app.command("check")(check_command)
app.command("bench")(bench_command)
app.command("compare")(compare_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"loss-core {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command("backends")
@command
def backends_command() -> int:
    """List every backend flag: whether it is usable here, its version, or why not and what to install."""
    print_backends(Console(), [flag_status(flag) for flag in all_flags()])
    return 0


@app.command("losses")
@command
def losses_command(
    modules: Modules = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of recipes instead, for editors and validators.")
    ] = False,
) -> int:
    """List every loss config: fields, types, defaults and meaning."""
    import_modules(modules or ())
    if schema:
        print(json.dumps(recipe_schema(), indent=2))
    else:
        print_losses(Console())
    return 0
