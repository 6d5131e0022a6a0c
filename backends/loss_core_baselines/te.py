"""Transformer Engine's cross entropy; the vocabulary may be sharded over the ranks of a group."""

from __future__ import annotations

import importlib
from typing import Any

from loss_core_baselines import Loss, Losses, reduced


def cross_entropy(config: Any) -> Loss:
    """Its loss per token, summed or averaged over the tokens that count where the config says so."""
    function = importlib.import_module("transformer_engine.pytorch.cross_entropy").parallel_cross_entropy
    group = getattr(config, "tp_group", None)

    def loss(logits: Any, labels: Any) -> Any:
        return reduced(function(logits.unsqueeze(0), labels.unsqueeze(0), 0.0, False, group)[0], labels, config)

    return loss


LOSSES: Losses = {"cross_entropy": (cross_entropy, ("reduction", "tp_group"))}
