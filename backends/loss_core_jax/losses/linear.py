"""Losses over hidden states and heads; the logits of all tokens never exist at a time.

Rows have one source of logits, hidden states and a head; pairs have two. There are two custom derivatives:

- `weighted_sum`, where no vocabulary is sharded: the factor of every row is known in the forward, so that the forward
  under differentiation computes the gradients from the same logits of each chunk as the loss. One product for the
  logits of each source, and one for each gradient that is needed.
- `results_from_sources`: upstream gradients, or the terms of other devices, are known later, so that the backward
  recomputes the logits of each chunk.
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
from loss_core_jax.parallel.layout import UNSHARDED, Layout, Operand, call_sharded, layout_for
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
    """Source and layout of a fused loss's call, after a check of dtypes and shapes."""
    layout = layout_for(loss.tp_group, hidden, weight_VH, 0)
    inputs.check_bias(weight_VH, bias_V)
    check_head(loss, hidden, labels, weight_VH, layout)
    head = Head(inputs.as_jax(weight_VH), None if bias_V is None else inputs.as_jax(bias_V))
    return (inputs.as_jax(hidden), head), layout


def check_head(
    loss: Loss, hidden: ArrayLike, labels: ArrayLike, weight_VH: ArrayLike, layout: Layout, prefix: str = ""
) -> None:
    """Check dtypes and shapes of one source; `prefix` as in `inputs.check_linear`."""
    is_sequence = loss.sequence_parallel and layout != UNSHARDED
    inputs.check_linear(_full_sequence(hidden, layout, prefix) if is_sequence else hidden, labels, weight_VH, prefix)


def arithmetic_dtype(source: Source) -> Any:
    """The dtype of the arithmetic over a source, float64 or float32."""
    hidden, head = source
    return inputs.arithmetic_dtype(hidden, head.weight_VH)


def _full_sequence(hidden: ArrayLike, layout: Layout, prefix: str) -> Any:
    """Shape and dtype of the gathered hidden states, for sequence-parallel ones.

    Raises:
        ValueError: there is no sequence dimension, or its size is not divisible by that of the mesh axes.
    """
    shape = hidden.shape
    if len(shape) < 2 or (not layout.inside and shape[0] % layout.num_shards):
        raise ValueError(
            f"{prefix}hidden_states has shape {shape}; with sequence_parallel=True its first dimension must be the "
            f"sequence, in {layout.num_shards} equal shares over the mesh axes {', '.join(map(repr, layout.axes))}."
        )
    return jax.ShapeDtypeStruct((layout.vocab(shape[0]), *shape[1:]), hidden.dtype)


class LinearLoss(Protocol):
    """A loss over sources. Hashable: static under jit.

    Hidden states are those of the full sequence, heads this device's shard of the vocabulary. `per_row` is a tree of
    arrays over the rows with a field `target`.
    """

    @property
    def shard(self) -> Shard: ...

    @property
    def sequence_sharded(self) -> bool:
        """Whether the caller's hidden states are sharded over the sequence and must be gathered."""
        ...

    def results(self, sources: Sources, per_row: Any) -> tuple[RowResults, Any]:
        """Values and metrics of each row, from terms of all devices; and the residuals of `gradients`."""
        ...

    def gradients(
        self, sources: Sources, per_row: Any, saved: Any, cotangents: RowResults
    ) -> tuple[Sequence[LinearGradients], Any]:
        """This device's partial gradients of each source, and the gradients of `per_row`.

        Args:
            saved: the residuals that `results` returned.
        """
        ...

    def results_and_gradients(
        self, sources: Sources, per_row: Any, upstream: jax.Array, wanted: Sequence[Wanted]
    ) -> tuple[RowResults, Sequence[LinearGradients]]:
        """Values and metrics, and gradients of upstream * the one value of each row, where no vocabulary is sharded."""
        ...


def results_from_sources(sources: Sources, per_row: Any, loss: LinearLoss, layout: Layout) -> RowResults:
    """Values and metrics of each row, for any layout; 0 where the target is IGNORED, NaN where it is INVALID."""
    tree = jax.tree.structure((sources, per_row))

    def local_results(*arrays: jax.Array) -> Any:
        local, rows = jax.tree.unflatten(tree, arrays)
        if collectives.vma_checked(layout.axes):
            vary = functools.partial(compat.vary, axes=frozenset(layout.axes))
            local = tuple((vary(x) if loss.sequence_sharded else x, jax.tree.map(vary, head)) for x, head in local)
        return _rows(local, rows, loss)

    operands = []
    for hidden, head in sources:
        # The weight is padded with zeros; kernels set the logits of padding to -inf.
        head_operands = [Operand(x, 0, has_rows=False) for x in jax.tree.leaves(head)]
        operands += [Operand(hidden, is_sequence=loss.sequence_sharded), *head_operands]
    results: Any = call_sharded(layout, local_results, *operands, *map(Operand, jax.tree.leaves(per_row)))
    return results


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rows(sources: Sources, per_row: Any, loss: LinearLoss) -> RowResults:
    return _forward(sources, per_row, loss)[0]


def _forward(sources: Sources, per_row: Any, loss: LinearLoss) -> tuple[RowResults, Any]:
    def gather(hidden: jax.Array) -> jax.Array:
        return lax.all_gather(hidden, loss.shard.axes, axis=0, tiled=True) if loss.sequence_sharded else hidden

    sources = tuple((gather(hidden), head) for hidden, head in sources)
    results, saved = loss.results(sources, per_row)
    return results, (sources, per_row, saved)


def _backward(loss: LinearLoss, residuals: Any, cotangents: RowResults) -> tuple[Any, Any]:
    sources, per_row, saved = residuals
    # Computes all gradients: in `jax.shard_map` JAX does not say which are needed, and removes those that are unused.
    partial, per_row_gradients = loss.gradients(sources, per_row, saved, cotangents)
    parts = zip(partial, sources, strict=True)
    return tuple(_source_gradients(gradients, source, loss) for gradients, source in parts), per_row_gradients


_rows.defvjp(_forward, _backward)


def _source_gradients(gradients: Any, source: Source, loss: LinearLoss) -> tuple[Any, Head]:
    """Gradients of hidden states and head, in their shardings and dtypes, from each device's partial gradients."""
    dhidden, (hidden, head), shard = gradients.hidden, source, loss.shard
    if loss.sequence_sharded:
        dhidden = lax.psum_scatter(dhidden, shard.axes, scatter_dimension=0, tiled=True)
    else:
        dhidden = collectives.sum_over_shards(dhidden, hidden, shard)
    dweight, dbias = (
        None if gradient is None or x is None else collectives.sum_over_replicas(gradient, x).astype(x.dtype)
        for gradient, x in zip((gradients.weight_VH, gradients.bias_V), head, strict=True)
    )
    return dhidden.astype(hidden.dtype), Head(dweight, dbias)


def weighted_sum(
    sources: Sources, per_row: Any, scale: jax.Array, loss: LinearLoss, layout: Layout, *, skip: bool = False
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Sum over rows of scale * value, a scalar in the dtype of the arithmetic; and the metrics of each row.

    Args:
        scale: [...] factor per row, in the dtype of the arithmetic; differentiable.
        skip: skip chunks of ignored rows where that needs no sync and gradients are computed. Not in a forward alone:
            the sort and the branch make its compilation take more than half as long again.
    """
    if layout != UNSHARDED:
        (value,), metrics = results_from_sources(sources, per_row, loss, layout)
        return total(value, scale, None), metrics
    arguments = (sources, per_row, scale)
    axes = compat.varying_axes(*jax.tree.leaves(arguments))
    aligned = jax.tree.map(lambda x: compat.vary(x, axes), arguments)
    result: Any = _weighted_sum(*aligned, loss, skip)
    return result


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _weighted_sum(sources: Sources, per_row: Any, scale: jax.Array, loss: LinearLoss, skip: bool) -> Any:
    ((value,), metrics), _ = loss.results(sources, per_row)
    return jnp.sum(value * scale), metrics


def _weighted_sum_forward(sources: Any, per_row: Any, scale: Any, loss: LinearLoss, skip: bool) -> tuple[Any, Any]:
    # symbolic_zeros=True shows which arguments are differentiated: a frozen weight costs no product.
    perturbed = jax.tree.map(lambda x: x.perturbed, sources)
    wanted = [Wanted(hidden, head.weight_VH, bool(head.bias_V), skip) for hidden, head in perturbed]
    sources, per_row, scale = jax.tree.map(lambda x: x.value, (sources, per_row, scale))
    upstream = valid_upstream(scale, per_row.target)
    ((value,), metrics), gradients = loss.results_and_gradients(sources, per_row, upstream, wanted)
    # Residuals must be arrays: empty ones hold the dtypes for the backward.
    empty = jax.tree.map(lambda x: jnp.zeros(0, x.dtype), sources)
    return (jnp.sum(value * scale), metrics), (gradients, value, per_row.target, empty)


def _weighted_sum_backward(loss: LinearLoss, skip: bool, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    gradients, value, target, empty = residuals
    cotangent = compat.instantiate(cotangents[0])

    def scale(gradient: Any, like: Any, *, has_rows: bool = False) -> Any:
        dtype = None if like is None else like.dtype
        return _scale(gradient, cotangent, target, dtype, has_rows=has_rows)

    source_gradients = tuple(
        (scale(partial.hidden, hidden, has_rows=True), Head(*map(scale, partial[1:], head)))
        for partial, (hidden, head) in zip(gradients, empty, strict=True)
    )
    return source_gradients, None, scale(value[..., None], value, has_rows=True)[..., 0]


_weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward, symbolic_zeros=True)


def _scale(gradient: Any, cotangent: jax.Array, target: jax.Array, dtype: Any, *, has_rows: bool) -> Any:
    """A gradient from the forward, for a cotangent of 1, times the actual cotangent; None stays None.

    Args:
        has_rows: whether the leading dimensions of the gradient are those of target; ignored rows stay 0.
    """
    if gradient is None:
        return None
    # The usual cotangent is 1. If that is readable without a sync, no second [V, H] array is needed.
    if gradient.dtype == dtype and inputs.in_host_memory(cotangent) and cotangent == 1:
        return gradient
    return _multiply(gradient, cotangent, target, dtype=dtype, has_rows=has_rows)


@functools.partial(jax.jit, static_argnames=("dtype", "has_rows"))
def _multiply(gradient: jax.Array, cotangent: jax.Array, target: jax.Array, *, dtype: Any, has_rows: bool) -> jax.Array:
    # Ignored rows stay 0, as do the sums of a call with no valid row, even if the cotangent is inf or NaN.
    ignored = (target == IGNORED)[..., None] if has_rows else jnp.all(target == IGNORED)
    return jnp.where(ignored, 0, gradient * cotangent).astype(dtype)
