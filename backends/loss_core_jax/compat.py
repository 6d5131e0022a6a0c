"""APIs of JAX that are private or differ between its versions: one function each, with the version it was seen in."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero


def varying_axes(*arrays: Any) -> frozenset[str]:
    """Mesh axes over which any of the arrays varies, as its type says; empty outside `jax.shard_map`."""
    axes: frozenset[str] = frozenset()
    for array in arrays:
        aval: Any = jax.typeof(array)
        # 0.8: the type has `vma`; 0.10: `manual_axis_type`.
        axes |= aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying
    return axes


def vary(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """The array, with a type that varies over these mesh axes, too."""
    missing = tuple(sorted(axes - varying_axes(array)))
    if not missing:
        return array
    modern: Any = lax
    # 0.8: pvary alone; 0.10: pcast alone.
    varying: jax.Array = (
        modern.pcast(array, missing, to="varying") if hasattr(lax, "pcast") else modern.pvary(array, missing)
    )
    return varying


def all_gather_same(array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """[R, ...] of all devices of the axes, with a type that says that it is the same on each of them."""
    if jax.__version_info__ >= (0, 10):
        gather: Any = lax.all_gather
        gathered: jax.Array = gather(array, axes, to="invarying")
        return gathered
    # 0.8 has no such all_gather.
    return sum_of_slots(array, axes)


def sum_of_slots(array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """As `all_gather_same`, as a sum with zeros, for twice the traffic."""
    own = jax.numpy.arange(lax.axis_size(axes)) == lax.axis_index(axes)
    slots = jax.numpy.where(own.reshape(-1, *(1,) * array.ndim), array[None], 0)
    summed: jax.Array = lax.psum(slots, axes)
    return summed


def axis_is_bound(axis: str) -> bool:
    """Whether a mesh axis is manual here: inside of a `jax.shard_map` over it."""
    try:
        lax.axis_size(axis)
    except NameError:  # 0.8 to 0.10
        return False
    return True


def is_tracer(value: Any) -> bool:
    """Whether a value is traced, so that it can't be read."""
    return isinstance(value, jax.core.Tracer)  # 0.8 to 0.10


def instantiate(cotangent: Any) -> jax.Array:
    """A cotangent as an array: with symbolic_zeros=True, `jax.custom_vjp` hands over a SymbolicZero for none."""
    symbolic = isinstance(cotangent, SymbolicZero)  # 0.8 to 0.10
    dense: jax.Array = jax.numpy.zeros(cotangent.shape, cotangent.dtype) if symbolic else cotangent
    return dense


def forget_programs(most: int) -> None:
    """Drop what JAX has compiled if it is more than `most` programs.

    Linux gives a process 65,530 memory mappings, and XLA:CPU takes about 20 for the program of a loss: with 3,300 of
    them the next one ends the process.
    """
    client: Any = jax.devices()[0].client  # 0.8 to 0.11
    if len(client.live_executables()) > most:
        jax.clear_caches()
