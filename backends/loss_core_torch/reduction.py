"""Reduction of token losses [T] to the result of a loss, in operations that autograd differentiates."""

# T = tokens (all leading dimensions of labels, flattened)

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from loss_core_torch.inputs import Tokens
from loss_core_torch.tracing import compute_dtype, is_readable


def reduce_tokens(loss_T: Tensor, tokens: Tokens, reduction: str, groups: tuple[Any, ...] = ()) -> Tensor:
    """The reduced loss from that of each token (0 where ignored), in the dtype of the loss.

    Args:
        groups: process groups over which the tokens are sharded; sums and counts are added up over their ranks.
    """
    if tokens.nan_T is not None:
        # A product makes the gradient NaN as well.
        loss_T = loss_T * torch.ones_like(loss_T).masked_fill_(tokens.nan_T, torch.nan)
    if reduction == "none":
        return loss_T.view(tokens.shape)
    if reduction == "mean":
        return _mean(loss_T, _num_valid(tokens), groups)
    if tokens.weights_T is not None:
        weights_T, keep_T = tokens.weights_T.to(loss_T.dtype), tokens.keep_T
        # The gradient of an ignored token's weight is then 0 even for an infinite upstream gradient.
        loss_T = loss_T * (weights_T if keep_T is None else weights_T.masked_fill(~keep_T, 1.0))
    total = loss_T.sum()
    if groups:
        total = _sum_over_ranks(total, groups)
    return total if tokens.num_tokens is None else total / _divisor(tokens.num_tokens, total)


def coefficients(tokens: Tokens, reduction: str, dtype: torch.dtype) -> Tensor:
    """Factor of each token's loss in the result, [T] in the dtype of the arithmetic for inputs of `dtype`.

    The counterpart of `reduce_tokens` for losses that compute the reduced loss and its gradient together.
    """
    keep_T, weights_T, compute = tokens.keep_T, tokens.weights_T, compute_dtype(dtype)
    if weights_T is not None:
        # Not a product with 0: the weight of an ignored token may be infinite.
        coef_T = zero_where_ignored(weights_T.to(compute), keep_T)
    elif keep_T is not None:
        coef_T = keep_T.to(compute)
    else:
        coef_T = torch.ones_like(tokens.labels_T, dtype=compute)
    if tokens.nan_T is not None:
        coef_T = coef_T.masked_fill(tokens.nan_T, torch.nan)
    if reduction == "mean":
        count = _num_valid(tokens)
        return coef_T / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))
    return coef_T if tokens.num_tokens is None else coef_T / _divisor(tokens.num_tokens, coef_T)


def weighted_sum(coef_T: Tensor, loss_T: Tensor) -> Tensor:
    """Sum of coef * loss; a coefficient of 0 excludes a token, even one whose loss is infinite."""
    weighted_T = coef_T * loss_T
    if is_readable(loss_T) and math.isfinite(total := weighted_T.sum()):
        return total
    return weighted_T.masked_fill_(coef_T == 0, 0.0).sum()


def zero_where_ignored(loss_T: Tensor, keep_T: Tensor | None) -> Tensor:
    """The loss of each token, 0 for ignored ones."""
    return loss_T if keep_T is None else loss_T.masked_fill(~keep_T, 0.0)


def count_valid(tokens: Tokens, groups: tuple[Any, ...] = ()) -> Tensor:
    """Number of valid tokens, a scalar int64; over all ranks of the groups over which the tokens are sharded."""
    count = torch.as_tensor(_num_valid(tokens), device=tokens.labels_T.device)
    # float64 represents every count exactly.
    return _sum_over_ranks(count.double(), groups).long() if groups else count


def _num_valid(tokens: Tokens) -> Tensor | int:
    """Number of valid tokens of this rank."""
    return tokens.labels_T.numel() if tokens.keep_T is None else tokens.keep_T.sum()


def _mean(loss_T: Tensor, count: Tensor | int, groups: tuple[Any, ...]) -> Tensor:
    if isinstance(count, int) and not groups:
        return loss_T.mean() if count else loss_T.sum()
    total = loss_T.sum()
    count = torch.as_tensor(count, device=total.device)
    if groups:
        # float64 represents every count exactly.
        sums = _sum_over_ranks(torch.stack([total.double(), count.double()]), groups)
        total, count = sums[0].to(total.dtype), sums[1].to(total.dtype)
    return total / count.clamp(min=1)


def _sum_over_ranks(part: Tensor, groups: tuple[Any, ...]) -> Tensor:
    from loss_core_torch.parallel.collectives import SumOverRanks

    total: Tensor = SumOverRanks.apply(part, groups)
    return total


def _divisor(num_tokens: Any, like: Tensor) -> Any:
    """The count, with 0 replaced by 1 (no token is valid then); a tensor is cast to the dtype of `like`."""
    if not isinstance(num_tokens, Tensor):
        return num_tokens or 1
    count = num_tokens.to(like.dtype)
    # A readable count that is negative or NaN has been refused already.
    return count.masked_fill(count == 0, 1.0).masked_fill(~(count >= 0), torch.nan)
