"""The ordinary call on a CPU, told apart cheaply: plain tensors, no mask, weights or count, every label a class.

A small call is all overhead. The checks of `checks` and the factors of `reduction` are some twenty operations on [T]
values; where one look at the labels shows that they would all come out at their simplest, they are left out. What is
computed is the same.

The smallest calls over logits go further: F.cross_entropy is the fewest operations there are for them.
"""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loss_core_torch.values import compute_dtype

# Up to this many logits F.cross_entropy is faster than the kernels in blocks of rows, whose calls from Python cost more
# than the passes over memory that they save. Measured on one core: at 64 x 1000 they take 2.8 times as long, at
# 16 x 32000 and 256 x 4000 0.85 and 0.69.
_SMALL = 1 << 19

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Tokens(NamedTuple):
    """labels_T int64, keep_T bool (all True), and coef_T, the factor of each token's loss in the result."""

    labels_T: Tensor
    keep_T: Tensor
    coef_T: Tensor


def labels_of(logits: Any, labels: Any, vocab: int, ignore_index: int, reduction: str) -> Tensor | None:
    """The labels [T] int64 of an ordinary call; None for any other call, valid or not, which `checks` is to look at.

    Args:
        logits: tensor whose leading dimensions labels must have.
        vocab: number of classes.
        reduction: "sum" or "mean"; anything else is no ordinary call here.
    """
    if (
        type(logits) not in (Tensor, torch.nn.Parameter)
        or type(labels) is not Tensor
        or logits.device.type != "cpu"
        or labels.device.type != "cpu"
        or logits.dtype not in _FLOATS
        or labels.dtype not in _INTEGERS
        or not labels.is_contiguous()
        or labels.shape != logits.shape[:-1]
        or labels.numel() == 0
        or reduction not in ("sum", "mean")
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
    ):
        return None
    low, high = torch.aminmax(labels)
    if int(low) < 0 or int(high) >= vocab:
        return None
    labels_T = labels.view(-1).to(torch.int64)
    if 0 <= ignore_index < vocab and bool((labels_T == ignore_index).any()):
        return None
    return labels_T


def tokens(labels_T: Tensor, dtype: torch.dtype, reduction: str, factor: float = 1.0) -> Tokens:
    """The tokens of an ordinary call.

    Args:
        labels_T: of `labels_of`.
        dtype: of the logits.
        factor: of every token's loss.
    """
    number = labels_T.shape[0]
    factor = factor / number if reduction == "mean" else factor
    coef_T = torch.full((number,), factor, dtype=compute_dtype(dtype))
    return Tokens(labels_T, torch.ones(number, dtype=torch.bool), coef_T)


def small_cross_entropy(logits: Tensor, labels_T: Tensor, reduction: str) -> Tensor | None:
    """The loss of a small ordinary call, by PyTorch's own operations; None for one that is not small.

    Only where the logits have the dtype of the arithmetic: others it would round in between.
    """
    if logits.numel() > _SMALL or logits.dtype != compute_dtype(logits.dtype):
        return None
    # No label is ignored here, whatever the number.
    return F.cross_entropy(logits.reshape(labels_T.shape[0], -1), labels_T, reduction=reduction, ignore_index=-1)


def same_kind(a: Any, b: Any) -> bool:
    """Whether the second tensor of a loss is as plain as the first, which `tokens` has looked at."""
    plain = (Tensor, torch.nn.Parameter)
    return type(a) in plain and type(b) in plain and a.dtype == b.dtype and a.device == b.device
