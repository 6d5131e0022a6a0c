"""Losses as functions with optax's signature: per example, with `where=`, for any JAX training loop.

Tested with jax 0.10, optax 0.2.8, flax 0.12 (nnx) and equinox 0.13. Labels belong to their own positions: shift them
before the call. Objects with `__jax_array__`, such as `flax.nnx.Param`, are accepted as the arrays that they hold.
"""

# V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from loss_core import FusedLinearCEConfig, MaskedCrossEntropyConfig, TEParallelCEConfig
from loss_core.loss_config import LossConfig


def softmax_cross_entropy(config: LossConfig | None = None, *, backend: str = "jax") -> Callable[..., jax.Array]:
    """Cross entropy as `optax.softmax_cross_entropy_with_integer_labels`, with the options and kernels of a config.

    Args:
        config: MaskedCrossEntropyConfig or TEParallelCEConfig; None: reduction="none", the loss of each example.
        backend: flag of the loss, such as "jax:xla".
    Returns:
        `loss(logits, labels, where=None, num_label_tokens=None, loss_weights=None)`. logits: [..., V] floating; labels:
        [...] integers; where: [...] or broadcasting to it, 0 for examples to exclude: their loss and gradient are 0,
        and a mean does not count them. Returns [...], or a scalar for another reduction; float32.
    Raises:
        TypeError: config is of another loss. At a call: as `MaskedCrossEntropy`; and a ValueError for a `where` of the
            logits' shape, which optax interprets as a mask of classes.
    """
    config = MaskedCrossEntropyConfig(reduction="none") if config is None else config
    _check("softmax_cross_entropy", config, MaskedCrossEntropyConfig, TEParallelCEConfig)
    loss_fn = config.build(backend=backend)

    def loss(
        logits: Any, labels: Any, where: Any = None, *, num_label_tokens: Any = None, loss_weights: Any = None
    ) -> jax.Array:
        logits, labels, where = map(_array, (logits, labels, where))
        if where is not None and logits.ndim and where.ndim == logits.ndim:
            raise ValueError(
                f"where has shape {where.shape} and logits {logits.shape}: it must mask examples, {logits.shape[:-1]}. "
                "A mask of classes is not supported: set their logits to -inf."
            )
        return loss_fn(logits, labels, where, _array(num_label_tokens), _array(loss_weights))

    return loss


def linear_softmax_cross_entropy(
    config: FusedLinearCEConfig | None = None, *, backend: str = "jax"
) -> Callable[..., jax.Array]:
    """Cross entropy of `hidden_states @ lm_weight_HV`, without the logits of all examples.

    Args:
        config: FusedLinearCEConfig; None: reduction="none", the loss of each example.
        backend: flag of the loss, such as "jax:xla".
    Returns:
        `loss(hidden_states, labels, *, lm_weight_HV=None, lm_weight_VH=None, where=None, num_label_tokens=None,
        loss_weights=None)`. hidden_states: [..., H] floating; the weight as one of two arguments, by its layout:
        lm_weight_HV [H, V], a kernel of `flax.linen.Dense` or `flax.nnx.Linear`, or lm_weight_VH [V, H], an embedding
        or a weight of `equinox.nn.Linear`; where and the rest as in softmax_cross_entropy. A gradient has the layout of
        its weight.
    Raises:
        TypeError: config is of another loss. At a call: no weight or both; else as `FusedLinearCrossEntropy`.
    """
    config = FusedLinearCEConfig(reduction="none") if config is None else config
    _check("linear_softmax_cross_entropy", config, FusedLinearCEConfig)
    loss_fn = config.build(backend=backend)

    def loss(
        hidden_states: Any,
        labels: Any,
        *,
        lm_weight_HV: Any = None,
        lm_weight_VH: Any = None,
        where: Any = None,
        num_label_tokens: Any = None,
        loss_weights: Any = None,
    ) -> jax.Array:
        if (lm_weight_HV is None) == (lm_weight_VH is None):
            given = "neither" if lm_weight_HV is None else "both"
            raise TypeError(f"Pass lm_weight_HV of shape [H, V] or lm_weight_VH of shape [V, H], got {given}.")
        hidden_states, labels, where = map(_array, (hidden_states, labels, where))
        weight = _array(lm_weight_VH) if lm_weight_HV is None else _transposed(_array(lm_weight_HV), hidden_states)
        if where is not None:
            labels = _exclude(labels, where, config.ignore_index)
        count, weights = _array(num_label_tokens), _array(loss_weights)
        return loss_fn(hidden_states, labels, weight, num_label_tokens=count, loss_weights=weights)

    return loss


def _check(name: str, config: Any, *accepted: type[LossConfig]) -> None:
    if not isinstance(config, accepted):
        names = " or a ".join(cls.__name__ for cls in accepted)
        got = f"the class {config.__name__}" if isinstance(config, type) else f"a {type(config).__name__}"
        raise TypeError(f"{name} takes a {names}, got {got}.")


def _array(value: Any) -> Any:
    """The array that an object with `__jax_array__` holds; any other value unchanged."""
    return value.__jax_array__() if hasattr(value, "__jax_array__") and not isinstance(value, jax.Array) else value


def _transposed(weight_HV: Any, hidden_states: Any) -> Any:
    if weight_HV.ndim != 2 or weight_HV.shape[0] != hidden_states.shape[-1]:
        raise ValueError(
            f"lm_weight_HV has shape {weight_HV.shape} but hidden_states has shape {hidden_states.shape}; it must be "
            f"[H, V] with H = {hidden_states.shape[-1]}. A weight [V, H] goes under the name lm_weight_VH."
        )
    return weight_HV.T


def _exclude(labels: Any, where: Any, ignore_index: int) -> Any:
    """The labels with ignore_index where an example is excluded."""
    if jnp.broadcast_shapes(where.shape, labels.shape) != labels.shape:
        raise ValueError(f"where has shape {where.shape} but labels has shape {labels.shape}; it must broadcast to it.")
    # int32 can hold every class; 8-bit unsigned labels can't hold -100.
    return jnp.where(where, jnp.asarray(labels, jnp.int32), ignore_index)
