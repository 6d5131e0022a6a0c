"""Liger kernel (linkedin/Liger-Kernel): Triton kernels, which need a GPU or TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib
from typing import Any

from loss_core_baselines import Loss, Losses


def _options(config: Any) -> dict[str, Any]:
    return {
        "ignore_index": config.ignore_index,
        "reduction": config.reduction,
        "softcap": config.logit_softcapping or None,
        "label_smoothing": config.label_smoothing,
        "lse_square_scale": config.z_loss,
    }


def _cross_entropy(config: Any) -> Loss:
    loss = importlib.import_module("liger_kernel.transformers").LigerCrossEntropyLoss(**_options(config))
    return lambda logits, labels: loss(logits, labels)


def _linear_cross_entropy(config: Any) -> Loss:
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(**_options(config))
    return lambda hidden_states, lm_weight, labels, lm_bias=None: loss(lm_weight, hidden_states, labels, lm_bias)


_OPTIONS = ("ignore_index", "reduction", "logit_softcapping", "label_smoothing", "z_loss")
LOSSES: Losses = {
    "cross_entropy": (_cross_entropy, _OPTIONS),
    "linear_cross_entropy": (_linear_cross_entropy, _OPTIONS),
}
