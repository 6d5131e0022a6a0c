"""What the autograd functions share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from loss_core_torch import compat
from loss_core_torch.kernels import NEW, Into
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


def taken(ctx: Any, made: Sequence[Tensor], upstream: Tensor) -> tuple[Tensor | None, Into]:
    """(the gradient, where it is known; else where it is to go) of a backward that may have been made in the forward.

    What was made is right for an upstream gradient of 1, which the host can see on a CPU; elsewhere a kernel looks. It
    is handed on in its own memory, once.
    """
    if not made or ctx.spent:
        return None, NEW
    ctx.spent = True
    # `data`: the saved tensor's version must stay, for a second backward to get at the others.
    gradient = made[0].data
    if may_read(upstream) and float(upstream.detach()) == 1.0:
        return gradient, NEW
    return None, Into(gradient, upstream)
