"""Transformer Engine's cross entropy over [batch, sequence, vocabulary], which may be sharded over a group's ranks."""

from __future__ import annotations

import importlib
from typing import Any

from loss_core_baselines import Loss, Losses


def cross_entropy(config: Any) -> Loss:
    """The loss of each token, their sum, or the mean that the kernel computes."""
    function = importlib.import_module("transformer_engine.pytorch.cross_entropy").parallel_cross_entropy
    mean, group = config.reduction == "mean", config.tp_group
    # Passed only if not the default: with it, the backward of 2.5 and 2.6 fails.
    ignored = () if config.ignore_index == -100 else (config.ignore_index,)

    def loss(logits: Any, labels: Any) -> Any:
        batched = (x[None] if labels.ndim == 1 else x for x in (logits, labels))
        # Positional: the names differ between versions, and some accept no keywords.
        result = function(*batched, config.label_smoothing, mean, group, *ignored)
        if mean:
            return result
        return result.view(labels.shape) if config.reduction == "none" else result.sum()

    return loss


LOSSES: Losses = {"cross_entropy": (cross_entropy, ("ignore_index", "reduction", "label_smoothing", "tp_group"))}
