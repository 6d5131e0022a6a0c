"""A host callback for JAX programs that can't deadlock.

`jax.pure_callback` converts the operands to jax arrays before the call. On CPU that is a copy on XLA's thread pool, and
the callback, which runs on a thread of that pool, waits for it in `np.asarray`. With one core it deadlocks (jax 0.10.2,
operands of 256 KiB; as in jax issues 24255 and 25861); with more it depends on the load of the pool. The callback here
gets XLA's operands directly, as NumPy views of its buffers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.custom_batching import sequential_vmap
from jax.extend import core as jax_core
from jax.interpreters import mlir, xla

HostFunction = Callable[..., tuple[np.ndarray[Any, Any], ...]]


def host_call(
    function: HostFunction, results: Sequence[jax.ShapeDtypeStruct], arrays: Sequence[jax.Array]
) -> tuple[jax.Array, ...]:
    """Call a function of NumPy arrays from a traced program.

    Under vmap the function is called once per batch element. Not differentiable: the caller defines a custom_vjp.

    Args:
        function: pure, hashable; takes views that are valid during the call only and must not be
            written to; returns one NumPy array per result. It must not use JAX.
        results: shape and dtype of each result.
    """
    outputs = tuple((result.shape, result.dtype) for result in results)

    @sequential_vmap  # type: ignore[untyped-decorator]
    def call(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(_host_call_p.bind(*arrays, function=function, outputs=outputs))

    called: tuple[jax.Array, ...] = call(*arrays)
    return called


def _abstract(*_: Any, function: HostFunction, outputs: tuple[Any, ...]) -> list[Any]:
    return [jax.core.ShapedArray(shape, dtype) for shape, dtype in outputs]


def _lower(ctx: Any, *operands: Any, function: HostFunction, outputs: tuple[Any, ...]) -> Any:
    values, _, _ = mlir.emit_python_callback(
        ctx, function, None, list(operands), ctx.avals_in, ctx.avals_out, has_side_effect=False
    )
    return values


_host_call_p = jax_core.Primitive("loss_core_host_call")
_host_call_p.multiple_results = True
_host_call_p.def_abstract_eval(_abstract)
_host_call_p.def_impl(functools.partial(xla.apply_primitive, _host_call_p))
mlir.register_lowering(_host_call_p, _lower)
