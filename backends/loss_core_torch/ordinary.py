"""The ordinary call on a CPU, told apart cheaply: plain tensors, no mask, weights or count, every label a class.

A small call is all overhead. The checks of `checks` and the factors of `reduction` are some twenty operations on [T]
values; where one look at the labels shows that they would all come out at their simplest, they are left out. What is
computed is the same.
"""

# T = tokens (all leading dimensions of labels, flattened)

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from loss_core_torch.values import compute_dtype

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Tokens(NamedTuple):
    """labels_T int64, keep_T bool (all True), and coef_T, the factor of each token's loss in the result."""

    labels_T: Tensor
    keep_T: Tensor
    coef_T: Tensor


def tokens(
    logits: Any, labels: Any, vocab: int, ignore_index: int, reduction: str, factor: float = 1.0
) -> Tokens | None:
    """The tokens of an ordinary call; None for any other call, valid or not, which `checks` is to look at.

    Args:
        logits: tensor whose leading dimensions labels must have.
        vocab: number of classes.
        reduction: "sum" or "mean"; anything else is no ordinary call here.
        factor: of every token's loss.
    """
    if (
        type(logits) not in (Tensor, torch.nn.Parameter)
        or type(labels) is not Tensor
        or logits.device.type != "cpu"
        or labels.device.type != "cpu"
        or logits.dtype not in _FLOATS
        or labels.dtype != torch.int64
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
    labels_T = labels.view(-1)
    if 0 <= ignore_index < vocab and bool((labels_T == ignore_index).any()):
        return None
    number = labels_T.shape[0]
    factor = factor / number if reduction == "mean" else factor
    coef_T = torch.full((number,), factor, dtype=compute_dtype(logits.dtype))
    return Tokens(labels_T, torch.ones(number, dtype=torch.bool), coef_T)


def same_kind(a: Any, b: Any) -> bool:
    """Whether the second tensor of a loss is as plain as the first, which `tokens` has looked at."""
    return type(b) in (Tensor, torch.nn.Parameter) and a.dtype == b.dtype and a.device == b.device
