"""Collectives over a sharded vocabulary, in the forward and in the backward.

Forward: each device computes the terms of its rows over its shard of the vocabulary; one all-gather, folded in the
order of the axis, gives every device the same terms, bitwise. The backward from these terms is local.

Gradients are those of the full problem. Under `check_vma=True` (JAX's default) types state which arrays vary between
devices, and gradients are correct for `jax.grad` inside and outside of `jax.shard_map`. Under `check_vma=False` JAX
defines the cotangent of a replicated result as the sum over its devices' copies. The functions here do the same, so
that `jax.grad` outside of `jax.shard_map` is correct, and inside it differentiates the sum of the loss over the
devices, as for every `psum` there.

Every function is the identity where `shard.axes` is empty.
"""

# T = tokens (any leading dimensions), V = vocabulary, R = shards

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
    """Shards and rows cast to vary over the same mesh axes, except that only the shards vary over `axes`.

    An array that is the same on several devices must be cast to varying before a custom derivative: JAX then sums its
    gradient over these devices. Outside `shard_map` this is the identity.
    """
    others = compat.varying_axes(*shards, *rows) - set(axes)
    over = others | set(axes) if vma_checked(axes) else others
    return (*(compat.vary(x, over) for x in shards), *(compat.vary(x, others) for x in rows))


def vma_checked(axes: tuple[str, ...]) -> bool:
    """Whether types state what varies over the axes (`check_vma=True`)."""
    return bool(axes) and set(axes) <= compat.varying_axes(lax.axis_index(axes))


def local_target(target: jax.Array, num_local: int, shard: Shard) -> jax.Array:
    """Classes, [...] or [..., K], as columns of this device's shard, ELSEWHERE if in another; negatives unchanged."""
    if not shard.axes:
        return target
    start = lax.axis_index(shard.axes) * num_local
    return local_columns(target, start, start + num_local, start)


def num_local_classes(num_local: int, num_classes: int, shard: Shard) -> jax.Array | None:
    """Number of classes in this device's shard, whose other columns are padding; None for no padding."""
    if not shard.axes or num_local * lax.axis_size(shard.axes) == num_classes:
        return None
    return jnp.clip(num_classes - lax.axis_index(shard.axes) * num_local, 0, num_local)


def fold_rows(terms: RowTerms, shard: Shard) -> RowTerms:
    """The terms of full rows, the same on every device."""
    return functools.reduce(functools.partial(combine, jnp), _gather(terms, shard))


def fold_pairs(terms: PairTerms, temperature: float, shard: Shard) -> PairTerms:
    """The terms of full rows, the same on every device; m_t and m_s stay maxima of the logits before `temperature`."""
    pieces = _gather(terms, shard)
    m_t = functools.reduce(jnp.maximum, [piece.m_t for piece in pieces])
    m_s = functools.reduce(jnp.maximum, [piece.m_s for piece in pieces])

    def relative(m: jax.Array, new_m: jax.Array) -> jax.Array:
        # Divided after the subtraction: m / temperature at 1e4 would lose digits that the difference keeps.
        return (m - jnp.where(new_m == -jnp.inf, 0, new_m)) / temperature

    pieces = [piece._replace(m_t=relative(piece.m_t, m_t), m_s=relative(piece.m_s, m_s)) for piece in pieces]
    return functools.reduce(functools.partial(combine_pairs, jnp), pieces)._replace(m_t=m_t, m_s=m_s)


def fold_mixture(sums: MixtureTerms, shard: Shard) -> MixtureTerms:
    """The sums over full rows, the same on every device."""
    return MixtureTerms(*(functools.reduce(jnp.add, pieces) for pieces in zip(*_gather(sums, shard), strict=True)))


def _gather(terms: Terms, shard: Shard) -> list[Terms]:
    """Every device's terms, in the order of the axes, by one collective."""
    if not shard.axes:
        return [terms]
    leaves, tree = jax.tree.flatten(terms)
    ndim = min(leaf.ndim for leaf in leaves)
    # [..., K] as K arrays [...].
    flat = [leaf[None] if leaf.ndim == ndim else jnp.moveaxis(leaf, -1, 0) for leaf in leaves]
    # In an all-gather, XLA would also gather rows that it has partitioned; in a psum it does not.
    gather: Callable[..., jax.Array] = compat.all_gather_by_psum if shard.partitioned else compat.all_gather_invariant
    gathered = gather(jnp.concatenate(flat), shard.axes)
    ends = list(itertools.accumulate(len(x) for x in flat))

    def unpack(part: jax.Array) -> Terms:
        pieces = zip(jnp.split(part, ends[:-1]), leaves, strict=True)
        return jax.tree.unflatten(tree, [x[0] if y.ndim == ndim else jnp.moveaxis(x, 0, -1) for x, y in pieces])

    return [unpack(gathered[rank]) for rank in range(gathered.shape[0])]


def full_cotangent(cotangent: jax.Array, shard: Shard) -> jax.Array:
    """The cotangent of a result that is the same on all devices of the axes, from each device's partial cotangent."""
    axes = shard.axes
    if not axes or (vma_checked(axes) and not set(axes) & compat.varying_axes(cotangent)):
        return cotangent
    return lax.psum(cotangent, axes)


def sum_over_replicas(gradient: Any, primal: jax.Array) -> jax.Array:
    """The gradient of an array that is the same on several devices, from each device's partial gradient.

    JAX would sum it too, but after rounding to the primal's dtype; here it is in the dtype of the arithmetic.
    """
    axes = tuple(sorted(compat.varying_axes(gradient) - compat.varying_axes(primal)))
    total: jax.Array = lax.psum(gradient, axes) if axes else gradient
    return total


def replicated_gradient(gradient: jax.Array, primal: jax.Array, shard: Shard) -> jax.Array:
    """The gradient of rows that are the same on all devices of the axes, where each device has computed all of it."""
    if shard.axes and not vma_checked(shard.axes):
        # JAX sums the devices' copies.
        return gradient / lax.axis_size(shard.axes)
    return sum_over_replicas(gradient, primal)


def sum_over_shards(gradient: jax.Array, primal: jax.Array, shard: Shard) -> jax.Array:
    """The gradient of rows that are the same on all devices of the axes, from each device's partial gradient."""
    if shard.axes and not vma_checked(shard.axes):
        # JAX sums the devices' copies once more.
        return lax.pmean(gradient, shard.axes)
    return sum_over_replicas(gradient, primal)
