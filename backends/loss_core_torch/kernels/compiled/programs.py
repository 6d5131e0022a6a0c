"""Functions compiled by TorchInductor at their first call, and whether this machine can compile.

They are independent of the caller: of gradient mode, requires_grad, shapes, and process-wide switches such as those of
precision and determinism. They are compiled apart from what the caller compiles, and survive `torch._dynamo.reset()` at
the cost of compiling again.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loss_core.dispatch.flags import install_line
from loss_core.dispatch.protocol import FlagStatus
from loss_core_torch import compat

FLAG = "torch:compile"

# dynamic_threads: a program reads the number of threads when it runs, and is parallel over rows even if it was compiled
# with few. No enable_loop_tail_vec: the last columns of a row, fewer than a vector, are always computed one by one,
# which rounds differently from vectors; if the compiler chose for each program, programs would not agree bitwise.
_OPTIONS: dict[str, Any] = {"cpp.dynamic_threads": True, "cpp.enable_loop_tail_vec": False}

# TorchInductor sums rows of more columns than this differently, in a separate program.
LONG_ROW = 4096

# Tokens, and classes of short and of long rows, of example inputs; all different, since torch.compile would assume that
# equal sizes stay equal.
_EXAMPLE_SIZES = (64, LONG_ROW - 1, 2 * LONG_ROW - 1)


class _TensorSpec(NamedTuple):
    """The properties of a tensor that a program is compiled for; sizes are not among them."""

    dtype: torch.dtype
    device: torch.device
    dim: int
    contiguous: bool
    inference: bool

    def example(self, vocab: int) -> Tensor:
        with torch.inference_mode(self.inference):
            shape = (_EXAMPLE_SIZES[0], vocab + (not self.contiguous))[: self.dim]
            x = torch.zeros(shape, dtype=self.dtype, device=self.device)
            return x if self.contiguous else x[:, :-1]


def run(
    function: Callable[..., Any], x_TV: Tensor, *tensors: Tensor | None, vocab: int | None = None, static: Any = ()
) -> Any:
    """function(x, *tensors, vocab, *static), compiled: once for these dtypes and layouts, for all sizes above 1.

    Args:
        function: without keywords or closures; may write to its arguments.
        x_TV, tensors: contiguous, or matrices with contiguous rows.
        vocab: number of classes, which may differ from the columns of x; None: not passed.
        static: constants; each combination has a separate program.
    """
    inputs = (x_TV, *tensors)
    specs = tuple(None if x is None else _spec(x) for x in inputs)
    long = x_TV.shape[1] > LONG_ROW
    with torch.no_grad(), compat.outside_of_functorch(), compat.outside_of_dispatch_modes(), compat.outside_of_fx():
        threads = torch.get_num_threads()
        program = _program(function, specs, _EXAMPLE_SIZES[1 + long], static, threads, vocab is not None)
        sizes = () if vocab is None else (vocab,)
        return program(*(None if x is None else x.detach() for x in inputs), *sizes, *static)


def _spec(x: Tensor) -> _TensorSpec:
    return _TensorSpec(x.dtype, x.device, x.dim(), x.is_contiguous(), x.is_inference())


@cache
def _program(
    function: FunctionType,
    specs: tuple[_TensorSpec | None, ...],
    vocab: int,
    static: tuple[Any, ...],
    threads: int,
    sized: bool,
) -> Callable[..., Any]:
    """The function compiled for inputs of these specs and this number of PyTorch's threads.

    Compiled with example inputs, not the caller's: results must not depend on the sizes of the first call. Each program
    has a copy of the function's code object, to which torch.compile attaches programs, at most eight.
    """
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    # fullgraph: an error rather than uncompiled operations, which need memory for [T, V] temporaries.
    options = {**_OPTIONS, "guard_filter_fn": compat.guards_on_arguments}
    program: Callable[..., Any] = torch.compile(own, dynamic=True, fullgraph=True, options=options)
    sizes = (vocab,) if sized else ()
    program(*(None if spec is None else spec.example(vocab) for spec in specs), *sizes, *static)
    return program


def status() -> FlagStatus:
    """Whether TorchInductor can compile here; checks only that the files it needs exist."""
    reason, install = _missing()
    version = "" if reason else f"torch {torch.__version__}, {_compiler()}"
    return FlagStatus(FLAG, not reason, reason and f"'{FLAG}' {reason}", version, install)


def _missing() -> tuple[str, str]:
    """What is missing, and the command that installs it if there is one; both empty if nothing is missing."""
    compiler = _compiler()
    if shutil.which(compiler) is None:
        reason = (
            f"needs a C++ compiler, and {compiler!r} is not found: install one (g++, clang++, on Windows Visual C++), "
            "or name it in the environment variable CXX; or use 'torch:eager'."
        )
        return reason, ""
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        reason = (
            f"needs Python's C headers, and there is no Python.h in {headers}: install them (python3-dev on Debian, "
            "python3-devel on Fedora), or use 'torch:eager'."
        )
        return reason, ""
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        install = install_line("triton")
        return f"needs triton on a machine with a GPU: {install}", install
    return "", ""


def _compiler() -> str:
    """C++ compiler that TorchInductor uses: $CXX, else the platform's (torch._inductor.config.cpp.cxx)."""
    default = {"darwin": "clang++", "win32": "cl"}
    return os.environ.get("CXX") or default.get(sys.platform, "g++")
