"""What devices that share a vocabulary tell each other, and whose gradient a gradient is.

Forward: each device makes the terms of its rows over its share of the vocabulary; one all-gather, folded in the
order of the axis, gives every device the same terms, bitwise. Backward is local, given these terms.

A gradient is that of the full problem. Under `check_vma=True` (JAX's default) the types say which arrays
differ between devices, and that holds for `jax.grad` inside and outside of `jax.shard_map`. Under
`check_vma=False` JAX counts the cotangent of a replicated result as the sum over its devices' copies; that is
followed here, so that `jax.grad` outside of `jax.shard_map` is right, and inside it differentiates the sum of
the loss over the devices, as it does for every `psum` there.

Every function is the identity where `shard.axes` is empty.
"""

# T = tokens (any leading dimensions), V = vocabulary, V_local = this device's share, R = shards

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from loss_core.row_terms import MixtureTerms, PairTerms, RowTerms, combine, combine_pairs
from loss_core_jax import compat
from loss_core_jax.inputs import local_columns
from loss_core_jax.kernels import Shard

Arrays = tuple[jax.Array, ...]
Terms = TypeVar("Terms", RowTerms, PairTerms, MixtureTerms)


def align(axes: tuple[str, ...], shards: Arrays, rows: Arrays) -> Arrays:
    """Shards and rows made to vary over the same mesh axes, except that only the shards vary over `axes`.

    What was the same on several devices must become varying before a custom derivative sees it: JAX then sums its
    gradient over them. Outside `shard_map` nothing happens.
    """
    others = compat.varying_axes(*shards, *rows) - set(axes)
    over = others | set(axes) if types_tell(axes) else others
    return (*(compat.vary(x, over) for x in shards), *(compat.vary(x, others) for x in rows))


def types_tell(axes: tuple[str, ...]) -> bool:
    """Whether types say what varies over the axes (`check_vma=True`)."""
    return bool(axes) and set(axes) <= compat.varying_axes(lax.axis_index(axes))


def local_target(target: jax.Array, num_local: int, shard: Shard) -> jax.Array:
    """Classes, [...] or [..., K], as columns of this device's share: ELSEWHERE those of others; negative ones stay."""
    if not shard.axes:
        return target
    start = lax.axis_index(shard.axes) * num_local
    return local_columns(target, start, start + num_local, start)


def num_local_classes(num_local: int, num_classes: int, shard: Shard) -> jax.Array | None:
    """How many of this share's columns are classes; None for all."""
    if not shard.axes or num_local * lax.axis_size(shard.axes) == num_classes:
        return None
    return jnp.clip(num_classes - lax.axis_index(shard.axes) * num_local, 0, num_local)


def fold_rows(terms: RowTerms, shard: Shard) -> RowTerms:
    """The terms of whole rows, the same on every device."""
    return functools.reduce(functools.partial(combine, jnp), _gathered(terms, shard))


def fold_pairs(terms: PairTerms, temperature: float, shard: Shard) -> PairTerms:
    """The terms of whole rows, the same on every device; m_t and m_s in units of the logits, as kernels give them."""
    pieces = _gathered(terms, shard)
    m_t = functools.reduce(jnp.maximum, [piece.m_t for piece in pieces])
    m_s = functools.reduce(jnp.maximum, [piece.m_s for piece in pieces])

    def moved(m: jax.Array, largest: jax.Array) -> jax.Array:
        # Divided after the subtraction: m / temperature at 1e4 would lose digits that the difference keeps.
        return (m - jnp.where(largest == -jnp.inf, 0, largest)) / temperature

    relative = [piece._replace(m_t=moved(piece.m_t, m_t), m_s=moved(piece.m_s, m_s)) for piece in pieces]
    return functools.reduce(functools.partial(combine_pairs, jnp), relative)._replace(m_t=m_t, m_s=m_s)


def added(sums: MixtureTerms, shard: Shard) -> MixtureTerms:
    """The sums over whole rows, the same on every device."""
    return MixtureTerms(*(functools.reduce(jnp.add, pieces) for pieces in zip(*_gathered(sums, shard), strict=True)))


def _gathered(terms: Terms, shard: Shard) -> list[Terms]:
    """Every device's terms, in the order of the axes, by one collective."""
    if not shard.axes:
        return [terms]
    leaves, tree = jax.tree.flatten(terms)
    ndim = min(leaf.ndim for leaf in leaves)
    # K numbers of a row as K arrays.
    flat = [leaf[None] if leaf.ndim == ndim else jnp.moveaxis(leaf, -1, 0) for leaf in leaves]
    # XLA would gather rows that are sharded, too: it sums them.
    gather: Callable[..., jax.Array] = compat.sum_of_slots if shard.partitioned else compat.all_gather_same
    every = gather(jnp.concatenate(flat), shard.axes)
    ends = list(itertools.accumulate(len(x) for x in flat))

    def unpacked(part: jax.Array) -> Terms:
        pieces = zip(jnp.split(part, ends[:-1]), leaves, strict=True)
        found = [x[0] if leaf.ndim == ndim else jnp.moveaxis(x, 0, -1) for x, leaf in pieces]
        return jax.tree.unflatten(tree, found)

    return [unpacked(every[rank]) for rank in range(every.shape[0])]


def whole_cotangent(cotangent: jax.Array, shard: Shard) -> jax.Array:
    """The cotangent of a result that is the same on all devices of the axes, from each device's part of it."""
    axes = shard.axes
    if not axes or (types_tell(axes) and not set(axes) & compat.varying_axes(cotangent)):
        return cotangent
    return lax.psum(cotangent, axes)


def summed_over_copies(gradient: Any, primal: jax.Array) -> jax.Array:
    """The gradient of an array that is the same on several devices, from each device's part.

    JAX would sum by itself, but gradients that are rounded already; here they are in the dtype of the arithmetic.
    """
    copies = tuple(sorted(compat.varying_axes(gradient) - compat.varying_axes(primal)))
    total: jax.Array = lax.psum(gradient, copies) if copies else gradient
    return total


def of_every_device(gradient: jax.Array, primal: jax.Array, shard: Shard) -> jax.Array:
    """The gradient of rows that all devices of the axes hold, where each device has made all of it."""
    if shard.axes and not types_tell(shard.axes):
        # JAX sums the devices' copies.
        return gradient / lax.axis_size(shard.axes)
    return summed_over_copies(gradient, primal)


def summed_over_shards(gradient: jax.Array, primal: jax.Array, shard: Shard) -> jax.Array:
    """The gradient of rows that all devices of the axes hold, from each device's part."""
    if shard.axes and not types_tell(shard.axes):
        # JAX sums the copies of the cotangent over the devices once more.
        return lax.pmean(gradient, shard.axes)
    return summed_over_copies(gradient, primal)
