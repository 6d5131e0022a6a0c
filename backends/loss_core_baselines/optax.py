"""optax.losses, per example, and their sums."""

from __future__ import annotations

import importlib
from typing import Any

from loss_core_baselines import Loss, Losses


def _cross_entropy(config: Any) -> Loss:
    function = importlib.import_module("optax").losses.softmax_cross_entropy_with_integer_labels
    if config.reduction == "none":
        return lambda logits, labels: function(logits, labels)
    if config.reduction == "mean":
        return lambda logits, labels: function(logits, labels).mean()
    return lambda logits, labels: function(logits, labels).sum()


LOSSES: Losses = {"cross_entropy": (_cross_entropy, ("reduction",))}
