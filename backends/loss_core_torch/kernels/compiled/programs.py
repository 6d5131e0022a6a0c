"""Programs that TorchInductor makes of functions at their first call, and whether this machine can make them.

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

# The number of threads is asked for when the program runs, and rows are shared among them however few there were when
# it was compiled. The last columns of a row, fewer than a vector holds, are rounded in another way where they are taken
# one by one: always so, and not where the compiler finds it worth while, so that all programs agree bit for bit.
_OPTIONS: dict[str, Any] = {"cpp.dynamic_threads": True, "cpp.enable_loop_tail_vec": False}


# Rows of more columns than this are summed by TorchInductor in another way: another program.
LONG_ROW = 4096

# Tokens, and classes of short and of long rows, that a program sees first; no two equal, or it took them for one.
_SAMPLE = (64, LONG_ROW - 1, 2 * LONG_ROW - 1)


class _Kind(NamedTuple):
    """What a program is made for, of one tensor; its sizes are not."""

    dtype: torch.dtype
    device: torch.device
    dim: int
    contiguous: bool
    inference: bool

    def sample(self, vocab: int) -> Tensor:
        with torch.inference_mode(self.inference):
            shape = (_SAMPLE[0], vocab + (not self.contiguous))[: self.dim]
            x = torch.zeros(shape, dtype=self.dtype, device=self.device)
            return x if self.contiguous else x[:, :-1]


def run(
    function: Callable[..., Any], x_TV: Tensor, *tensors: Tensor | None, vocab: int | None = None, static: Any = ()
) -> Any:
    """function(x, *tensors, vocab, *static), compiled: once for these dtypes and layouts, for all sizes above 1.

    Args:
        function: without keywords or closures; may write to its arguments.
        x_TV, tensors: contiguous, or matrices with rows that are.
        vocab: any number of classes; left out where it is None.
        static: numbers that each need a program of their own.
    """
    given = (x_TV, *tensors)
    kinds = tuple(None if x is None else _kind(x) for x in given)
    long = x_TV.shape[1] > LONG_ROW
    with torch.no_grad(), compat.outside_of_functorch(), compat.outside_of_dispatch_modes(), compat.outside_of_fx():
        program = _program(function, kinds, _SAMPLE[1 + long], static, torch.get_num_threads(), vocab is not None)
        sizes = () if vocab is None else (vocab,)
        return program(*(None if x is None else x.detach() for x in given), *sizes, *static)


def _kind(x: Tensor) -> _Kind:
    return _Kind(x.dtype, x.device, x.dim(), x.is_contiguous(), x.is_inference())


@cache
def _program(
    function: FunctionType,
    kinds: tuple[_Kind | None, ...],
    vocab: int,
    static: tuple[Any, ...],
    threads: int,
    sized: bool,
) -> Callable[..., Any]:
    """What torch.compile makes of a function for inputs of these kinds, with `threads` of PyTorch's.

    Compiled here, on a sample, and not for the caller's sizes: a result must not depend on which call came first.

    A copy of the function's code each: torch.compile keeps its programs at the code, and gives up after eight.
    """
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    # fullgraph: an error rather than uncompiled operations, which need memory for [T, V] temporaries.
    options = {**_OPTIONS, "guard_filter_fn": compat.guards_on_arguments}
    program: Callable[..., Any] = torch.compile(own, dynamic=True, fullgraph=True, options=options)
    sizes = (vocab,) if sized else ()
    program(*(None if kind is None else kind.sample(vocab) for kind in kinds), *sizes, *static)
    return program


def status() -> FlagStatus:
    """Whether TorchInductor finds what it compiles with; looks at files alone."""
    reason, install = _missing()
    version = "" if reason else f"torch {torch.__version__}, {_compiler()}"
    return FlagStatus(FLAG, not reason, reason and f"'{FLAG}' {reason}", version, install)


def _missing() -> tuple[str, str]:
    """What is missing here, and the command that installs it where there is one; empty if nothing is."""
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
    """The one that TorchInductor will take: $CXX, else the platform's (torch._inductor.config.cpp.cxx)."""
    usual = {"darwin": "clang++", "win32": "cl"}
    return os.environ.get("CXX") or usual.get(sys.platform, "g++")
