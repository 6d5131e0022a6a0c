"""Reduction of token metrics to the metrics that a call returns with its loss."""

# T = tokens (all leading dimensions of labels, flattened)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loss_core.field_checks import NUM_VALID, TOKEN_METRICS
from loss_core_torch.inputs import Tokens
from loss_core_torch.reduction import count_valid, reduce_tokens

Metrics = dict[str, Tensor]

# Result of a cross entropy: the loss, or with metrics a pair of both.
Result = Tensor | tuple[Tensor, Metrics]


def per_token(names: Sequence[str]) -> tuple[str, ...]:
    """The metrics with one value per token: all but the number of valid tokens."""
    return tuple(name for name in names if name in TOKEN_METRICS)


def reduced(
    names: Sequence[str],
    found: Sequence[Tensor],
    tokens: Tokens,
    reduction: str,
    groups: tuple[object, ...] = (),
) -> Metrics:
    """The metrics by name, detached: each reduced as the loss is, and the number of valid tokens.

    Args:
        found: the metrics `per_token(names)`, [T] each, 0 for ignored tokens.
        groups: process groups over which the tokens are sharded.
    """
    with torch.no_grad():
        values = {
            name: reduce_tokens(x_T.detach(), tokens, reduction, groups)
            for name, x_T in zip(per_token(names), found, strict=True)
        }
        if NUM_VALID in names:
            values[NUM_VALID] = count_valid(tokens, groups)
    return {name: values[name] for name in names}


def refuse(config: Any, who: str) -> None:
    """Refuse a config with metrics for a caller (`who`) that accepts only a loss.

    Raises:
        ValueError: the config has metrics.
    """
    if config.metrics:
        raise ValueError(f"{who} takes a loss alone, but config has metrics={list(config.metrics)}. Leave them out.")
