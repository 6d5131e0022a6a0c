"""Checks of the arguments of losses: shapes, dtypes, labels, masks, counts. Nothing here changes an input."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary

from __future__ import annotations

import numbers
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from loss_core_torch.tracing import as_normal_tensor, is_readable


class Tokens(NamedTuple):
    """The checked per-token arguments of a call.

    Attributes:
        shape: of labels.
        labels_T: int64.
        keep_T: bool, which tokens are valid; None where all are known to be.
        num_tokens: divisor of the sum, a number or a 0-d tensor, or None.
        weights_T: factor of each token's loss, or None.
        inverse_temperature_T: factor of each token's logits, in the dtype of the arithmetic, or None.
        teacher: of K classes per token, or None.
        nan_T: bool, tokens whose result is NaN: their arguments are invalid on a device where no error can be raised
            without a sync. None: there are none.
    """

    shape: torch.Size
    labels_T: Tensor
    keep_T: Tensor | None
    num_tokens: Any = None
    weights_T: Tensor | None = None
    inverse_temperature_T: Tensor | None = None
    teacher: Teacher | None = None
    nan_T: Tensor | None = None


class Teacher(NamedTuple):
    """A teacher's K classes per token.

    Attributes:
        index_TK: the classes, int64.
        log_p_TK: their log-probabilities, in the caller's dtype.
    """

    index_TK: Tensor
    log_p_TK: Tensor


def tensor(name: str, value: Any) -> Tensor:
    """The value as a plain, normal tensor; TypeError for anything else."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}.")
    if hasattr(value, "full_tensor"):
        raise TypeError(
            f"{name} is a DTensor, but what it belongs to is a plain tensor. Pass {name}.to_local(), or DTensors alone."
        )
    return as_normal_tensor(value)


def tokens(
    of: str,
    shape: torch.Size,
    device: torch.device,
    reduction: str,
    ignore_index: int,
    labels: Any,
    mask: Any = None,
    count_name: str = "num_label_tokens",
    num_tokens: Any = None,
    loss_weights: Any = None,
    vocab: int | None = None,
) -> Tokens:
    """The arguments with one value per token, checked against the leading shape of the tensor named `of`.

    Args:
        vocab: number of classes, where it is known yet: readable labels that are all classes then need no mask.
    """
    num_tokens = count(count_name, num_tokens, reduction, device)
    weights_T = weights(loss_weights, shape, reduction, device)
    labels_T = labels_like(labels, shape, of, device)
    if mask is None and vocab is not None and _all_in_range(labels_T, vocab) and not 0 <= ignore_index < vocab:
        return Tokens(shape, labels_T, None, num_tokens, weights_T)
    return Tokens(shape, labels_T, valid_mask(labels_T, shape, ignore_index, mask), num_tokens, weights_T)


def distillation_tokens(
    of: str, shape: torch.Size, device: torch.device, ignore_index: int, labels: Any, count: Any, loss_weights: Any
) -> Tokens:
    """As `tokens`, with num_batch_labels, for labels that only mark ignored tokens: any other value is valid."""
    check_weights_have_count(loss_weights, count)
    return tokens(of, shape, device, "sum", ignore_index, labels, None, "num_batch_labels", count, loss_weights)


def floats(name: str, value: Any) -> Tensor:
    """A floating-point tensor with at least one dimension."""
    value = tensor(name, value)
    if value.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}.")
    if value.dim() == 0:
        raise ValueError(f"{name} must have at least one dimension, got a 0-d tensor.")
    return value


def not_empty(name: str, what: str, value: Tensor, dim: int = -1) -> None:
    """Refuse a tensor whose dimension `dim`, named `what`, is empty."""
    if value.shape[dim] == 0:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: the {what} must not be empty.")


def labels_like(labels: Any, lead: torch.Size, of: str, device: torch.device) -> Tensor:
    """labels as int64 of shape [T] on the device, contiguous.

    Args:
        lead: shape that labels must have, the leading shape of the tensor named `of`.
    """
    labels = tensor("labels", labels)
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers of any width, got {labels.dtype}.")
    if labels.shape != lead:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} but {of} has leading shape {tuple(lead)}; they must match "
            f"({of}.shape[:-1] == labels.shape)."
        )
    # Kernels read labels at stride 1: reshape(-1) alone keeps the stride of a column of a matrix.
    return labels.detach().to(device=device, dtype=torch.int64).reshape(-1).contiguous()


def valid_mask(labels_T: Tensor, shape: torch.Size, ignore_index: int, mask: Any = None) -> Tensor:
    """Which tokens are valid, [T] bool: the label is not ignore_index, and mask is not 0 there."""
    keep_T = labels_T != ignore_index
    if mask is None:
        return keep_T
    mask = tensor("mask", mask)
    if mask.dtype.is_complex:
        raise TypeError(f"mask must be bool, integer or float, got {mask.dtype}.")
    mask = mask.detach().to(labels_T.device) != 0
    if mask.shape != shape:
        try:
            mask = mask.broadcast_to(shape)
        except RuntimeError as error:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)} but labels has shape {tuple(shape)}; "
                "mask.shape == labels.shape must hold, or mask must broadcast to it."
            ) from error
    return keep_T & mask.reshape(-1)


def resolve_keep(tokens: Tokens) -> Tokens:
    """The tokens with keep_T all False where the count is 0, and None where it is readable and all True."""
    keep_T, count = tokens.keep_T, tokens.num_tokens
    if keep_T is None:
        if count is None:
            return tokens
        keep_T = torch.ones_like(tokens.labels_T, dtype=torch.bool)
    if isinstance(count, Tensor):
        # A count of 0 over all ranks means that no token of this rank is valid either.
        keep_T = keep_T & (count != 0)
    elif count == 0:
        keep_T = torch.zeros_like(keep_T)
    return tokens._replace(keep_T=None if is_readable(keep_T) and bool(keep_T.all()) else keep_T)


def equally_weighted(tokens: Tokens) -> bool:
    """Whether the result is the plain sum or mean: at least one token, no mask, weights, count or NaN tokens."""
    options = (tokens.keep_T, tokens.num_tokens, tokens.weights_T, tokens.nan_T)
    return tokens.labels_T.numel() > 0 and all(x is None for x in options)


def in_range(tokens: Tokens, vocab: int, ignore_index: int) -> Tokens:
    """The tokens after checking that the label of each valid one is a class.

    Raises:
        ValueError: a label is not, where labels are readable; elsewhere its token is marked in nan_T.
    """
    labels_T, keep_T = tokens.labels_T, tokens.keep_T
    if keep_T is None or _all_in_range(labels_T, vocab):
        return tokens
    bad_T = keep_T & (labels_T.clamp(0, vocab - 1) != labels_T)
    if not is_readable(labels_T):
        return mark_nan(tokens, bad_T)
    if not bool(bad_T.any()):
        return tokens
    first, shape = int(bad_T.nonzero()[0, 0]), tokens.shape
    at = torch.unravel_index(torch.tensor(first, device=labels_T.device), shape) if shape else ()
    raise ValueError(
        f"labels{[int(i) for i in at]} is {int(labels_T[first])}, which is neither a class in [0, {vocab}) nor "
        f"ignore_index ({ignore_index})."
    )


def _all_in_range(labels_T: Tensor, vocab: int) -> bool:
    """Whether labels are readable and all of them are classes; False for no labels."""
    if not is_readable(labels_T) or not labels_T.numel():
        return False
    low, high = torch.aminmax(labels_T)
    return int(low) >= 0 and int(high) < vocab


def mark_nan(tokens: Tokens, nan_T: Tensor) -> Tokens:
    """The tokens with those of a bool tensor [T] added to nan_T."""
    return tokens._replace(nan_T=nan_T if tokens.nan_T is None else tokens.nan_T | nan_T)


def count(name: str, value: Any, reduction: str, device: torch.device) -> Any:
    """A token count: None, a number, or a 0-d tensor on the device."""
    if value is None:
        return None
    if reduction != "sum":
        raise ValueError(f"{name} is only supported when reduction is 'sum', got reduction={reduction!r}.")
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.dtype == torch.bool or value.dtype.is_complex:
            raise ValueError(
                f"{name} must be a number or a 0-d tensor, got a tensor of shape {tuple(value.shape)}, {value.dtype}."
            )
        value = as_normal_tensor(value.detach()).to(device)
        if is_readable(value) and not float(value) >= 0:
            raise ValueError(f"{name} must be >= 0, got {float(value):g}.")
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number or a 0-d tensor, got {type(value).__name__}.")
    if not float(value) >= 0:
        raise ValueError(f"{name} must be >= 0, got {value}.")
    return value


def check_num_valid(tokens: Tokens, value: Any, skip_ignored: bool | None) -> Tokens:
    """The tokens after comparing the number of valid ones with the caller's num_valid_tokens.

    Raises:
        ValueError: they differ, where values are readable; elsewhere every token is marked in nan_T.
    """
    if value is None:
        return tokens
    keep_T = tokens.keep_T
    keep_T = torch.ones_like(tokens.labels_T, dtype=torch.bool) if keep_T is None else keep_T
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"num_valid_tokens must be a Python integer, got {type(value).__name__}: it gives arrays their shape, so "
            "it must be known on the host. int(tensor) waits for the device; skip_ignored=True does that by itself."
        )
    num_valid = cast(int, value)
    if skip_ignored is False:
        raise ValueError(
            f"num_valid_tokens={num_valid} is for leaving the other tokens out of the products, which "
            "skip_ignored=False forbids; use skip_ignored=None or True, or leave the number out."
        )
    if not 0 <= num_valid <= keep_T.numel():
        raise ValueError(f"num_valid_tokens must be in [0, {keep_T.numel()}], the number of tokens, got {num_valid}.")
    if not is_readable(keep_T):
        return mark_nan(tokens, (keep_T.sum() != num_valid).expand(keep_T.shape))
    found = int(keep_T.sum())
    if found != num_valid:
        raise ValueError(
            f"num_valid_tokens is {num_valid}, but {found} of the {keep_T.numel()} labels are not ignore_index; it "
            "must be their number in this very call, on this rank."
        )
    return tokens


def check_weights_have_count(loss_weights: Any, num_batch_labels: Any) -> None:
    """Refuse weights of a distillation without the count that divides their sum."""
    if loss_weights is not None and num_batch_labels is None:
        raise ValueError(
            "loss_weights is only supported with num_batch_labels, without which the loss is a mean over the "
            "valid tokens; pass the number by which the weighted sum is to be divided."
        )


def weights(value: Any, shape: torch.Size, reduction: str, device: torch.device) -> Tensor | None:
    """loss_weights as [T] on the device, or None."""
    if value is None:
        return None
    value = tensor("loss_weights", value)
    if reduction != "sum":
        raise ValueError(f"loss_weights is only supported when reduction is 'sum', got reduction={reduction!r}.")
    if value.shape != shape:
        raise ValueError(
            f"loss_weights has shape {tuple(value.shape)} but labels has shape {tuple(shape)}; they must match."
        )
    if value.dtype == torch.bool or value.dtype.is_complex:
        raise TypeError(f"loss_weights must be numbers, got {value.dtype}.")
    return value.to(device).reshape(-1)
