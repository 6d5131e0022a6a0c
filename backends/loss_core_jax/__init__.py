"""The losses of `loss_core` in JAX: `loss_core.build_loss_module(config, backend="jax")` builds them."""

from loss_core_jax.losses import FusedLinearCrossEntropy, KDLoss, MaskedCrossEntropy, TEParallelCrossEntropy

__all__ = ["FusedLinearCrossEntropy", "KDLoss", "MaskedCrossEntropy", "TEParallelCrossEntropy"]
