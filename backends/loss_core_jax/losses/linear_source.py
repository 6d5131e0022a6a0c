"""Hidden states and head as the source of logits: checked, laid out over devices; and the way back of gradients."""

# T = tokens (any leading dimensions), V = vocabulary, H = hidden

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from loss_core_jax import compat, inputs
from loss_core_jax.inputs import IGNORED, ArrayLike
from loss_core_jax.kernels import LinearGradients, LinearRows, Shard
from loss_core_jax.losses.base import Loss
from loss_core_jax.losses.rows import PerRow
from loss_core_jax.parallel import collectives
from loss_core_jax.parallel.layout import NOWHERE, Layout, Operand, layout_for, over


class Head(NamedTuple):
    """Arrays of the head: weight [V, H], and bias [V] or None."""

    weight_VH: Any
    bias_V: Any = None


# Hidden states and head.
Source = tuple[jax.Array, Head]


def read_source(
    loss: Loss, hidden: ArrayLike, labels: ArrayLike, weight_VH: ArrayLike, bias_V: ArrayLike | None
) -> tuple[Source, Layout]:
    """Source and layout of a fused loss's call, whose shapes are checked."""
    layout = layout_for(loss.tp_group, hidden, weight_VH, 0)
    inputs.check_bias(weight_VH, bias_V)
    check_head(loss, hidden, labels, weight_VH, layout)
    head = Head(inputs.as_jax(weight_VH), None if bias_V is None else inputs.as_jax(bias_V))
    return (inputs.as_jax(hidden), head), layout


def check_head(
    loss: Loss, hidden: ArrayLike, labels: ArrayLike, weight_VH: ArrayLike, layout: Layout, of: str = ""
) -> None:
    """Check the shapes of one head.

    Args:
        of: what the names of hidden states and weight begin with.
    """
    is_sequence = loss.sequence_parallel and layout != NOWHERE
    inputs.check_linear(_whole_sequence(hidden, layout, of) if is_sequence else hidden, labels, weight_VH, of)


def arithmetic_dtype(source: Source) -> Any:
    """float64 or float32, in which sums over the source's products are made."""
    hidden, head = source
    return inputs.arithmetic_dtype(hidden, head.weight_VH)


def _whole_sequence(hidden: ArrayLike, layout: Layout, of: str) -> Any:
    """Shape and dtype of all hidden states, for sequence-parallel ones.

    Raises:
        ValueError: there is no sequence dimension, or it does not divide by the axis.
    """
    shape = hidden.shape
    if len(shape) < 2 or (not layout.inside and shape[0] % layout.num_shards):
        raise ValueError(
            f"{of}hidden_states has shape {shape}; with sequence_parallel=True its first dimension must be the "
            f"sequence, in {layout.num_shards} equal shares over the mesh axes {', '.join(map(repr, layout.axes))}."
        )
    return jax.ShapeDtypeStruct((layout.vocab(shape[0]), *shape[1:]), hidden.dtype)


def over_heads(fn: Callable[..., Any], sources: Sequence[Source], of_rows: Any, layout: Layout, gathers: bool) -> Any:
    """`fn(*sources, of_rows)` for any layout.

    Args:
        of_rows: tree of arrays whose first dimensions are those of the labels.
        gathers: hidden states are this device's share of the sequence, which `fn` gathers.
    """
    tree = jax.tree.structure((*sources, of_rows))

    def inside(*arrays: jax.Array) -> Any:
        *local, rows = jax.tree.unflatten(tree, arrays)
        if collectives.types_tell(layout.axes):
            vary = functools.partial(compat.vary, axes=frozenset(layout.axes))
            local = [(vary(hidden) if gathers else hidden, jax.tree.map(vary, head)) for hidden, head in local]
        return fn(*local, rows)

    operands = []
    for hidden, head in sources:
        # Rows of the weight that are added are zeros; their logits are taken for -inf.
        of_head = [Operand(x, 0, has_rows=False) for x in jax.tree.leaves(head)]
        operands += [Operand(hidden, is_sequence=gathers), *of_head]
    return over(layout, inside, *operands, *map(Operand, jax.tree.leaves(of_rows)))


def gathered(hidden: jax.Array, shard: Shard, gathers: bool) -> jax.Array:
    """The hidden states of the whole sequence."""
    return lax.all_gather(hidden, shard.axes, axis=0, tiled=True) if gathers else hidden


def local_rows(source: Source, per_row: PerRow, num_classes: int, shard: Shard) -> LinearRows:
    """The rows over this device's share of the vocabulary."""
    hidden, (weight_VH, bias_V) = source
    return LinearRows(hidden, weight_VH, bias_V=bias_V, **per_row.local(len(weight_VH), num_classes, shard))


def input_gradients(
    gradients: LinearGradients, hidden: jax.Array, head: Head, shard: Shard, gathers: bool
) -> tuple[jax.Array | None, Head]:
    """Gradients by hidden states and head as these came, from each device's part; None where they are not wanted."""
    by_hidden = gradients.hidden
    if by_hidden is not None and gathers:
        by_hidden = lax.psum_scatter(by_hidden, shard.axes, scatter_dimension=0, tiled=True).astype(hidden.dtype)
    elif by_hidden is not None:
        by_hidden = collectives.summed_over_shards(by_hidden, hidden, shard).astype(hidden.dtype)
    by_weight, by_bias = (
        None if gradient is None or x is None else collectives.summed_over_copies(gradient, x).astype(x.dtype)
        for gradient, x in zip((gradients.weight_VH, gradients.bias_V), head, strict=True)
    )
    return by_hidden, Head(by_weight, by_bias)


def times_cotangent(gradient: Any, cotangent: jax.Array, target: jax.Array, dtype: Any, *, of_rows: bool) -> Any:
    """A gradient that was made before its cotangent was known, times it; None stays None.

    Args:
        of_rows: it has rows, of which those that are ignored stay 0.
    """
    if gradient is None:
        return None
    # The usual upstream gradient is 1. Where it can be read without a sync, do not make a second [V, H] array for it.
    if gradient.dtype == dtype and inputs.in_host_memory(cotangent) and cotangent == 1:
        return gradient
    return _scaled(gradient, cotangent, target, dtype=dtype, of_rows=of_rows)


@functools.partial(jax.jit, static_argnames=("dtype", "of_rows"))
def _scaled(gradient: jax.Array, cotangent: jax.Array, target: jax.Array, *, dtype: Any, of_rows: bool) -> jax.Array:
    # Ignored rows stay 0, and so does a sum without any other, even if the upstream gradient is inf or NaN.
    ignored = (target == IGNORED)[..., None] if of_rows else jnp.all(target == IGNORED)
    return jnp.where(ignored, 0, gradient * cotangent).astype(dtype)
