"""PyTorch backend of loss_core: the losses as `torch.nn.Module`s."""

from loss_core_torch.modules import (
    FusedLinearCrossEntropy,
    FusedLinearKDLoss,
    FusedLinearLogProbs,
    KDLoss,
    LogProbs,
    MaskedCrossEntropy,
    TEParallelCrossEntropy,
    TopKDistillation,
)

__all__ = [
    "FusedLinearCrossEntropy",
    "FusedLinearKDLoss",
    "FusedLinearLogProbs",
    "KDLoss",
    "LogProbs",
    "MaskedCrossEntropy",
    "TEParallelCrossEntropy",
    "TopKDistillation",
]
