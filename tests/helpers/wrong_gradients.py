"""Functions with wrong gradients, for tests of the tools that detect them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def with_gradient(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """x, with the gradient function(upstream) instead of upstream."""

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return function(grad.clone())

    return Identity.apply(x)
