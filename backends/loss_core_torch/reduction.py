"""From the loss of each token to the result: plain autograd on [T] values."""

# T = tokens (all leading dimensions of labels, flattened)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loss_core_torch import distributed
from loss_core_torch.values import compute_dtype


def reduce_tokens(
    loss_T: Tensor,
    keep_T: Tensor,
    shape: torch.Size,
    reduction: str,
    num_tokens: Any = None,
    weights_T: Tensor | None = None,
    groups: tuple[Any, ...] = (),
) -> Tensor:
    """From the loss of each token (0 where ignored) to the result.

    Args:
        groups: process groups over which the tokens are sharded; their sums and numbers are added up.
    """
    if reduction == "none":
        return loss_T.view(shape)
    if reduction == "mean":
        total, number = loss_T.sum(), keep_T.sum()
        if groups:
            # In float64, in which the number of tokens is exact.
            sums = distributed.SumOverRanks.apply(torch.stack([total.double(), number.double()]), groups)
            total, number = sums[0].to(total.dtype), sums[1].to(total.dtype)
        return total / number.clamp(min=1)
    if weights_T is not None:
        loss_T = loss_T * weights_T.to(loss_T.dtype)
    total = loss_T.sum()
    if groups:
        total = distributed.SumOverRanks.apply(total, groups)
    if num_tokens is None:
        return total
    return total / divisor(num_tokens)


def divisor(num_tokens: Any) -> Any:
    """The count, with 0 replaced by 1; where it is 0 no token counts (`keep_if_counted`), so the loss is 0."""
    if isinstance(num_tokens, Tensor):
        return torch.where(num_tokens == 0, 1, num_tokens)
    return num_tokens or 1


def keep_if_counted(keep_T: Tensor, num_tokens: Any) -> Tensor:
    """A count of 0 means that no token counts anywhere: then none does here."""
    if num_tokens is None:
        return keep_T
    if isinstance(num_tokens, Tensor):
        return keep_T & (num_tokens != 0)
    return keep_T if num_tokens else torch.zeros_like(keep_T)


def nan_where(values_T: Tensor, bad_T: Tensor | None) -> Tensor:
    """A label that is no class makes its token NaN, never a finite number."""
    return values_T if bad_T is None else values_T.masked_fill(bad_T, torch.nan)


def coefficients(
    dtype: torch.dtype,
    keep_T: Tensor,
    bad_T: Tensor | None,
    reduction: str,
    num_tokens: Any,
    weights_T: Tensor | None,
) -> Tensor:
    """Factor of each token's loss in the result, [T] in the dtype of the arithmetic for inputs of `dtype`."""
    ones_T = torch.ones_like(keep_T, dtype=compute_dtype(dtype))
    weighted_T = ones_T if weights_T is None else weights_T.to(ones_T.dtype)
    coef_T = torch.where(keep_T, nan_where(weighted_T, bad_T), 0.0)
    if reduction == "mean":
        return coef_T / keep_T.sum().clamp(min=1)
    return coef_T if num_tokens is None else coef_T / divisor(num_tokens)
