"""torchtitan's cross entropy (torchtitan.components.loss), over [batch, sequence, vocabulary]."""

from __future__ import annotations

import importlib
from typing import Any

from loss_core.dispatch.protocol import BackendUnavailable
from loss_core_baselines import Loss, Losses


def _cross_entropy(config: Any) -> Loss:
    if config.reduction != "sum":
        raise BackendUnavailable("torchtitan's cross_entropy_loss sums.")
    function = importlib.import_module("torchtitan.components.loss").cross_entropy_loss

    def loss(logits: Any, labels: Any) -> Any:
        return function(*((x[None] if labels.ndim == 1 else x) for x in (logits, labels)))

    return loss


LOSSES: Losses = {"cross_entropy": (_cross_entropy, ())}
