"""APIs of JAX that are private or differ between versions: one function each, with the versions it was tested on."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero


def varying_axes(*arrays: Any) -> frozenset[str]:
    """Mesh axes over which the type of any of the arrays varies; empty outside `jax.shard_map`."""
    axes: frozenset[str] = frozenset()
    for array in arrays:
        aval: Any = jax.typeof(array)
        # 0.8: the type has `vma`; 0.10: `manual_axis_type`.
        axes |= aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying
    return axes


def vary(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """The array, with a type that also varies over these mesh axes."""
    missing = tuple(sorted(axes - varying_axes(array)))
    if not missing:
        return array
    modern: Any = lax
    # 0.8: pvary alone; 0.10: pcast alone.
    varying: jax.Array = (
        modern.pcast(array, missing, to="varying") if hasattr(lax, "pcast") else modern.pvary(array, missing)
    )
    return varying


def all_gather_invariant(array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """[R, ...]: all-gather over the axes, with a result whose type does not vary over them."""
    if jax.__version_info__ >= (0, 10):
        gather: Any = lax.all_gather
        gathered: jax.Array = gather(array, axes, to="invarying")
        return gathered
    # 0.8: all_gather has no `to`.
    return all_gather_by_psum(array, axes)


def all_gather_by_psum(array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """As `all_gather_invariant`, computed as a psum with zeros, for twice the traffic."""
    own = jax.numpy.arange(lax.axis_size(axes)) == lax.axis_index(axes)
    slots = jax.numpy.where(own.reshape(-1, *(1,) * array.ndim), array[None], 0)
    weighted_sum: jax.Array = lax.psum(slots, axes)
    return weighted_sum


def axis_is_bound(axis: str) -> bool:
    """Whether a mesh axis is manual here, that is, the caller is inside a `jax.shard_map` over it."""
    try:
        lax.axis_size(axis)
    except NameError:  # 0.8 to 0.10
        return False
    return True


def is_tracer(value: Any) -> bool:
    """Whether a value is traced, so that its elements can't be read."""
    return isinstance(value, jax.core.Tracer)  # 0.8 to 0.10


def instantiate(cotangent: Any) -> jax.Array:
    """A cotangent as an array: with symbolic_zeros=True, `jax.custom_vjp` passes a SymbolicZero where it is zero."""
    symbolic = isinstance(cotangent, SymbolicZero)  # 0.8 to 0.10
    dense: jax.Array = jax.numpy.zeros(cotangent.shape, cotangent.dtype) if symbolic else cotangent
    return dense


def limit_compiled_programs(limit: int) -> None:
    """Clear JAX's caches if they hold more than `limit` compiled programs.

    Linux allows a process 65,530 memory mappings, and XLA:CPU uses about 20 for the program of a loss: after 3,300
    programs the next one kills the process.
    """
    client: Any = jax.devices()[0].client  # 0.8 to 0.11
    if len(client.live_executables()) > limit:
        jax.clear_caches()
