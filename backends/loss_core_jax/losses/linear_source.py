"""Hidden states and head as the source of logits: checked, laid out over devices; and the way back of gradients."""

# T = tokens (any leading dimensions), V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from loss_core_jax import compat, inputs
from loss_core_jax.inputs import ArrayLike
from loss_core_jax.kernels import LinearGradients, LinearRows, Shard
from loss_core_jax.parallel import collectives
from loss_core_jax.parallel.layout import NOWHERE, Layout, Operand, layout_for, over


class Head(NamedTuple):
    """Arrays of the head: weight [V, H], and bias [V] or None."""

    weight_VH: Any
    bias_V: Any = None


def linear_layout(
    loss: Any, hidden: ArrayLike, labels: ArrayLike, weight_VH: ArrayLike, bias_V: ArrayLike | None
) -> tuple[Layout, bool]:
    """The layout of a fused loss's call, whose shapes are checked; and whether hidden states are to be gathered."""
    layout = layout_for(loss.tp_group, hidden, weight_VH, 0)
    is_sequence = loss.sequence_parallel and layout != NOWHERE
    inputs.check_linear(_whole_sequence(hidden, layout) if is_sequence else hidden, labels, weight_VH)
    inputs.check_bias(weight_VH, bias_V)
    return layout, is_sequence and bool(layout.axes)


def _whole_sequence(hidden: ArrayLike, layout: Layout) -> Any:
    """Shape and dtype of all hidden states, for sequence-parallel ones.

    Raises:
        ValueError: there is no sequence dimension, or it does not divide by the axis.
    """
    shape = hidden.shape
    if len(shape) < 2 or (not layout.inside and shape[0] % layout.num_shards):
        raise ValueError(
            f"hidden_states has shape {shape}; with sequence_parallel=True its first dimension must be the sequence, "
            f"in {layout.num_shards} equal shares over the mesh axes {', '.join(map(repr, layout.axes))}."
        )
    return jax.ShapeDtypeStruct((layout.vocab(shape[0]), *shape[1:]), hidden.dtype)


def over_head(
    fn: Callable[..., Any], hidden: jax.Array, head: Head, of_rows: Sequence[jax.Array], layout: Layout, gathers: bool
) -> Any:
    """`fn(hidden, head, *of_rows)` for any layout.

    Args:
        of_rows: arrays in the shape of labels.
        gathers: hidden states are this device's share of the sequence.
    """

    def inside(hidden: jax.Array, *arrays: jax.Array) -> Any:
        head_, rest = arrays[: len(arrays) - len(of_rows)], arrays[len(arrays) - len(of_rows) :]
        axes = frozenset(layout.axes)
        if collectives.types_tell(layout.axes):
            head_ = tuple(compat.vary(x, axes) for x in head_)
            hidden = compat.vary(hidden, axes) if gathers else hidden
        return fn(hidden, Head(*head_), *rest)

    # Rows of the weight that are added are zeros; their logits are taken for -inf.
    of_head = [Operand(x, 0, has_rows=False) for x in head if x is not None]
    return over(layout, inside, Operand(hidden, is_sequence=gathers), *of_head, *map(Operand, of_rows))


def gathered(hidden: jax.Array, shard: Shard, gathers: bool) -> jax.Array:
    """The hidden states of the whole sequence."""
    return lax.all_gather(hidden, shard.axes, axis=0, tiled=True) if gathers else hidden


def local_rows(
    hidden: jax.Array, head: Head, target: jax.Array, inverse: jax.Array | None, num_classes: int, shard: Shard
) -> LinearRows:
    """The rows over this device's share of the vocabulary."""
    num_local = head.weight_VH.shape[0]
    classes = collectives.num_local_classes(num_local, num_classes, shard)
    local = collectives.local_target(target, num_local, shard)
    return LinearRows(hidden, head.weight_VH, local, classes, inverse, head.bias_V)


def input_gradients(
    gradients: LinearGradients, hidden: jax.Array, head: Head, shard: Shard, gathers: bool
) -> tuple[jax.Array, Head]:
    """Gradients by hidden states and head as these came, from each device's part."""
    assert gradients.hidden is not None, "all are wanted"
    if gathers:
        by_hidden = lax.psum_scatter(gradients.hidden, shard.axes, scatter_dimension=0, tiled=True)
    else:
        by_hidden = collectives.summed_over_shards(gradients.hidden, hidden, shard)
    by_weight = collectives.summed_over_copies(gradients.weight_VH, head.weight_VH).astype(head.weight_VH.dtype)
    if head.bias_V is None:
        return by_hidden.astype(hidden.dtype), Head(by_weight)
    by_bias = collectives.summed_over_copies(gradients.bias_V, head.bias_V).astype(head.bias_V.dtype)
    return by_hidden.astype(hidden.dtype), Head(by_weight, by_bias)
