"""Gradients that are not those of the function they seem to be of, for tests of what finds them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def with_gradient(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """x, whose gradient is `function` of the right one."""

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return function(grad.clone())

    return Identity.apply(x)
