"""The layout of a call: the mesh axes that shard vocabulary and rows, and which of them are manual.

There are four kinds of calls:

- without a mesh: the layout is `UNSHARDED`;
- inside `jax.shard_map`, `tp_group` naming axes that are manual there: the arrays are this device's shards;
- outside, with readable shardings (explicit axes, or concrete arrays): the loss wraps itself in `jax.shard_map` over
  every readable axis;
- outside, under `jit` with automatic axes, whose shardings are not readable: XLA partitions the code, which then
  slices no dimension that may be sharded; with `tp_group` the loss wraps itself over that axis alone. Where other
  axes are manual already, XLA partitions over that axis as well: JAX can't differentiate nested `shard_map`s.
"""

# R = shards of the vocabulary

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from loss_core_jax import compat
from loss_core_jax.kernels import Shard

Axes = tuple[str, ...]


class Layout(NamedTuple):
    """How a call is sharded. Hashable: static under jit.

    Attributes:
        axes: mesh axes that shard the vocabulary, in order; () for none.
        num_shards: product of their sizes.
        inside: whether the call is inside `jax.shard_map` over these axes, so that arrays are shards.
        partitioned: whether rows may be sharded over automatic axes, so that no code may slice them.
        lead: mesh axes of each leading dimension of the labels, where readable.
        manual: axes over which the loss wraps itself in `jax.shard_map`; empty for no wrapping.
        mesh: the mesh of `manual` when no mesh is set, else None.
        hint: axes over which XLA is asked to shard the vocabulary, by a sharding constraint.
    """

    axes: Axes = ()
    num_shards: int = 1
    inside: bool = False
    partitioned: bool = False
    lead: tuple[Axes, ...] = ()
    manual: frozenset[str] = frozenset()
    mesh: Any = None
    hint: Axes = ()

    def vocab(self, size: int) -> int:
        """Number of classes of the full vocabulary, where the caller's array has `size`."""
        return size * self.num_shards if self.inside else size

    @property
    def shard(self) -> Shard:
        """How arrays are sharded in the function that `call_sharded` calls."""
        return Shard(self.axes, self.partitioned)


UNSHARDED = Layout()


class Operand(NamedTuple):
    """An array of a call, and the meaning of its dimensions.

    Attributes:
        vocab_dim: -1 or 0, the dimension of the vocabulary; None for none.
        has_rows: whether its leading dimensions are those of the labels.
        is_sequence: whether the first of these is also sharded over the axes of the vocabulary.
        padding: the value of classes that are added as padding.
    """

    array: jax.Array
    vocab_dim: int | None = None
    has_rows: bool = True
    is_sequence: bool = False
    padding: float = 0.0


def axis_names(tp_group: Any) -> Axes:
    """The mesh axes that a `tp_group` names.

    Raises:
        TypeError: not a name or a tuple of names.
        ValueError: no name at all, or one twice.
    """
    names = (tp_group,) if isinstance(tp_group, str) else tp_group
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            "tp_group on jax is the name of a mesh axis (a str) or a tuple of names, got "
            f"{type(tp_group).__module__}.{type(tp_group).__name__}. A torch process group belongs to a torch backend."
        )
    if not names or len(set(names)) != len(names):
        raise ValueError(f"tp_group must name at least one mesh axis, and each once, got {tp_group!r}.")
    return names


def layout_for(tp_group: Any, rows: Any, vocab_array: Any, vocab_dim: int) -> Layout:
    """The layout of a call.

    Args:
        tp_group: None or names of mesh axes.
        rows: array whose dimensions except the last are those of the labels.
        vocab_array, vocab_dim: array with the vocabulary, and its dimension there.
    Raises:
        ValueError: an axis that is neither bound nor in a mesh; names the axes of the mesh.
    """
    axes = () if tp_group is None else axis_names(tp_group)
    context = jax.sharding.get_abstract_mesh()
    if axes and all(map(compat.axis_is_bound, axes)):
        return Layout(
            axes, lax.axis_size(axes), inside=True, partitioned=_is_sharded(context, frozenset(context.manual_axes))
        )
    meshes = (context, *(jax.typeof(x).sharding.mesh for x in (rows, vocab_array)))
    explicit = next((mesh for mesh in meshes if mesh.explicit_axes), None)
    shardings = [_read_sharding(rows, explicit), _read_sharding(vocab_array, explicit)]
    mesh = next((m for m in (context, *(s.mesh for s in shardings if s)) if m is not None and not m.empty), None)
    _check_axes(tp_group, axes, mesh, traced=None in shardings)
    # Explicit axes are part of the arrays' types even where they have one device.
    if mesh is None or not (context.explicit_axes or _is_sharded(mesh, frozenset(context.manual_axes))):
        return UNSHARDED
    if context.manual_axes and not context.explicit_axes:
        return Layout(partitioned=True, hint=axes)
    manual, lead = frozenset(axes), ((),) * (rows.ndim - 1)
    rows_sharding, vocab_sharding = shardings
    if rows_sharding and vocab_sharding:
        manual |= rows_sharding.known_axes | vocab_sharding.known_axes
        lead = tuple(_without(entry, axes) for entry in rows_sharding.spec[:-1])
        # Tokens and weight sharded over the same axis is FSDP: the weight is gathered over it.
        axes = axes or _without(vocab_sharding.spec[vocab_dim], sum(lead, ()))
    if not manual and context.empty:
        return UNSHARDED  # only one of the arrays is on a mesh, and no mesh is set for a sharding constraint
    partitioned = _is_sharded(mesh, manual | frozenset(context.manual_axes))
    num_shards = math.prod(mesh.shape[axis] for axis in axes)
    return Layout(axes, num_shards, False, partitioned, lead, manual, mesh if context.empty and manual else None)


def call_sharded(layout: Layout, fn: Callable[..., jax.Array], *operands: Operand) -> jax.Array:
    """`fn(*arrays)`, a result of the shape of the labels, wrapped in `jax.shard_map` over `layout.manual` if any."""
    if not layout.manual:
        return fn(*(_constrained(x, layout) for x in operands))
    mesh = jax.sharding.get_abstract_mesh() if layout.mesh is None else layout.mesh
    arrays, specs = [_padded(x, layout) for x in operands], tuple(_spec(x, layout) for x in operands)
    if set(mesh.explicit_axes) & layout.manual:
        # Arrays with explicit axes are resharded only by an explicit call.
        arrays = [
            jax.sharding.reshard(x, spec if layout.mesh is None else NamedSharding(layout.mesh, spec))
            for x, spec in zip(arrays, specs, strict=True)
        ]
    wrapped = jax.shard_map(
        fn, mesh=layout.mesh, in_specs=specs, out_specs=_partition_spec(layout.lead), axis_names=set(layout.manual)
    )
    result: jax.Array = wrapped(*arrays)
    return result


def _constrained(operand: Operand, layout: Layout) -> jax.Array:
    """The array with the vocabulary constrained to be sharded over the axes of the hint, if divisible by them."""
    array, dim = operand.array, operand.vocab_dim
    if dim is None or not layout.hint:
        return array
    mesh = jax.sharding.get_abstract_mesh()
    if array.shape[dim] % math.prod(mesh.shape[axis] for axis in layout.hint):
        return array
    spec: list[Any] = [P.UNCONSTRAINED] * array.ndim
    spec[dim] = layout.hint
    constrained: jax.Array = lax.with_sharding_constraint(array, P(*spec))
    return constrained


def _padded(operand: Operand, layout: Layout) -> jax.Array:
    """The array padded along the vocabulary so that every shard has the same size."""
    array, dim = operand.array, operand.vocab_dim
    if dim is None or not (missing := -array.shape[dim] % layout.num_shards):
        return array
    widths = [(0, 0)] * array.ndim
    widths[dim] = (0, missing)
    return jnp.pad(array, widths, constant_values=operand.padding)


def _spec(operand: Operand, layout: Layout) -> P:
    """The PartitionSpec of the array."""
    entries: list[Axes] = [()] * operand.array.ndim
    if operand.has_rows:
        entries[: len(layout.lead)] = layout.lead
    if operand.is_sequence:
        entries[0] = (*entries[0], *layout.axes)
    if operand.vocab_dim is not None:
        entries[operand.vocab_dim] = layout.axes
    return _partition_spec(entries)


def _partition_spec(entries: Any) -> P:
    return P(*(entry or None for entry in entries))


class _Sharding(NamedTuple):
    """The readable part of an array's sharding: mesh, axes of each dimension, and the axes where it is known."""

    mesh: Any
    spec: tuple[Axes, ...]
    known_axes: frozenset[str]


def _read_sharding(array: Any, explicit: Any) -> _Sharding | None:
    """The sharding of an array, where readable: over explicit axes by its type, over all axes of a concrete array.

    Args:
        explicit: the mesh with explicit axes that is set or on which another array is, or None. An array on no mesh is
            replicated over it, as for JAX's own functions.
    """
    typed: Any = jax.typeof(array).sharding
    if typed.mesh.explicit_axes:
        return _Sharding(typed.mesh, _axes_of_dims(typed.spec, array.ndim), frozenset(typed.mesh.explicit_axes))
    if explicit is not None and typed.mesh.empty:
        return _Sharding(explicit, _axes_of_dims((), array.ndim), frozenset(explicit.explicit_axes))
    if compat.is_tracer(array):
        return None
    sharding = getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return _Sharding(None, _axes_of_dims((), array.ndim), frozenset())
    return _Sharding(sharding.mesh, _axes_of_dims(sharding.spec, array.ndim), frozenset(sharding.mesh.axis_names))


def _axes_of_dims(spec: Any, ndim: int) -> tuple[Axes, ...]:
    named = [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in spec]
    return (*named, *((),) * (ndim - len(named)))


def _without(entry: Axes, axes: Axes) -> Axes:
    return tuple(axis for axis in entry if axis not in axes)


def _is_sharded(mesh: Any, known: frozenset[str]) -> bool:
    """Whether an axis of the mesh that is not in `known` has more than one device."""
    return any(mesh.shape[axis] > 1 for axis in mesh.axis_names if axis not in known)


def _check_axes(tp_group: Any, axes: Axes, mesh: Any, *, traced: bool) -> None:
    if not axes:
        return
    if mesh is None:
        raise ValueError(
            f"tp_group={tp_group!r} names no mesh axis here: no mesh is set, and "
            + (
                "a traced argument (under jax.jit, jax.grad, ...) does not tell on which mesh it lies, unless its axes "
                "are explicit. Call the function under `with jax.set_mesh(mesh)`, or the loss inside jax.shard_map."
                if traced
                else "no argument lies on one. Call the loss inside jax.shard_map, or under `with jax.set_mesh(mesh)`, "
                "or with arrays of a NamedSharding."
            )
        )
    free = [axis for axis in mesh.axis_names if axis not in mesh.manual_axes]
    if missing := [axis for axis in axes if axis not in free]:
        raise ValueError(
            f"tp_group={tp_group!r}: {', '.join(map(repr, missing))} can't be used here; the axes of the mesh are "
            f"{', '.join(map(repr, mesh.axis_names))}"
            + (f", of which {', '.join(map(repr, mesh.manual_axes))} manual already." if mesh.manual_axes else ".")
        )
