"""PyTorch backend of loss_core: the losses as `torch.nn.Module`s."""

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

# The losses of this list have flags; see `backend`.
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
