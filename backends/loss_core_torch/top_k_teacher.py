"""What is accepted of a teacher of which K log-probabilities per token are known. Nothing here changes an input."""

# T = tokens (all leading dimensions of labels, flattened), K = classes of the teacher, V = vocabulary

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loss_core_torch import inputs
from loss_core_torch.inputs import Teacher, Tokens
from loss_core_torch.tracing import compute_dtype, may_read

# A log-probability is z - lse, each rounded: for logits up to 2^10 in float32 it is off by 2^-24 * 2^11.
_OFF = 2.0**-13


def checked(indices: Any, logprobs: Any, of: str, lead: torch.Size, device: torch.device) -> Teacher:
    """Indices and log-probabilities as [T, K] on the device.

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
    """The tokens with a teacher whose classes ascend, once what can't be a distribution is refused, or marked wrong.

    Args:
        vocab: number of classes, of all ranks.
    Raises:
        ValueError: more classes than there are; where values may be read, of a token that counts: an index that is no
            class, or stands twice; a log-probability that is NaN or above 0, or a sum of probabilities above 1 by more
            than rounding. Elsewhere the token is NaN.
    """
    teacher, keep_T = tokens.teacher, tokens.keep_T
    assert teacher is not None
    index_TK, log_p_TK = teacher
    count = index_TK.shape[1]
    if count > vocab:
        raise ValueError(f"teacher_indices has {count} classes per token, but there are {vocab}; K must be in [1, V].")
    if keep_T is not None:
        # What an ignored token holds reaches nothing; its classes are any that differ.
        index_TK = torch.where(keep_T[:, None], index_TK, torch.ones_like(index_TK).cumsum(-1) - 1)
        log_p_TK = log_p_TK.masked_fill(~keep_T[:, None], 0.0)
    index_TK, order_TK = index_TK.sort(-1)
    log_p_TK = log_p_TK.gather(1, order_TK)
    bad_T = torch.zeros_like(index_TK[:, 0], dtype=torch.bool)
    for what, wrong_TK in _faults(index_TK, log_p_TK.detach(), vocab):
        wrong_TK = wrong_TK if keep_T is None else wrong_TK & keep_T[:, None]
        if may_read(wrong_TK) and bool(wrong_TK.any()):
            raise ValueError(_message(what, wrong_TK, Teacher(index_TK, log_p_TK), order_TK, tokens.shape, vocab))
        bad_T = bad_T | wrong_TK.any(-1)
    if not may_read(bad_T):
        tokens = inputs.with_wrong(tokens, bad_T)
    return tokens._replace(teacher=Teacher(index_TK, log_p_TK))


def _faults(index_TK: Tensor, log_p_TK: Tensor, vocab: int) -> list[tuple[str, Tensor]]:
    """What may be wrong, and [T, K] bool where it is."""
    given, wide_TK = log_p_TK.dtype, log_p_TK.to(compute_dtype(log_p_TK.dtype))
    p_TK, first_T1 = wide_TK.exp(), torch.zeros_like(index_TK[:, :1], dtype=torch.bool)
    # Each was rounded to its dtype as well.
    size_TK = p_TK * wide_TK.abs().masked_fill(p_TK == 0, 0.0)
    most_T1 = 1.0 + _OFF + torch.finfo(given).eps * size_TK.sum(-1, keepdim=True)
    return [
        ("outside", (index_TK < 0) | (index_TK >= vocab)),
        ("twice", torch.cat((first_T1, index_TK[:, 1:] == index_TK[:, :-1]), 1)),
        ("above 0", ~(wide_TK <= 0)),
        ("sum", (p_TK.sum(-1, keepdim=True) > most_T1).expand(index_TK.shape)),
    ]


def _message(what: str, wrong_TK: Tensor, teacher: Teacher, order_TK: Tensor, shape: torch.Size, vocab: int) -> str:
    """What is wrong at the first place where something is."""
    row, column = (int(i) for i in wrong_TK.nonzero()[0])
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
