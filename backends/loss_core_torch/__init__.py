"""PyTorch backend of loss_core: the losses as `torch.nn.Module`s."""

from loss_core_torch.modules import (
    FusedLinearCrossEntropy,
    FusedLinearLogProbs,
    KDLoss,
    LogProbs,
    MaskedCrossEntropy,
    TEParallelCrossEntropy,
    TopKDistillation,
)

__all__ = [
    "FusedLinearCrossEntropy",
    "FusedLinearLogProbs",
    "KDLoss",
    "LogProbs",
    "MaskedCrossEntropy",
    "TEParallelCrossEntropy",
    "TopKDistillation",
]
