"""Metrics of a call, beside its loss: from those of tokens to what the caller gets."""

# T = tokens (all leading dimensions of labels, flattened)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loss_core.field_checks import NUM_VALID, TOKEN_METRICS
from loss_core_torch.inputs import Tokens
from loss_core_torch.reduction import number_of_valid, reduce_tokens

Metrics = dict[str, Tensor]

# What a cross entropy returns: its loss, or with metrics a pair.
Result = Tensor | tuple[Tensor, Metrics]


def of_tokens(names: Sequence[str]) -> tuple[str, ...]:
    """Those that each token has: all but the number of tokens."""
    return tuple(name for name in names if name in TOKEN_METRICS)


def reduced(
    names: Sequence[str],
    found: Sequence[Tensor],
    tokens: Tokens,
    reduction: str,
    groups: tuple[object, ...] = (),
) -> Metrics:
    """What the caller gets, detached: each metric reduced as the loss is, and the number of valid tokens.

    Args:
        found: [T] each, of `of_tokens(names)`, 0 for ignored tokens.
        groups: process groups over which the tokens are sharded.
    """
    with torch.no_grad():
        values = {
            name: reduce_tokens(x_T.detach(), tokens, reduction, groups)
            for name, x_T in zip(of_tokens(names), found, strict=True)
        }
        if NUM_VALID in names:
            values[NUM_VALID] = number_of_valid(tokens, groups)
    return {name: values[name] for name in names}


def refuse(config: Any, who: str) -> None:
    """Refuse metrics where only a loss is taken.

    Raises:
        ValueError: names them, and who takes a loss alone.
    """
    if config.metrics:
        raise ValueError(f"{who} takes a loss alone, but config has metrics={list(config.metrics)}. Leave them out.")
