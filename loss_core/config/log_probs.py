"""Configs of log-probabilities and entropies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from loss_core.field_checks import check_fields
from loss_core.loss_config import LossConfig
from loss_core.registry import typed_loss


@typed_loss("LogProbs", "log_probs")
@dataclass
class LogProbsConfig(LossConfig):
    """Log-probability of each label over logits `[..., V]`, and the entropy of its distribution, both differentiable.

    Attributes:
        ignore_index: label of the tokens to ignore, whose results are 0; any 64-bit integer.
        temperature: divides the logits, no unit; 2**-63 to 2**63. The argument `temperature` of a call overrides it.
        logit_softcapping: as in MaskedCrossEntropyConfig; before the temperature.
        entropy: whether the entropy is returned as well.
        tp_group: as in TEParallelCEConfig.
    """

    ignore_index: int = -100
    temperature: float = 1.0
    logit_softcapping: float = 0.0
    entropy: bool = False
    tp_group: Any = field(default=None, repr=False, compare=False)

    def validate(self) -> None:
        check_fields(self, "ignore_index", "temperature", "logit_softcapping", "entropy")


@typed_loss("FusedLinearLogProbs", "linear_log_probs")
@dataclass
class FusedLinearLogProbsConfig(LossConfig):
    """Log-probability and entropy of logits `hidden_states @ lm_weight.T`, without ever holding all logits.

    Attributes:
        ignore_index: as in LogProbsConfig.
        temperature: as in LogProbsConfig.
        logit_softcapping: as in LogProbsConfig.
        entropy: as in LogProbsConfig.
        tp_group: as in TEParallelCEConfig, for the rows of lm_weight.
        sequence_parallel: as in FusedLinearCEConfig.
    """

    ignore_index: int = -100
    temperature: float = 1.0
    logit_softcapping: float = 0.0
    entropy: bool = False
    tp_group: Any = field(default=None, repr=False, compare=False)
    sequence_parallel: bool = False

    def validate(self) -> None:
        check_fields(self, "ignore_index", "temperature", "logit_softcapping", "entropy", "sequence_parallel")
