"""Where the vocabulary and the rows of a call lie: on which mesh axes, and who takes care of them.

A call is in one of four places:

- no mesh: the layout is `NOWHERE`;
- inside `jax.shard_map`, `tp_group` naming axes that are manual there: the arrays are this device's share;
- outside, with shardings that can be read (explicit axes, or arrays that exist): the loss wraps itself in
  `jax.shard_map` over every axis that it can read;
- outside, under `jit` with automatic axes, whose shardings can't be read: XLA partitions the code, which then
  slices no dimension that may be sharded; with `tp_group` the loss wraps itself over that axis alone. Where other
  axes are manual already it leaves that axis to XLA, too: JAX can't differentiate one `shard_map` in another.
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
    """Hashable, so that it can be a static argument.

    Attributes:
        axes: mesh axes that shard the vocabulary, in order; () for none.
        num_shards: product of their sizes.
        inside: whether they are manual at the call, so that arrays hold one shard.
        whole: whether rows may be sharded over axes that XLA takes care of, so that no code may slice them.
        lead: mesh axes of each leading dimension of the labels, as far as they can be read.
        manual: axes over which the loss wraps itself; empty when it does not.
        mesh: their mesh when no mesh is set, else None.
        hint: axes over which XLA is told to shard the vocabulary.
    """

    axes: Axes = ()
    num_shards: int = 1
    inside: bool = False
    whole: bool = False
    lead: tuple[Axes, ...] = ()
    manual: frozenset[str] = frozenset()
    mesh: Any = None
    hint: Axes = ()

    def vocab(self, size: int) -> int:
        """Classes of the full problem, given the vocabulary of the array that the caller holds."""
        return size * self.num_shards if self.inside else size

    @property
    def shard(self) -> Shard:
        """What the arrays hold in the function that `over` calls."""
        return Shard(self.axes, self.whole)


NOWHERE = Layout()


class Operand(NamedTuple):
    """An array of a call, and what its dimensions are.

    Attributes:
        vocab_dim: -1 or 0, the dimension of the vocabulary; None for none.
        has_rows: whether it begins with the dimensions of the labels.
        is_sequence: whether the first of these is sharded over the axes of the vocabulary, too.
        padding: what classes that are added hold.
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
        rows: array whose dimensions but the last are those of the labels.
        vocab_array, vocab_dim: array and dimension that hold the vocabulary.
    Raises:
        ValueError: an axis that neither is bound nor belongs to a mesh; names the axes there are.
    """
    axes = () if tp_group is None else axis_names(tp_group)
    context = jax.sharding.get_abstract_mesh()
    if axes and all(map(compat.axis_is_bound, axes)):
        return Layout(
            axes, lax.axis_size(axes), inside=True, whole=_is_sharded(context, frozenset(context.manual_axes))
        )
    meshes = (context, *(jax.typeof(x).sharding.mesh for x in (rows, vocab_array)))
    explicit = next((mesh for mesh in meshes if mesh.explicit_axes), None)
    found = [_readable(rows, explicit), _readable(vocab_array, explicit)]
    mesh = next((m for m in (context, *(s.mesh for s in found if s)) if m is not None and not m.empty), None)
    _check_axes(tp_group, axes, mesh, traced=None in found)
    # Explicit axes belong to the types of arrays even where they have one device.
    if mesh is None or not (context.explicit_axes or _is_sharded(mesh, frozenset(context.manual_axes))):
        return NOWHERE
    if context.manual_axes and not context.explicit_axes:
        return Layout(whole=True, hint=axes)
    manual, lead = frozenset(axes), ((),) * (rows.ndim - 1)
    rows_spec, vocab_spec = found
    if rows_spec and vocab_spec:
        manual |= rows_spec.axes | vocab_spec.axes
        lead = tuple(_without(entry, axes) for entry in rows_spec.spec[:-1])
        # Tokens and weight over one axis is FSDP: the weight is gathered, since the rows can't be.
        axes = axes or _without(vocab_spec.spec[vocab_dim], sum(lead, ()))
    if not manual and context.empty:
        return NOWHERE  # one array of several lies on a mesh, and none is set: nothing can be told to XLA
    whole = _is_sharded(mesh, manual | frozenset(context.manual_axes))
    num_shards = math.prod(mesh.shape[axis] for axis in axes)
    return Layout(axes, num_shards, False, whole, lead, manual, mesh if context.empty and manual else None)


def over(layout: Layout, fn: Callable[..., jax.Array], *operands: Operand) -> jax.Array:
    """`fn(*arrays)`, of the shape of the labels, with `jax.shard_map` around it if the layout says so."""
    if not layout.manual:
        return fn(*(_hinted(x, layout) for x in operands))
    mesh = jax.sharding.get_abstract_mesh() if layout.mesh is None else layout.mesh
    arrays, specs = [_padded(x, layout) for x in operands], tuple(_spec(x, layout) for x in operands)
    if set(mesh.explicit_axes) & layout.manual:
        # Explicit axes are moved by name only.
        arrays = [
            jax.sharding.reshard(x, spec if layout.mesh is None else NamedSharding(layout.mesh, spec))
            for x, spec in zip(arrays, specs, strict=True)
        ]
    wrapped = jax.shard_map(
        fn, mesh=layout.mesh, in_specs=specs, out_specs=P(*_entry(layout.lead)), axis_names=set(layout.manual)
    )
    result: jax.Array = wrapped(*arrays)
    return result


def _hinted(operand: Operand, layout: Layout) -> jax.Array:
    """The array, with XLA told to shard the vocabulary over the axes of the hint if it divides by them."""
    array, dim = operand.array, operand.vocab_dim
    if dim is None or not layout.hint:
        return array
    mesh = jax.sharding.get_abstract_mesh()
    if array.shape[dim] % math.prod(mesh.shape[axis] for axis in layout.hint):
        return array
    spec: list[Any] = [P.UNCONSTRAINED] * array.ndim
    spec[dim] = layout.hint
    told: jax.Array = lax.with_sharding_constraint(array, P(*spec))
    return told


def _padded(operand: Operand, layout: Layout) -> jax.Array:
    """The array with classes added, so that every shard has the same size."""
    array, dim = operand.array, operand.vocab_dim
    if dim is None or not (missing := -array.shape[dim] % layout.num_shards):
        return array
    widths = [(0, 0)] * array.ndim
    widths[dim] = (0, missing)
    return jnp.pad(array, widths, constant_values=operand.padding)


def _spec(operand: Operand, layout: Layout) -> P:
    """How the array is sharded."""
    entries: list[Axes] = [()] * operand.array.ndim
    if operand.has_rows:
        entries[: len(layout.lead)] = layout.lead
    if operand.is_sequence:
        entries[0] = (*entries[0], *layout.axes)
    if operand.vocab_dim is not None:
        entries[operand.vocab_dim] = layout.axes
    return P(*_entry(entries))


def _entry(entries: Any) -> tuple[Axes | None, ...]:
    return tuple(entry or None for entry in entries)


class _Readable(NamedTuple):
    """Mesh, mesh axes of each dimension, and the axes about which that tells."""

    mesh: Any
    spec: tuple[Axes, ...]
    axes: frozenset[str]


def _readable(array: Any, explicit: Any) -> _Readable | None:
    """The sharding of an array, where it can be read: explicit axes of its type, or all axes of a concrete array.

    Args:
        explicit: the mesh with explicit axes that is set or on which another array lies, or None. An array that lies on
            no mesh is whole on each of its devices, as for JAX's own functions.
    """
    typed: Any = jax.typeof(array).sharding
    if typed.mesh.explicit_axes:
        return _Readable(typed.mesh, _entries(typed.spec, array.ndim), frozenset(typed.mesh.explicit_axes))
    if explicit is not None and typed.mesh.empty:
        return _Readable(explicit, _entries((), array.ndim), frozenset(explicit.explicit_axes))
    if compat.is_tracer(array):
        return None
    sharding = getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return _Readable(None, _entries((), array.ndim), frozenset())
    return _Readable(sharding.mesh, _entries(sharding.spec, array.ndim), frozenset(sharding.mesh.axis_names))


def _entries(spec: Any, ndim: int) -> tuple[Axes, ...]:
    named = [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in spec]
    return (*named, *((),) * (ndim - len(named)))


def _without(entry: Axes, axes: Axes) -> Axes:
    return tuple(axis for axis in entry if axis not in axes)


def _is_sharded(mesh: Any, known: frozenset[str]) -> bool:
    """Whether an axis of the mesh that is not among the known ones has more than one device."""
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
