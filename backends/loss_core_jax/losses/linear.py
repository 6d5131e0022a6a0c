"""Any loss over hidden states and heads: the logits of all tokens are never held.

Rows have one source of logits, hidden states and a head; pairs have two. Two derivatives, because what is known in the
forward differs:

- `summed`, where no vocabulary is sharded: the factor of every row is known, so the forward that runs under
  differentiation makes the gradients while a chunk's logits are at hand. One product for the logits of each source, and
  one for each gradient that is wanted.
- `over_sources`: upstream gradients, or the terms of other devices, come later, so the backward makes each chunk's
  logits again.
"""

# T = tokens (any leading dimensions), V = vocabulary, H = hidden

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from loss_core_jax import compat, inputs
from loss_core_jax.inputs import IGNORED, ArrayLike
from loss_core_jax.kernels import LinearGradients, Shard, Wanted
from loss_core_jax.losses.base import Loss
from loss_core_jax.parallel import collectives
from loss_core_jax.parallel.layout import NOWHERE, Layout, Operand, layout_for, over
from loss_core_jax.reduction import RowResults, total, valid_upstream


class Head(NamedTuple):
    """Arrays of the head: weight [V, H], and bias [V] or None."""

    weight_VH: Any
    bias_V: Any = None


# Hidden states and head.
Source = tuple[jax.Array, Head]
Sources = tuple[Source, ...]


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


class LinearLoss(Protocol):
    """What a loss is to its sources; hashable, static in a call.

    Hidden states are of the whole sequence, heads this device's share of the vocabulary. `per_row` is a tree of arrays
    over the rows, among them `target`.
    """

    @property
    def shard(self) -> Shard: ...

    @property
    def gathers(self) -> bool:
        """Whether hidden states come as this device's share of the sequence."""
        ...

    def results(self, sources: Sources, per_row: Any) -> tuple[RowResults, Any]:
        """Values and metrics of each row, from terms of all devices; and what `gradients` needs of them."""
        ...

    def gradients(
        self, sources: Sources, per_row: Any, kept: Any, cotangents: RowResults
    ) -> tuple[Sequence[LinearGradients], Any]:
        """Gradients of each source, this device's part; and those of the arrays per row."""
        ...

    def results_and_gradients(
        self, sources: Sources, per_row: Any, upstream: jax.Array, wanted: Sequence[Wanted]
    ) -> tuple[RowResults, Sequence[LinearGradients]]:
        """Values and metrics, and gradients of upstream * the one value of each row, where no vocabulary is sharded."""
        ...


def over_sources(sources: Sources, per_row: Any, loss: LinearLoss, layout: Layout) -> RowResults:
    """Values and metrics of each row, for any layout; 0 where the target is IGNORED, NaN where it is INVALID."""
    tree = jax.tree.structure((sources, per_row))

    def inside(*arrays: jax.Array) -> Any:
        local, rows = jax.tree.unflatten(tree, arrays)
        if collectives.types_tell(layout.axes):
            vary = functools.partial(compat.vary, axes=frozenset(layout.axes))
            local = tuple((vary(x) if loss.gathers else x, jax.tree.map(vary, head)) for x, head in local)
        return _rows(local, rows, loss)

    operands = []
    for hidden, head in sources:
        # Rows of the weight that are added are zeros; their logits are taken for -inf.
        of_head = [Operand(x, 0, has_rows=False) for x in jax.tree.leaves(head)]
        operands += [Operand(hidden, is_sequence=loss.gathers), *of_head]
    found: Any = over(layout, inside, *operands, *map(Operand, jax.tree.leaves(per_row)))
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rows(sources: Sources, per_row: Any, loss: LinearLoss) -> RowResults:
    return _forward(sources, per_row, loss)[0]


def _forward(sources: Sources, per_row: Any, loss: LinearLoss) -> tuple[RowResults, Any]:
    def whole(hidden: jax.Array) -> jax.Array:
        return lax.all_gather(hidden, loss.shard.axes, axis=0, tiled=True) if loss.gathers else hidden

    sources = tuple((whole(hidden), head) for hidden, head in sources)
    results, kept = loss.results(sources, per_row)
    return results, (sources, per_row, kept)


def _backward(loss: LinearLoss, residuals: Any, cotangents: RowResults) -> tuple[Any, Any]:
    sources, per_row, kept = residuals
    # All are wanted: in `jax.shard_map` JAX does not say which are not, and leaves out what is not used.
    gradients, by_row = loss.gradients(sources, per_row, kept, cotangents)
    parts = zip(gradients, sources, strict=True)
    return tuple(_source_gradients(found, source, loss) for found, source in parts), by_row


_rows.defvjp(_forward, _backward)


def _source_gradients(gradients: Any, source: Source, loss: LinearLoss) -> tuple[Any, Head]:
    """Gradients by hidden states and head as these came, from each device's part."""
    by_hidden, (hidden, head), shard = gradients.hidden, source, loss.shard
    if loss.gathers:
        by_hidden = lax.psum_scatter(by_hidden, shard.axes, scatter_dimension=0, tiled=True)
    else:
        by_hidden = collectives.summed_over_shards(by_hidden, hidden, shard)
    by_weight, by_bias = (
        None if gradient is None or x is None else collectives.summed_over_copies(gradient, x).astype(x.dtype)
        for gradient, x in zip((gradients.weight_VH, gradients.bias_V), head, strict=True)
    )
    return by_hidden.astype(hidden.dtype), Head(by_weight, by_bias)


def summed(
    sources: Sources, per_row: Any, scale: jax.Array, loss: LinearLoss, layout: Layout, *, skip: bool = False
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Sum over rows of scale * value, a scalar in the dtype of the arithmetic; and the metrics of each row.

    Args:
        scale: [...] factor per row, in the dtype of the arithmetic; differentiable.
        skip: leave chunks of ignored rows out where that needs no sync, and gradients are wanted: XLA compiles a
            forward with the sort and the branch for more than half as long again.
    """
    if layout != NOWHERE:
        (value,), metrics = over_sources(sources, per_row, loss, layout)
        return total(value, scale, None), metrics
    arguments = (sources, per_row, scale)
    axes = compat.varying_axes(*jax.tree.leaves(arguments))
    aligned = jax.tree.map(lambda x: compat.vary(x, axes), arguments)
    found: Any = _summed(*aligned, loss, skip)
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _summed(sources: Sources, per_row: Any, scale: jax.Array, loss: LinearLoss, skip: bool) -> Any:
    ((value,), metrics), _ = loss.results(sources, per_row)
    return jnp.sum(value * scale), metrics


def _summed_forward(sources: Any, per_row: Any, scale: Any, loss: LinearLoss, skip: bool) -> tuple[Any, Any]:
    # With symbolic zeros each argument says whether it is differentiated: a frozen weight costs no product.
    perturbed = jax.tree.map(lambda x: x.perturbed, sources)
    wanted = [Wanted(hidden, head.weight_VH, bool(head.bias_V), skip) for hidden, head in perturbed]
    sources, per_row, scale = jax.tree.map(lambda x: x.value, (sources, per_row, scale))
    upstream = valid_upstream(scale, per_row.target)
    ((value,), metrics), gradients = loss.results_and_gradients(sources, per_row, upstream, wanted)
    # Empty arrays carry the dtypes to the backward.
    likes = jax.tree.map(lambda x: jnp.zeros(0, x.dtype), sources)
    return (jnp.sum(value * scale), metrics), (gradients, value, per_row.target, likes)


def _summed_backward(loss: LinearLoss, skip: bool, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    gradients, value, target, likes = residuals
    cotangent = compat.instantiate(cotangents[0])

    def times(gradient: Any, like: Any, *, of_rows: bool = False) -> Any:
        dtype = None if like is None else like.dtype
        return _times(gradient, cotangent, target, dtype, of_rows=of_rows)

    by_sources = tuple(
        (times(found.hidden, hidden, of_rows=True), Head(*map(times, found[1:], head)))
        for found, (hidden, head) in zip(gradients, likes, strict=True)
    )
    return by_sources, None, times(value[..., None], value, of_rows=True)[..., 0]


_summed.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)


def _times(gradient: Any, cotangent: jax.Array, target: jax.Array, dtype: Any, *, of_rows: bool) -> Any:
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
