"""`inplace_grad=True`: the backward writes the gradient over the caller's logits.

The logits keep their values until that backward. It increments their version counter, so that autograd refuses the
backward of every other operation that saved them; this loss refuses a second backward of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def applies(logits: Tensor) -> bool:
    """Whether the logits will have a gradient; without one, as in evaluation, nothing is overwritten."""
    return torch.is_grad_enabled() and logits.requires_grad


def check(logits: Tensor) -> None:
    """Refuse logits to which PyTorch forbids an in-place operation.

    Raises:
        RuntimeError: a leaf that requires a gradient, or a view of one, whose values the caller needs; two elements
            that may share memory; a DTensor; a traced call.
    """
    if torch.compiler.is_dynamo_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(logits):
        raise RuntimeError(
            "inplace_grad=True does not work inside a traced call (torch.compile with fullgraph=True, torch.func): "
            "what is traced has no memory to write over. Build the loss with inplace_grad=False there; the compiler "
            "reuses buffers by itself."
        )
    if hasattr(logits, "full_tensor"):
        raise RuntimeError(
            "inplace_grad=True does not work on a DTensor: its memory belongs to the local tensor, which other holders "
            "read without seeing the version counter. Pass logits.to_local() with tp_group, or inplace_grad=False."
        )
    base = logits._base if logits._is_view() else logits
    if base is not None and base.is_leaf and base.requires_grad:
        what = "logits is" if base is logits else "logits is a view of"
        raise RuntimeError(
            f"inplace_grad=True would overwrite values that the caller keeps: {what} a leaf tensor that requires a "
            "gradient, and PyTorch forbids an in-place operation on one. Pass the output of an operation (the model's "
            "head), or build the loss with inplace_grad=False."
        )
    if _may_overlap(logits):
        raise RuntimeError(
            f"inplace_grad=True needs logits whose elements each have a place of their own in memory, got shape "
            f"{tuple(logits.shape)} with strides {logits.stride()}. Pass logits.contiguous(), or build the loss with "
            "inplace_grad=False."
        )


def _may_overlap(x: Tensor) -> bool:
    """Whether two elements may share memory; True also for interleaved strides without overlap, which are rare."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return x.numel() > 0
            reach += stride * (size - 1)
    return False


def check_not_overwritten(ctx: Any) -> None:
    """Raise in a second backward, after the first has overwritten the logits."""
    if getattr(ctx, "overwritten", False):
        raise RuntimeError(
            "Second backward through a loss with inplace_grad=True: the first one has written the gradient over the "
            "logits, whose values are gone. Compute logits and loss again, or build the loss with inplace_grad=False."
        )


def mark_overwritten(ctx: Any, logits: Tensor) -> Tensor:
    """Mark the logits as overwritten by their gradient; returns the gradient, in the same memory."""
    ctx.overwritten = True
    torch.autograd.graph.increment_version(logits)
    return logits.detach()
