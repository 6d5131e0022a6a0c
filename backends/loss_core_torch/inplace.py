"""`inplace_grad=True`: the backward writes the gradient over the caller's logits. When it may, and who is told.

Until that backward the logits hold their values, so whoever reads them in between reads what he expects. After it
they hold the gradient: their version counter has moved, by which autograd refuses the backward of every other
operation that kept them, and this loss refuses a second backward of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def applies(logits: Tensor) -> bool:
    """Whether a gradient will be made at all; without one nothing is overwritten, as in evaluation."""
    return torch.is_grad_enabled() and logits.requires_grad


def check(logits: Tensor) -> None:
    """Refuse logits that PyTorch would not let an in-place operation write to, for its reasons.

    Raises:
        RuntimeError: a leaf that requires a gradient, or a view of one (its values are the caller's to keep); memory
            in which two elements may share a place; a call that is traced.
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
    """Whether two elements may share memory; True as well for strides that interleave, which no one writes by hand."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return x.numel() > 0
            reach += stride * (size - 1)
    return False


def claim(ctx: Any) -> None:
    """Called first in a backward that overwrites: the first call passes, a second is an error."""
    if getattr(ctx, "overwritten", False):
        raise RuntimeError(
            "Second backward through a loss with inplace_grad=True: the first one has written the gradient over the "
            "logits, whose values are gone. Compute logits and loss again, or build the loss with inplace_grad=False."
        )


def overwritten(ctx: Any, logits: Tensor) -> Tensor:
    """Tell autograd and `claim` that the logits now hold the gradient; returns it, in the same memory."""
    ctx.overwritten = True
    torch.autograd.graph.increment_version(logits)
    return logits.detach()
