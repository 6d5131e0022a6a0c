"""The losses as torch modules: checks, one autograd function, and the reduction over [T]."""

from loss_core_torch.module_distillation import KDLoss
from loss_core_torch.module_linear import FusedLinearCrossEntropy
from loss_core_torch.module_logits import MaskedCrossEntropy, TEParallelCrossEntropy

__all__ = ["FusedLinearCrossEntropy", "KDLoss", "MaskedCrossEntropy", "TEParallelCrossEntropy"]
