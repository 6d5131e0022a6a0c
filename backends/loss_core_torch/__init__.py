"""PyTorch backend of loss_core: the losses as `torch.nn.Module`s."""

from loss_core_torch.modules import (
    ChunkedCrossEntropy,
    FusedLinearCrossEntropy,
    FusedLinearKDLoss,
    FusedLinearLogProbs,
    FusedLinearTopKDistillation,
    KDLoss,
    LogProbs,
    MaskedCrossEntropy,
    TEParallelCrossEntropy,
    TopKDistillation,
)

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
