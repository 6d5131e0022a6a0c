"""Checks of a teacher's K classes and log-probabilities per token. Nothing here changes an input."""

# T = tokens (all leading dimensions of labels, flattened), K = classes of the teacher, V = vocabulary

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loss_core_torch import inputs
from loss_core_torch.inputs import Teacher, Tokens
from loss_core_torch.tracing import compute_dtype, is_readable

# A log-probability is z - lse, each rounded: for logits up to 2^10 in float32 it is off by 2^-24 * 2^11.
_SUM_TOLERANCE = 2.0**-13


def checked(indices: Any, logprobs: Any, of: str, lead: torch.Size, device: torch.device) -> Teacher:
    """Indices and log-probabilities as [T, K] on the device, after checks of shapes and dtypes.

    Args:
        of: name of the tensor whose leading shape is `lead`.
    Raises:
        TypeError: indices that are no integers, log-probabilities that are no floats.
        ValueError: shapes that do not fit, K = 0.
    """
    indices, logprobs = inputs.tensor("teacher_indices", indices), inputs.floats("teacher_logprobs", logprobs)
    if indices.dtype.is_floating_point or indices.dtype.is_complex or indices.dtype == torch.bool:
        raise TypeError(f"teacher_indices must be integers of any width, got {indices.dtype}.")
    for name, value in (("teacher_indices", indices), ("teacher_logprobs", logprobs)):
        if value.shape[:-1] != lead or not value.dim():
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} but {of} has leading shape {tuple(lead)}; {name} must be "
                f"[*{tuple(lead)}, K]."
            )
    if indices.shape != logprobs.shape:
        raise ValueError(
            f"teacher_indices has shape {tuple(indices.shape)} but teacher_logprobs has shape "
            f"{tuple(logprobs.shape)}; they must match."
        )
    inputs.not_empty("teacher_indices", "number of classes (last dimension)", indices)
    count = indices.shape[-1]
    index_TK = indices.detach().to(device=device, dtype=torch.int64).reshape(-1, count)
    return Teacher(index_TK, logprobs.to(device).reshape(-1, count))


def in_order(tokens: Tokens, vocab: int) -> Tokens:
    """The tokens with a teacher whose classes ascend, after checking that it is a distribution.

    Args:
        vocab: number of classes, of all ranks.
    Raises:
        ValueError: K > vocab; or, where values are readable, in a valid token: an index that is no class, or is
            repeated; a log-probability that is NaN or above 0; probabilities whose sum is above 1 by more than
            rounding. Elsewhere such a token is marked in nan_T.
    """
    teacher, keep_T = tokens.teacher, tokens.keep_T
    assert teacher is not None
    index_TK, log_p_TK = teacher
    count = index_TK.shape[1]
    if count > vocab:
        raise ValueError(f"teacher_indices has {count} classes per token, but there are {vocab}; K must be in [1, V].")
    if keep_T is not None:
        # The teacher of an ignored token is not used; its classes need only be distinct.
        index_TK = torch.where(keep_T[:, None], index_TK, torch.ones_like(index_TK).cumsum(-1) - 1)
        log_p_TK = log_p_TK.masked_fill(~keep_T[:, None], 0.0)
    index_TK, order_TK = index_TK.sort(-1)
    log_p_TK = log_p_TK.gather(1, order_TK)
    bad_T = torch.zeros_like(index_TK[:, 0], dtype=torch.bool)
    for what, bad_TK in _faults(index_TK, log_p_TK.detach(), vocab):
        bad_TK = bad_TK if keep_T is None else bad_TK & keep_T[:, None]
        if is_readable(bad_TK) and bool(bad_TK.any()):
            raise ValueError(_message(what, bad_TK, Teacher(index_TK, log_p_TK), order_TK, tokens.shape, vocab))
        bad_T = bad_T | bad_TK.any(-1)
    if not is_readable(bad_T):
        tokens = inputs.mark_nan(tokens, bad_T)
    return tokens._replace(teacher=Teacher(index_TK, log_p_TK))


def _faults(index_TK: Tensor, log_p_TK: Tensor, vocab: int) -> list[tuple[str, Tensor]]:
    """Name of each fault, and [T, K] bool where it occurs."""
    wide_TK = log_p_TK.to(compute_dtype(log_p_TK.dtype))
    p_TK, first_T1 = wide_TK.exp(), torch.zeros_like(index_TK[:, :1], dtype=torch.bool)
    # Each log-probability was rounded to the caller's dtype as well.
    size_TK = p_TK * wide_TK.abs().masked_fill(p_TK == 0, 0.0)
    most_T1 = 1.0 + _SUM_TOLERANCE + torch.finfo(log_p_TK.dtype).eps * size_TK.sum(-1, keepdim=True)
    return [
        ("outside", (index_TK < 0) | (index_TK >= vocab)),
        ("twice", torch.cat((first_T1, index_TK[:, 1:] == index_TK[:, :-1]), 1)),
        ("above 0", ~(wide_TK <= 0)),
        ("sum", (p_TK.sum(-1, keepdim=True) > most_T1).expand(index_TK.shape)),
    ]


def _message(what: str, bad_TK: Tensor, teacher: Teacher, order_TK: Tensor, shape: torch.Size, vocab: int) -> str:
    """The error message for the first position of a fault."""
    row, column = (int(i) for i in bad_TK.nonzero()[0])
    lead = [int(i) for i in torch.unravel_index(torch.tensor(row), shape)] if shape else []
    at = [*lead, int(order_TK[row, column])]
    index, log_p = int(teacher.index_TK[row, column]), float(teacher.log_p_TK[row, column].detach())
    if what == "outside":
        return f"teacher_indices{at} is {index}, which is no class in [0, {vocab})."
    if what == "twice":
        return f"teacher_indices{at} is {index}, which another index of the same token is, too; they must differ."
    if what == "above 0":
        return f"teacher_logprobs{at} is {log_p:g}; logarithms of probabilities are accepted, which are <= 0."
    total = float(teacher.log_p_TK[row].detach().double().exp().sum())
    return (
        f"The probabilities in teacher_logprobs{lead} sum to {total:g}, which is more than 1 by more than rounding: "
        "pass log-probabilities over the whole vocabulary, not logits."
    )
