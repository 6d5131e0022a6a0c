"""PyTorch backend of loss_core: the losses as `torch.nn.Module`s."""

from loss_core_torch.modules import FusedLinearCrossEntropy, KDLoss, MaskedCrossEntropy, TEParallelCrossEntropy

__all__ = ["FusedLinearCrossEntropy", "KDLoss", "MaskedCrossEntropy", "TEParallelCrossEntropy"]
