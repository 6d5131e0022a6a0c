"""Typed configs of the losses: plain dataclasses that specify what is computed, not how.

A config is independent of the framework; `config.build(backend="torch" | "jax" | ...)` builds the callable.
The first fields of the cross entropies, of KDLossConfig and of LossFromFactoryConfig have the names, order and defaults
of `nemo_automodel.components.loss.loss` (NVIDIA NeMo AutoModel), so that its recipes work unchanged.
"""
