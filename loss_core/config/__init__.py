"""Typed configs of the losses: plain dataclasses that hold what a loss is, not how it is computed.

A config names no framework. `config.build(backend="torch" | "jax" | ...)` makes the callable.
Field names, order and defaults of the cross entropies, of KDLossConfig and of LossFromFactoryConfig begin as those of
`nemo_automodel.components.loss.loss` (NVIDIA NeMo AutoModel), so that recipes carry over.
"""
