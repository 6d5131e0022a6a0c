"""Configs of distillation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from loss_core.field_checks import check_fields
from loss_core.loss_config import LossConfig
from loss_core.registry import typed_loss


@typed_loss("KDLoss", "distillation")
@dataclass
class KDLossConfig(LossConfig):
    """Knowledge distillation: a divergence of the student from the teacher at temperature T, times T^2.

    Attributes:
        ignore_index: label of the tokens to ignore; any 64-bit integer.
        temperature: softmax temperature T, no unit; 2**-63 to 2**63.
        fp32_upcast: True: the loss is returned in float32 (float64 for float64 logits);
            False: in the dtype of the student's logits.
        tp_group: as in TEParallelCEConfig.
        chunk_size: tokens per block, >= 0; 0 lets the kernel choose.
        divergence: "forward_kl": KL(teacher || student); "reverse_kl": KL(student || teacher); "jsd": the generalized
            Jensen-Shannon divergence, beta KL(teacher || M) + (1 - beta) KL(student || M) with the mixture
            M = beta teacher + (1 - beta) student (Agarwal et al. 2024, arXiv:2306.13649, equation 1).
        beta: weight of the teacher in the mixture, in [0, 1]; used only by "jsd". At 0 and 1, where that divergence is
            0, the loss is its limit after division by beta or by 1 - beta: 0 is "forward_kl", 1 is "reverse_kl", as in
            TRL's GKDTrainer.
    """

    ignore_index: int = -100
    temperature: float = 1.0
    fp32_upcast: bool = True
    tp_group: Any = field(default=None, repr=False, compare=False)
    chunk_size: int = 0
    divergence: str = "forward_kl"
    beta: float = 0.5

    def validate(self) -> None:
        check_fields(self, "ignore_index", "temperature", "fp32_upcast", "chunk_size", "divergence", "beta")


@typed_loss("FusedLinearKDLoss", "linear_distillation")
@dataclass
class FusedLinearKDConfig(LossConfig):
    """KDLossConfig's loss between two heads, `hidden_states @ lm_weight.T` each, without ever holding all logits.

    Attributes:
        ignore_index: as in KDLossConfig.
        temperature: as in KDLossConfig.
        tp_group: as in TEParallelCEConfig, for the rows of both lm_weights.
        divergence: as in KDLossConfig.
        beta: as in KDLossConfig.
        sequence_parallel: as in FusedLinearCEConfig, for both hidden_states.
    """

    ignore_index: int = -100
    temperature: float = 1.0
    tp_group: Any = field(default=None, repr=False, compare=False)
    divergence: str = "forward_kl"
    beta: float = 0.5
    sequence_parallel: bool = False

    def validate(self) -> None:
        check_fields(self, "ignore_index", "temperature", "divergence", "beta", "sequence_parallel")


@typed_loss("TopKDistillation", "top_k_distillation")
@dataclass
class TopKDistillationConfig(LossConfig):
    """Distillation from K log-probabilities of the teacher per token: KL(teacher || student), times T^2.

    The teacher's log-probabilities are used unchanged, as those at temperature T; temperature and softcap apply to the
    student only. With the log-probabilities of all classes the loss equals that of KDLossConfig, T^2 included.

    Attributes:
        ignore_index: as in KDLossConfig.
        temperature: softmax temperature T, no unit; 2**-63 to 2**63.
        fp32_upcast: as in KDLossConfig.
        tp_group: as in TEParallelCEConfig.
        logit_softcapping: as in MaskedCrossEntropyConfig; before the temperature.
        tail: True: all other classes together form one more class with the remaining probability of teacher and
            student. False: the sum of p (log p - log q) over the K classes only; neither p nor q is renormalised, and
            the sum may be negative.
    """

    ignore_index: int = -100
    temperature: float = 1.0
    fp32_upcast: bool = True
    tp_group: Any = field(default=None, repr=False, compare=False)
    logit_softcapping: float = 0.0
    tail: bool = True

    def validate(self) -> None:
        check_fields(self, "ignore_index", "temperature", "fp32_upcast", "logit_softcapping", "tail")


@typed_loss("FusedLinearTopKDistillation", "linear_top_k_distillation")
@dataclass
class FusedLinearTopKDistillationConfig(LossConfig):
    """TopKDistillation of logits `hidden_states @ lm_weight.T`, without ever holding all logits.

    Attributes:
        ignore_index: as in KDLossConfig.
        temperature: as in TopKDistillationConfig.
        logit_softcapping: as in TopKDistillationConfig.
        tail: as in TopKDistillationConfig.
        tp_group: as in TEParallelCEConfig, for the rows of lm_weight.
        sequence_parallel: as in FusedLinearCEConfig.
    """

    ignore_index: int = -100
    temperature: float = 1.0
    logit_softcapping: float = 0.0
    tail: bool = True
    tp_group: Any = field(default=None, repr=False, compare=False)
    sequence_parallel: bool = False

    def validate(self) -> None:
        check_fields(self, "ignore_index", "temperature", "logit_softcapping", "tail", "sequence_parallel")
