"""`loss-core compare`: compare two implementations of any loss, without a definition, on given or drawn inputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

from loss_core.array_files import read_arrays
from loss_core.check import compare
from loss_core.check.judge.implementation import error_text, import_object
from loss_core.check.text import print_check
from loss_core.cli.common import (
    Json,
    Seed,
    add_working_directory_to_path,
    check_outputs,
    checked_dtypes,
    command,
    write_outputs,
)
from loss_core.dispatch.flags import BACKENDS
from loss_core.usage import UsageProblem


@command
def compare_command(
    first: Annotated[str, typer.Argument(metavar="MODULE:FN", help="Reference function; must run in float64, too.")],
    second: Annotated[str, typer.Argument(metavar="MODULE:FN", help="Function to compare with it.")],
    inputs: Annotated[
        Path | None, typer.Option(metavar="FILE", help=".npz or .safetensors with the arguments by name.")
    ] = None,
    draw: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SIZES[:N]",
            help="Draw an argument, instead of a file: logits=16,507 for normally distributed values, labels=16:507 "
            "for integers below 507.",
        ),
    ] = None,
    seed: Seed = 0,
    frameworks: Annotated[
        str, typer.Option(metavar="A,B", help="Frameworks of the two: torch,torch or torch,jax or …")
    ] = "torch,jax",
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="Dtype to which floating inputs are rounded.")] = (
        "float32"
    ),
    grad_of: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Argument to differentiate. Default: all floating ones.")
    ] = None,
    json: Json = None,
) -> int:
    """Compare value and gradients of two functions on the same inputs, in one dtype and in float64.

    Both accept the arrays as keyword arguments and return one tensor.

    May be repeated: --draw, --grad-of.

    Exit code: 0 they agree within what rounding explains, 1 they do not, 2 wrong usage, 130 Ctrl-C.
    """
    out, err = Console(), Console(stderr=True)
    check_outputs(json, None)
    checked_dtypes([dtype])
    named = (frameworks.partition(",")[0], frameworks.partition(",")[2])
    if not set(named) <= set(BACKENDS):
        raise UsageProblem(f"--frameworks {frameworks!r}: expected two of {', '.join(BACKENDS)}, such as torch,jax.")
    if (inputs is None) == (not draw):
        raise UsageProblem("give the arguments of both: either --inputs FILE, or --draw NAME=SIZES for each.")
    arrays = _drawn(draw or (), seed) if inputs is None else read_arrays(inputs, "--inputs")[0]
    one, other = _function(first), _function(second)
    try:
        report = compare(one, other, arrays, dtype=dtype, grad_of=grad_of, frameworks=named, seed=seed)
    except Exception as error:  # an error in a user's function is reported in one line
        raise UsageProblem(f"{error_text(error)} (called with --frameworks {frameworks})") from error
    print_check(out, report)
    write_outputs([(json, lambda: report.to_json() + "\n")], err)
    return 0 if report.passed else 1


_DRAWN = re.compile(r"(?P<name>[A-Za-z_]\w*)=(?P<sizes>\d+(,\d+)*)(:(?P<below>[1-9]\d*))?")


def _drawn(specs: Sequence[str], seed: int) -> dict[str, NDArray[Any]]:
    """Drawn arguments by name: normally distributed values, or integers below N."""
    rng, arrays = np.random.default_rng(seed), {}
    for spec in specs:
        if (found := _DRAWN.fullmatch(spec)) is None:
            raise UsageProblem(f"--draw {spec!r}: expected NAME=SIZES[:N], such as logits=16,507 or labels=16:507.")
        sizes = tuple(map(int, found["sizes"].split(",")))
        below = found["below"]
        arrays[found["name"]] = rng.integers(0, int(below), sizes) if below else rng.standard_normal(sizes)
    return arrays


def _function(spec: str) -> Any:
    add_working_directory_to_path()
    try:
        return import_object(spec)
    except Exception as error:  # an error in a user's module is reported in one line
        raise UsageProblem(f"{spec}: {error_text(error)}") from error
