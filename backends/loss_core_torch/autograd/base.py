"""What the autograd functions share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from loss_core.row_terms import Coefficients, Objective, RowTerms
from loss_core_torch import compat, operators
from loss_core_torch.kernels import KernelSet, Rows
from loss_core_torch.tracing import may_read


class LossFunction(Function):
    """A loss whose last input is the call, and whose outputs after the first are what waits for the backward."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.call = inputs
        ctx.mark_non_differentiable(*output[1:])
        # Else autograd makes zeros of their size for the outputs that have no gradient.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.spent = False


def check_upstream(upstream: Tensor) -> None:
    """Refuse a batch of upstream gradients.

    Raises:
        RuntimeError: the backward runs under torch.func.vmap (is_grads_batched, jacrev).
    """
    if torch.compiler.is_dynamo_compiling():
        return
    if compat.is_batched(upstream) or "Vmap" in compat.functorch_transforms():
        raise RuntimeError(
            "This kernel of loss_core has no batching rule for its backward (torch.func.vmap, jacrev, "
            "is_grads_batched=True). Build the loss with backend='torch:plain' there."
        )


def taken(ctx: Any, made: Tensor, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(the gradient, where it is known; else its memory, where it is free), from the gradient for an upstream of 1.

    Whether the upstream gradient is 1, the host can see on a CPU; elsewhere a kernel looks. What was made is handed on
    in its own memory, once.
    """
    if ctx.spent:
        return None, None
    ctx.spent = True
    # `data`: the saved tensor's version must stay, for a second backward to get at the others.
    gradient = made.data
    return (gradient, None) if may_read(upstream) and float(upstream.detach()) == 1.0 else (None, gradient)


def made_with_terms(
    kernels: KernelSet, rows: Rows, coef_T: Tensor, objective: Objective
) -> tuple[RowTerms, list[Tensor]]:
    """Terms, and what `gradient_of_sum` takes: the gradient of the sum of coef * loss, and its coefficients."""
    terms, grad, coefficients = operators.row_terms_and_grad(kernels, rows, coef_T, objective)
    return terms, [grad, *(c_T for c_T in coefficients if c_T is not None)]


def gradient_of_sum(
    ctx: Any, kernels: KernelSet, rows: Rows, terms: RowTerms, made: Sequence[Tensor], upstream: Tensor
) -> Tensor:
    """Gradient of a sum by the logits, from what the forward has made."""
    grad, out = taken(ctx, made[0], upstream)
    if grad is None:
        grad = operators.row_grad(kernels, rows, terms, Coefficients(*made[1:]), upstream, out=out)
    return grad
