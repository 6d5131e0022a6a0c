"""PyTorch's own cross entropies."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from loss_core.dispatch.protocol import BackendUnavailable
from loss_core_baselines import Loss, Losses


def _cross_entropy(config: Any) -> Loss:
    return lambda logits, labels: F.cross_entropy(
        logits, labels, ignore_index=config.ignore_index, reduction=config.reduction,
        label_smoothing=config.label_smoothing,
    )  # fmt: skip


def linear_cross_entropy(config: Any, options: Any = None) -> Loss:
    """F.linear_cross_entropy, with its default chunks unless options are passed."""
    if not hasattr(F, "linear_cross_entropy"):
        raise BackendUnavailable(f"torch {torch.__version__} has no F.linear_cross_entropy; 2.13 has it.")
    chosen = torch.nn.LinearCrossEntropyOptions() if options is None else options
    return lambda hidden_states, lm_weight, labels, lm_bias=None: F.linear_cross_entropy(
        hidden_states, lm_weight, labels, linear_bias=lm_bias, reduction=config.reduction,
        ignore_index=config.ignore_index, label_smoothing=config.label_smoothing, options=chosen,
    )  # fmt: skip


_OPTIONS = ("ignore_index", "reduction", "label_smoothing")
LOSSES: Losses = {
    "cross_entropy": (_cross_entropy, _OPTIONS),
    "linear_cross_entropy": (linear_cross_entropy, _OPTIONS),
}
