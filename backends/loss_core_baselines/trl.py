"""TRL: log-probabilities and entropies (trl.trainer.utils), and the divergence of GKDTrainer."""

from __future__ import annotations

import importlib
from typing import Any

from loss_core.dispatch.protocol import BackendUnavailable
from loss_core_baselines import Loss, Losses


def _log_probs(config: Any) -> Loss:
    if config.entropy:
        raise BackendUnavailable("asked for log-probabilities alone.")
    function = importlib.import_module("trl.trainer.utils").selective_log_softmax
    return lambda logits, labels: function(logits, labels)


def _distillation(config: Any) -> Loss:
    betas = {"forward_kl": 0, "reverse_kl": 1, "jsd": config.beta}
    function = importlib.import_module("trl.experimental.gkd.gkd_trainer").GKDTrainer.generalized_jsd_loss
    return lambda student_logits, teacher_logits, labels: function(
        student_logits, teacher_logits, labels, beta=betas[config.divergence]
    )


LOSSES: Losses = {
    "log_probs": (_log_probs, ("entropy",)),
    "distillation": (_distillation, ("divergence", "beta")),
}
