"""cut-cross-entropy (apple/ml-cross-entropy): its Triton kernels, and its implementation for torch.compile."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from loss_core_baselines import Loss, Losses


def linear_cross_entropy(impl: str) -> Callable[[Any], Loss]:
    """Builder for one of its implementations: "cce" or "torch_compile"."""

    def build(config: Any) -> Loss:
        function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        return lambda hidden_states, lm_weight, labels: function(
            hidden_states, lm_weight, labels, ignore_index=config.ignore_index,
            softcap=config.logit_softcapping or None, reduction=config.reduction, impl=impl,
        )  # fmt: skip

    return build


OPTIONS = ("ignore_index", "reduction", "logit_softcapping")
LOSSES: Losses = {"linear_cross_entropy": (linear_cross_entropy("cce"), OPTIONS)}
