"""tokamax's linear_softmax_cross_entropy_loss: a sum or mean over all tokens."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from loss_core.dispatch.protocol import BackendUnavailable
from loss_core_baselines import Loss, Losses


def linear_cross_entropy(implementation: str | None = None) -> Callable[[Any], Loss]:
    """Builder for one of its implementations; None: the one that tokamax chooses."""

    def build(config: Any) -> Loss:
        if config.reduction == "none":
            raise BackendUnavailable("tokamax has no reduction none.")
        function = importlib.import_module("tokamax").linear_softmax_cross_entropy_loss
        return lambda hidden_states, lm_weight, labels: function(
            hidden_states, labels, lm_weight.T, reduction=config.reduction, implementation=implementation
        )

    return build


LOSSES: Losses = {"linear_cross_entropy": (linear_cross_entropy(), ("reduction",))}
