"""The losses as torch modules: checks, a family's autograd function, and the reduction over [T]."""

from loss_core_torch.modules.cross_entropy import (
    ChunkedCrossEntropy,
    FusedLinearCrossEntropy,
    MaskedCrossEntropy,
    TEParallelCrossEntropy,
)
from loss_core_torch.modules.distillation import KDLoss
from loss_core_torch.modules.linear_distillation import FusedLinearKDLoss
from loss_core_torch.modules.log_probs import FusedLinearLogProbs, LogProbs
from loss_core_torch.modules.top_k_distillation import FusedLinearTopKDistillation, TopKDistillation

__all__ = [
    "ChunkedCrossEntropy",
    "FusedLinearCrossEntropy",
    "FusedLinearKDLoss",
    "FusedLinearLogProbs",
    "FusedLinearTopKDistillation",
    "KDLoss",
    "LogProbs",
    "MaskedCrossEntropy",
    "TEParallelCrossEntropy",
    "TopKDistillation",
]
