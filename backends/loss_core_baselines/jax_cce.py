"""jax-cce's linear_cross_entropy, which is a mean over all tokens."""

from __future__ import annotations

import importlib
from typing import Any

from loss_core.dispatch.protocol import BackendUnavailable
from loss_core_baselines import Loss, Losses


def _linear_cross_entropy(config: Any) -> Loss:
    if config.reduction != "mean":
        raise BackendUnavailable("jax-cce has reduction mean only.")
    function = importlib.import_module("jax_cce").linear_cross_entropy
    return lambda hidden_states, lm_weight, labels: function(hidden_states, lm_weight, labels)


LOSSES: Losses = {"linear_cross_entropy": (_linear_cross_entropy, ("reduction",))}
