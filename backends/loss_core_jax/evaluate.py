"""Evaluate a built loss and its gradients on NumPy inputs."""

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

# The random cases of all losses and dtypes need some 1,600 programs: a lower limit would recompile each.
_MAX_PROGRAMS = 2500
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
        backwards, leaves: no effect: functions have no state, and arrays are immutable.
    """
    chosen = None if device is None else jax.devices(device)[0]
    compat.limit_compiled_programs(_MAX_PROGRAMS)
    with jax.enable_x64(dtype == "float64"), jax.default_device(chosen):
        inputs = {name: to_jax(array, dtype) for name, array in arrays.items()}
        before = {name: _bits(x) for name, x in inputs.items()}
        differentiated = {name: inputs[name] for name in grad_of}
        fixed = {name: x for name, x in inputs.items() if name not in grad_of}
        # Under jit the labels can't be checked; this abstract call with concrete labels raises as an eager call would.
        result = jax.eval_shape(lambda floats: as_one(loss(**floats, **fixed)), differentiated)
        ones = np.ones(result.shape) if upstream is None else np.asarray(upstream)
        arguments = (differentiated, fixed, jnp.asarray(ones.astype(result.dtype)))
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
    loss: Any, differentiated: dict[str, jax.Array], fixed: dict[str, jax.Array], upstream: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    value, pull_back = jax.vjp(lambda floats: as_one(loss(**floats, **fixed)), differentiated)
    return value, pull_back(upstream)[0]


def as_one(result: Any) -> jax.Array:
    """A result as one array: the arrays of a tuple, and of a dict of metrics in it, are stacked along a new axis 0."""
    if isinstance(result, jax.Array):
        return result
    if not isinstance(result, tuple | list):
        raise TypeError(f"A loss must return a jax.Array or a tuple of them, got {type(result).__name__}.")
    first, *others = (x for x in result if x is not None)
    others = [x for other in others for x in _values(other)]
    return (
        jnp.stack([first, *(jnp.broadcast_to(x.astype(first.dtype), first.shape) for x in others)]) if others else first
    )


def _values(result: Any) -> list[Any]:
    return [result[name] for name in sorted(result)] if isinstance(result, dict) else [result]


def to_jax(array: np.ndarray, dtype: str) -> Any:
    """The array, floats cast to the tested dtype; integers and booleans unchanged."""
    array = np.asarray(array)
    # Cast by NumPy: JAX would compile a program for each shape.
    return jnp.asarray(array.astype(jnp.dtype(dtype))) if np.issubdtype(array.dtype, np.floating) else array


def to_float64(array: jax.Array) -> np.ndarray:
    """The array as a NumPy array in float64."""
    return np.asarray(array).astype(np.float64)


def _bits(array: Any) -> bytes:
    return np.asarray(array).tobytes()
