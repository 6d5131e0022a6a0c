"""torchtune's losses (torchtune.modules.loss): chunked cross entropy, and forward and reverse KL."""

from __future__ import annotations

import importlib
from typing import Any

from loss_core.dispatch.protocol import BackendUnavailable
from loss_core_baselines import Loss, Losses


def _cross_entropy(config: Any) -> Loss:
    if config.reduction != "mean":
        raise BackendUnavailable("torchtune's CEWithChunkedOutputLoss is a mean over the valid tokens.")
    module = importlib.import_module("torchtune.modules.loss").CEWithChunkedOutputLoss(1, config.ignore_index)

    def loss(logits: Any, labels: Any) -> Any:
        return module(*(([logits[None]], labels[None]) if labels.ndim == 1 else ([logits], labels)))

    return loss


def _distillation(config: Any) -> Loss:
    losses = importlib.import_module("torchtune.modules.loss")
    module = {"forward_kl": losses.ForwardKLLoss, "reverse_kl": losses.ReverseKLLoss}.get(config.divergence)
    if module is None:
        raise BackendUnavailable(f"torchtune has no divergence={config.divergence!r} of this form.")
    loss = module(config.ignore_index)
    return lambda student_logits, teacher_logits, labels: loss(student_logits, teacher_logits, labels)


LOSSES: Losses = {
    "cross_entropy": (_cross_entropy, ("reduction", "ignore_index")),
    "distillation": (_distillation, ("ignore_index", "divergence")),
}
