"""Typed configs of the losses: plain dataclasses that hold what a loss is, not how it is computed.

A config names no framework. `config.build(backend="torch" | "jax" | ...)` makes the callable.
Field names, order and defaults of the cross entropies, of KDLossConfig and of LossFromFactoryConfig begin as those of
`nemo_automodel.components.loss.loss` (NVIDIA NeMo AutoModel), so that recipes carry over.
"""

from loss_core.config.cross_entropy import (
    ChunkedCEConfig,
    FusedLinearCEConfig,
    MaskedCrossEntropyConfig,
    TEParallelCEConfig,
)
from loss_core.config.distillation import (
    FusedLinearKDConfig,
    FusedLinearTopKDistillationConfig,
    KDLossConfig,
    TopKDistillationConfig,
)
from loss_core.config.factory import (
    LossFromFactoryConfig,
    factory_name,
)
from loss_core.config.log_probs import (
    FusedLinearLogProbsConfig,
    LogProbsConfig,
)

__all__ = [
    "ChunkedCEConfig",
    "FusedLinearCEConfig",
    "FusedLinearKDConfig",
    "FusedLinearLogProbsConfig",
    "FusedLinearTopKDistillationConfig",
    "KDLossConfig",
    "LogProbsConfig",
    "LossFromFactoryConfig",
    "MaskedCrossEntropyConfig",
    "TEParallelCEConfig",
    "TopKDistillationConfig",
    "factory_name",
]
