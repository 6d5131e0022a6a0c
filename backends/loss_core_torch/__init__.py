"""PyTorch backend of loss_core: the losses as `torch.nn.Module`s."""

from loss_core_torch.modules import (
    ChunkedCrossEntropy,
    FusedLinearCrossEntropy,
    FusedLinearLogProbs,
    KDLoss,
    LogProbs,
    MaskedCrossEntropy,
    TEParallelCrossEntropy,
)

__all__ = [
    "ChunkedCrossEntropy",
    "FusedLinearCrossEntropy",
    "FusedLinearLogProbs",
    "KDLoss",
    "LogProbs",
    "MaskedCrossEntropy",
    "TEParallelCrossEntropy",
]
