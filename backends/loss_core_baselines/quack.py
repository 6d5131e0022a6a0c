"""QuACK (Dao-AILab/quack): CuTe kernels, which need a Hopper or Blackwell GPU."""

from __future__ import annotations

import importlib
from typing import Any

from loss_core.dispatch.protocol import BackendUnavailable
from loss_core_baselines import Loss, Losses


def _cross_entropy(config: Any) -> Loss:
    function = importlib.import_module("quack.cross_entropy").cross_entropy
    options = {"ignore_index": config.ignore_index, "reduction": config.reduction}
    return lambda logits, labels: function(logits, labels, **options)


def _linear_cross_entropy(config: Any) -> Loss:
    if config.reduction == "none":
        raise BackendUnavailable("QuACK's chunked_linear_cross_entropy gives a sum or a mean.")
    function = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    options = {"ignore_index": config.ignore_index, "reduction": config.reduction}
    return lambda hidden_states, labels, lm_weight: function(hidden_states, lm_weight, labels, **options)


LOSSES: Losses = {
    "cross_entropy": (_cross_entropy, ("ignore_index", "reduction")),
    "linear_cross_entropy": (_linear_cross_entropy, ("ignore_index", "reduction")),
}
