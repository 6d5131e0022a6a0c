"""From the loss of each token to the result: plain autograd on [T] values."""

# T = tokens (all leading dimensions of labels, flattened)

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from loss_core_torch.inputs import Tokens
from loss_core_torch.tracing import compute_dtype, may_read


def reduce_tokens(loss_T: Tensor, tokens: Tokens, reduction: str, groups: tuple[Any, ...] = ()) -> Tensor:
    """From the loss of each token (0 where ignored) to the result, in the dtype of the loss.

    Args:
        groups: process groups over which the tokens are sharded; their sums and numbers are added up.
    """
    if tokens.wrong_T is not None:
        # A product, so that the gradient is NaN as well.
        loss_T = loss_T * torch.ones_like(loss_T).masked_fill_(tokens.wrong_T, torch.nan)
    if reduction == "none":
        return loss_T.view(tokens.shape)
    if reduction == "mean":
        return _mean(loss_T, _number(tokens), groups)
    if tokens.weights_T is not None:
        weights_T, keep_T = tokens.weights_T.to(loss_T.dtype), tokens.keep_T
        # So that an ignored token's weight gets 0 even from an infinite upstream gradient.
        loss_T = loss_T * (weights_T if keep_T is None else weights_T.masked_fill(~keep_T, 1.0))
    total = loss_T.sum()
    if groups:
        total = _sum_over_ranks(total, groups)
    return total if tokens.num_tokens is None else total / _divisor(tokens.num_tokens, total)


def coefficients(tokens: Tokens, reduction: str, dtype: torch.dtype) -> Tensor:
    """Factor of each token's loss in the result, [T] in the dtype of the arithmetic for inputs of `dtype`.

    The counterpart of `reduce_tokens` for losses that make their sum, and its gradient, themselves.
    """
    keep_T, weights_T, compute = tokens.keep_T, tokens.weights_T, compute_dtype(dtype)
    if weights_T is not None:
        # Not a product with 0: an ignored token's weight may be infinite.
        coef_T = zero_where_ignored(weights_T.to(compute), keep_T)
    elif keep_T is not None:
        coef_T = keep_T.to(compute)
    else:
        coef_T = torch.ones_like(tokens.labels_T, dtype=compute)
    if tokens.wrong_T is not None:
        coef_T = coef_T.masked_fill(tokens.wrong_T, torch.nan)
    if reduction == "mean":
        number = _number(tokens)
        return coef_T / (number.clamp(min=1) if isinstance(number, Tensor) else max(number, 1))
    return coef_T if tokens.num_tokens is None else coef_T / _divisor(tokens.num_tokens, coef_T)


def weighted_sum(coef_T: Tensor, loss_T: Tensor) -> Tensor:
    """Sum of coef * loss; a coefficient of 0 takes a token out, even one whose loss is infinite."""
    weighted_T = coef_T * loss_T
    if may_read(loss_T) and math.isfinite(total := weighted_T.sum()):
        return total
    return weighted_T.masked_fill_(coef_T == 0, 0.0).sum()


def zero_where_ignored(loss_T: Tensor, keep_T: Tensor | None) -> Tensor:
    """The loss of each token, 0 for ignored ones."""
    return loss_T if keep_T is None else loss_T.masked_fill(~keep_T, 0.0)


def number_of_valid(tokens: Tokens, groups: tuple[Any, ...] = ()) -> Tensor:
    """How many tokens count, int64, a scalar; over all ranks of groups over which they are sharded."""
    number = torch.as_tensor(_number(tokens), device=tokens.labels_T.device)
    # In float64, in which the number of tokens is exact.
    return _sum_over_ranks(number.double(), groups).long() if groups else number


def _number(tokens: Tokens) -> Tensor | int:
    """How many tokens count."""
    return tokens.labels_T.numel() if tokens.keep_T is None else tokens.keep_T.sum()


def _mean(loss_T: Tensor, number: Tensor | int, groups: tuple[Any, ...]) -> Tensor:
    if isinstance(number, int) and not groups:
        return loss_T.mean() if number else loss_T.sum()
    total = loss_T.sum()
    number = torch.as_tensor(number, device=total.device)
    if groups:
        # In float64, in which the number of tokens is exact.
        sums = _sum_over_ranks(torch.stack([total.double(), number.double()]), groups)
        total, number = sums[0].to(total.dtype), sums[1].to(total.dtype)
    return total / number.clamp(min=1)


def _sum_over_ranks(part: Tensor, groups: tuple[Any, ...]) -> Tensor:
    from loss_core_torch.parallel.collectives import SumOverRanks

    total: Tensor = SumOverRanks.apply(part, groups)
    return total


def _divisor(num_tokens: Any, like: Tensor) -> Any:
    """The count, with 0 replaced by 1 (no token counts then); a tensor in the dtype of the arithmetic."""
    if not isinstance(num_tokens, Tensor):
        return num_tokens or 1
    count = num_tokens.to(like.dtype)
    # A count that is negative or NaN was an error where it could be read.
    return count.masked_fill(count == 0, 1.0).masked_fill(~(count >= 0), torch.nan)
