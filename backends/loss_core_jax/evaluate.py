"""A built loss and its gradients, run on NumPy inputs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loss_core.dispatch.protocol import Evaluation
from loss_core_jax import compat
from loss_core_jax.kernels import kernels_in

# More than what the kinds of random cases need of all losses and dtypes, some 1,600: else each would be compiled anew.
_MOST_PROGRAMS = 2500
_NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError, jax.errors.NonConcreteBooleanIndexError,
)  # fmt: skip


def evaluate(
    loss: Any,
    arrays: Mapping[str, np.ndarray],
    *,
    dtype: str,
    upstream: np.ndarray | None,
    grad_of: tuple[str, ...],
    device: str | None = None,
    backwards: int = 1,
    leaves: bool = True,
) -> Evaluation:
    """Run a built loss and its gradient on NumPy inputs; see `loss_core.dispatch.protocol.Backend.evaluate`.

    Args:
        device: platform such as "cpu" or "cuda", None for JAX's default.
        backwards: makes no difference to functions without state.
        leaves: neither does this, to arrays that nothing can change.
    """
    chosen = None if device is None else jax.devices(device)[0]
    compat.forget_programs(_MOST_PROGRAMS)
    with jax.enable_x64(dtype == "float64"), jax.default_device(chosen):
        inputs = {name: to_jax(array, dtype) for name, array in arrays.items()}
        before = {name: _bits(x) for name, x in inputs.items()}
        varied, fixed = {name: inputs[name] for name in grad_of}, {k: x for k, x in inputs.items() if k not in grad_of}
        # Under jit labels have no value to check; an abstract call with the real ones refuses what an eager call would.
        result = jax.eval_shape(lambda floats: as_one(loss(**floats, **fixed)), varied)
        ones = np.ones(result.shape) if upstream is None else np.asarray(upstream)
        arguments = (varied, fixed, jnp.asarray(ones.astype(result.dtype)))
        program = _value_and_grads.lower(loss, *arguments).compile()
        value, grads = program(*arguments)
        return Evaluation(
            loss=to_float64(value),
            grads={name: to_float64(grad) for name, grad in grads.items()},
            dtypes={name: str(x.dtype) for name, x in {"loss": value, **grads}.items()},
            mutated=tuple(name for name, x in inputs.items() if _bits(x) != before[name]),
            kernel=kernels_in(program),
        )


def host_reads(loss: Any, arrays: Mapping[str, np.ndarray], *, dtype: str, grad_of: tuple[str, ...]) -> str:
    """See `loss_core.dispatch.protocol.Backend.host_reads`: the name of JAX's error."""
    with jax.enable_x64(dtype == "float64"):
        try:
            jax.eval_shape(lambda inputs: as_one(loss(**inputs)), {k: to_jax(x, dtype) for k, x in arrays.items()})
        except _NEEDS_VALUES as error:
            return type(error).__name__
    return ""


@functools.partial(jax.jit, static_argnames="loss")
def _value_and_grads(
    loss: Any, varied: dict[str, jax.Array], fixed: dict[str, jax.Array], upstream: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    value, pull_back = jax.vjp(lambda floats: as_one(loss(**floats, **fixed)), varied)
    return value, pull_back(upstream)[0]


def as_one(result: Any) -> jax.Array:
    """A result as one array: those of several, and metrics by name behind a loss, are stacked in front."""
    if isinstance(result, jax.Array):
        return result
    if not isinstance(result, tuple | list):
        raise TypeError(f"A loss must return a jax.Array or a tuple of them, got {type(result).__name__}.")
    first, *others = (x for x in result if x is not None)
    others = [x for other in others for x in _listed(other)]
    return (
        jnp.stack([first, *(jnp.broadcast_to(x.astype(first.dtype), first.shape) for x in others)]) if others else first
    )


def _listed(result: Any) -> list[Any]:
    return [result[name] for name in sorted(result)] if isinstance(result, dict) else [result]


def to_jax(array: np.ndarray, dtype: str) -> Any:
    """Floats in the tested dtype; integers and booleans as they are."""
    array = np.asarray(array)
    # NumPy casts: JAX would compile a program for each shape.
    return jnp.asarray(array.astype(jnp.dtype(dtype))) if np.issubdtype(array.dtype, np.floating) else array


def to_float64(array: jax.Array) -> np.ndarray:
    """On the host, in float64."""
    return np.asarray(array).astype(np.float64)


def _bits(array: Any) -> bytes:
    return np.asarray(array).tobytes()
