"""NeMo AutoModel (nemo_automodel.components.loss), whose classes have the forward arguments of loss_core."""

from __future__ import annotations

import importlib
from typing import Any

from loss_core_baselines import Loss, Losses


def _module(name: str) -> Any:
    return importlib.import_module(f"nemo_automodel.components.loss.{name}")


def _cross_entropy(config: Any) -> Loss:
    loss: Loss = _module("masked_ce").MaskedCrossEntropy(config.fp32_upcast, config.ignore_index, config.reduction)
    return loss


def _linear_cross_entropy(config: Any) -> Loss:
    loss: Loss = _module("linear_ce").FusedLinearCrossEntropy(
        config.ignore_index, config.logit_softcapping, config.reduction
    )
    return loss


def _distillation(config: Any) -> Loss:
    loss: Loss = _module("kd_loss").KDLoss(config.ignore_index, config.temperature, config.fp32_upcast)
    return loss


LOSSES: Losses = {
    "cross_entropy": (_cross_entropy, ("fp32_upcast", "ignore_index", "reduction")),
    "linear_cross_entropy": (_linear_cross_entropy, ("ignore_index", "logit_softcapping", "reduction")),
    "distillation": (_distillation, ("ignore_index", "temperature", "fp32_upcast")),
}
