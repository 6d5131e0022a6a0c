"""Kernels that torch.compile calls as they are, instead of tracing into their loops.

A kernel here is a plain function on tensors. Called eagerly it is just that; under torch.compile the
same function runs as a custom operator, so that block loops are neither unrolled nor re-optimised and
the number of blocks may depend on the data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def opaque(fake: Callable[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: make a kernel a custom operator for torch.compile.

    Args:
        fake: same arguments; returns empty tensors of the right shape, dtype and device.
    """

    def wrap(kernel: Callable[P, R]) -> Callable[P, R]:
        # Two sets of kernels have functions of the same names.
        name = f"{kernel.__module__.rpartition('.')[2]}_{kernel.__name__}"
        operator: Any = torch.library.custom_op(f"loss_core::{name}", kernel, mutates_args=())
        operator.register_fake(fake)

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                return operator(*args, **kwargs)
            return kernel(*args, **kwargs)

        call.__name__ = kernel.__name__
        call.__doc__ = kernel.__doc__
        return call

    return wrap


def untraced(kernel: Callable[P, R]) -> Callable[P, R]:
    """Decorator for a kernel that is called outside of graphs alone.

    Where a graph breaks, torch.compile goes on to compile each function that is called from there; not this one.
    """
    call: Callable[P, R] = torch.compiler.disable(kernel)
    return call
