"""Typed configs for LLM training losses, built on PyTorch or JAX by a flag, and proved to agree.

>>> from loss_core import MaskedCrossEntropyConfig
>>> config = MaskedCrossEntropyConfig(reduction="mean")
>>> config.ignore_index, config.reduction
(-100, 'mean')

Importing this package loads neither torch nor jax; `config.build(backend=...)` does.
"""

from loss_core.build import (
    build_loss_config,
    build_loss_module,
    register_loss,
    unregister_loss,
)
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
from loss_core.config.factory import LossFromFactoryConfig
from loss_core.config.log_probs import FusedLinearLogProbsConfig, LogProbsConfig
from loss_core.dispatch.flags import parse_flag
from loss_core.dispatch.protocol import BackendFlag, BackendUnavailable, Evaluation, FlagStatus, KernelChoice
from loss_core.loss_config import LossConfig
from loss_core.registry import LOSS_CONFIG_REGISTRY
from loss_core.results import TokenLogProbs

__version__ = "0.1.0"

__all__ = [
    "LOSS_CONFIG_REGISTRY",
    "BackendFlag",
    "BackendUnavailable",
    "ChunkedCEConfig",
    "Evaluation",
    "FlagStatus",
    "FusedLinearCEConfig",
    "FusedLinearKDConfig",
    "FusedLinearLogProbsConfig",
    "FusedLinearTopKDistillationConfig",
    "KDLossConfig",
    "KernelChoice",
    "LogProbsConfig",
    "LossConfig",
    "LossFromFactoryConfig",
    "MaskedCrossEntropyConfig",
    "TEParallelCEConfig",
    "TokenLogProbs",
    "TopKDistillationConfig",
    "build_loss_config",
    "build_loss_module",
    "parse_flag",
    "register_loss",
    "unregister_loss",
]
