"""An error for second derivatives of kernels that have none, naming the flag to use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

SECOND_DERIVATIVE = (
    "This kernel of loss_core has no second derivative. Build the loss with backend='torch:plain' where gradients of "
    "gradients are needed."
)


class _RefuseSecondDerivative(Function):
    """Identity whose backward raises, applied to gradients that are not differentiable."""

    @staticmethod
    def forward(grad: Tensor, *sources: Tensor | None) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(SECOND_DERIVATIVE)


def once_differentiable(grad: Tensor | None, *sources: Tensor | None) -> Tensor | None:
    """The gradient, whose own backward raises (create_graph=True).

    Args:
        sources: tensors of which the gradient is a function.
    """
    # In a traced backward the custom operators raise.
    if grad is None or torch.compiler.is_dynamo_compiling() or not torch.is_grad_enabled():
        return grad
    return _RefuseSecondDerivative.apply(grad, *sources)
