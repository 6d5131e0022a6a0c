"""The losses of `loss_core` in JAX: `loss_core.build_loss_module(config, backend="jax")` builds them."""

from loss_core_jax.losses.cross_entropy import (
    ChunkedCrossEntropy,
    FusedLinearCrossEntropy,
    MaskedCrossEntropy,
    TEParallelCrossEntropy,
)
from loss_core_jax.losses.distillation import KDLoss
from loss_core_jax.losses.linear_distillation import FusedLinearKDLoss
from loss_core_jax.losses.log_probs import FusedLinearLogProbs, LogProbs
from loss_core_jax.losses.top_k_distillation import FusedLinearTopKDistillation, TopKDistillation

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
