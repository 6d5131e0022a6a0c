"""`loss-core compare`: two implementations of any loss on inputs from a file, without a definition of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from loss_core.array_files import read_arrays
from loss_core.check import compare
from loss_core.check.judge.implementation import in_words, object_at
from loss_core.check.text import print_check
from loss_core.cli.common import Json, check_outputs, command, known_dtypes, look_in_working_directory, write_outputs
from loss_core.dispatch.flags import BACKENDS
from loss_core.usage import UsageProblem


@command
def compare_command(
    first: Annotated[str, typer.Argument(metavar="MODULE:FN", help="The reference: it must run in float64, too.")],
    second: Annotated[str, typer.Argument(metavar="MODULE:FN", help="What is compared with it.")],
    inputs: Annotated[
        Path, typer.Option(metavar="FILE", help=".npz or .safetensors with the arguments of both, by name.")
    ],
    frameworks: Annotated[
        str, typer.Option(metavar="A,B", help="Whose tensors the two take: torch,torch or torch,jax or …")
    ] = "torch,jax",
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="Of the floating inputs, which are rounded to it.")] = (
        "float32"
    ),
    grad_of: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Argument to differentiate. Default: all floating ones.")
    ] = None,
    json: Json = None,
) -> int:
    """Compare value and gradients of two functions on the same inputs, in one dtype and in float64.

    Both take the arrays of FILE as keyword arguments and return one tensor.

    May be repeated: --grad-of.

    Exit code: 0 they agree within what rounding explains, 1 they do not, 2 wrong usage, 130 Ctrl-C.
    """
    out, err = Console(), Console(stderr=True)
    check_outputs(json, None)
    known_dtypes([dtype])
    named = tuple(frameworks.split(","))
    if len(named) != 2 or not set(named) <= set(BACKENDS):
        raise UsageProblem(f"--frameworks {frameworks!r}: expected two of {', '.join(BACKENDS)}, such as torch,jax.")
    arrays, _ = read_arrays(inputs, "--inputs")
    one, other = _function(first), _function(second)
    try:
        report = compare(one, other, arrays, dtype=dtype, grad_of=grad_of, frameworks=(named[0], named[1]))
    except Exception as error:  # what a user's function raises is told in one line
        raise UsageProblem(in_words(error)) from error
    print_check(out, report)
    write_outputs([(json, lambda: report.to_json() + "\n")], err)
    return 0 if report.passed else 1


def _function(spec: str) -> Any:
    look_in_working_directory()
    try:
        return object_at(spec)
    except Exception as error:  # whatever a user's module raises is told in one line
        raise UsageProblem(f"{spec}: {in_words(error)}") from error
