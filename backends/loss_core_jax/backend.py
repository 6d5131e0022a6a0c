"""What `loss_core.backend` asks of the JAX backend: status, builders, the choice of `auto`, one evaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loss_core.backend import Evaluation, FlagStatus, KernelChoice
from loss_core.config import (
    FusedLinearCEConfig,
    KDLossConfig,
    LossConfig,
    MaskedCrossEntropyConfig,
    TEParallelCEConfig,
)
from loss_core_jax.losses import FusedLinearCrossEntropy, KDLoss, MaskedCrossEntropy, TEParallelCrossEntropy

_BUILDERS: dict[tuple[type[LossConfig], str], Callable[[Any], Any]] = {
    (MaskedCrossEntropyConfig, "xla"): lambda c: MaskedCrossEntropy(
        c.fp32_upcast, c.ignore_index, c.reduction, c.tp_group
    ),
    (FusedLinearCEConfig, "xla"): lambda c: FusedLinearCrossEntropy(
        c.ignore_index, c.logit_softcapping, c.reduction, c.tp_group, c.sequence_parallel
    ),
    (TEParallelCEConfig, "xla"): lambda c: TEParallelCrossEntropy(c.ignore_index, c.reduction, c.tp_group),
    (KDLossConfig, "xla"): lambda c: KDLoss(c.ignore_index, c.temperature, c.fp32_upcast, c.tp_group, c.chunk_size),
}


def kernel_status(kernel: str) -> FlagStatus:
    """Whether a kernel can be used here, and why not."""
    version = f"jax {jax.__version__}"
    if kernel == "xla":
        return FlagStatus("jax:xla", True, "", version, "")
    reason = f"'jax:{kernel}' has no kernels in this version: use 'jax:xla'."
    return FlagStatus(f"jax:{kernel}", False, reason, version, "")


def builders() -> Mapping[tuple[type[LossConfig], str], Callable[[Any], Any]]:
    """The table (config class, kernel) -> builder."""
    return _BUILDERS


def choose_kernel(config: LossConfig, candidates: tuple[str, ...]) -> KernelChoice:
    """What `auto` takes among the kernels that are built and usable."""
    return KernelChoice(f"jax:{candidates[0]}", "the only kernel of this version on jax")


def evaluate(
    loss: Any,
    arrays: Mapping[str, np.ndarray],
    *,
    dtype: str,
    upstream: np.ndarray | None,
    grad_of: tuple[str, ...],
    device: str | None = None,
) -> Evaluation:
    """Run a built loss and its gradient on NumPy inputs; see `loss_core.backend.Backend.evaluate`.

    Args:
        device: platform such as "cpu" or "cuda", None for JAX's default.
    """
    chosen = None if device is None else jax.devices(device)[0]
    with jax.enable_x64(dtype == "float64"), jax.default_device(chosen):
        inputs = {name: _to_jax(array, dtype) for name, array in arrays.items()}
        varied = {name: inputs.pop(name) for name in grad_of}
        # Under jit labels have no value to check; an abstract call with the real ones refuses what an eager call would.
        result = jax.eval_shape(lambda floats: loss(**floats, **inputs), varied)
        ones = np.ones(result.shape) if upstream is None else np.asarray(upstream)
        value, grads = _value_and_grads(loss, varied, inputs, jnp.asarray(ones, result.dtype))
        return Evaluation(
            loss=_to_float64(value),
            grads={name: _to_float64(grad) for name, grad in grads.items()},
            dtypes={name: str(x.dtype) for name, x in {"loss": value, **grads}.items()},
            mutated=(),  # a jax.Array can't be changed
            kernel="jax:xla",
        )


@functools.partial(jax.jit, static_argnames="loss")
def _value_and_grads(
    loss: Any, varied: dict[str, jax.Array], fixed: dict[str, jax.Array], upstream: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    value, pull_back = jax.vjp(lambda floats: loss(**floats, **fixed), varied)
    return value, pull_back(upstream)[0]


def _to_jax(array: np.ndarray, dtype: str) -> Any:
    """Floats in the tested dtype; integers and booleans as they are."""
    return jnp.asarray(array, dtype) if np.issubdtype(np.asarray(array).dtype, np.floating) else np.asarray(array)


def _to_float64(array: jax.Array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)
