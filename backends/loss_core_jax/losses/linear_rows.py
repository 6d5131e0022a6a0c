"""Any loss of one distribution per row, over hidden states and head: the logits of all tokens are never held.

Two derivatives, because what is known in the forward differs:

- `summed`, of a cross entropy: the factor of every row is known, so the forward that runs under differentiation makes
  the gradients while a chunk's logits are at hand (three products in all).
- `over_head`: upstream gradients, or the terms of other devices, come later, so the backward makes each chunk's logits
  again (four products).
"""

# T = tokens (any leading dimensions), V = vocabulary, H = hidden, K = classes of a teacher

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from loss_core_jax import compat
from loss_core_jax.kernels import LinearRows, Wanted
from loss_core_jax.losses.linear_source import (
    Head,
    Source,
    arithmetic_dtype,
    gathered,
    input_gradients,
    local_rows,
    over_heads,
    times_cotangent,
)
from loss_core_jax.losses.rows import PerRow, Problem, RowResults, derivatives, no_rows, results
from loss_core_jax.parallel.collectives import fold_rows
from loss_core_jax.parallel.layout import Layout
from loss_core_jax.reduction import valid_upstream

# One program where a call is not under jit.
_results = jax.jit(results, static_argnums=(2, 3))


def over_head(source: Source, per_row: PerRow, problem: Problem, layout: Layout) -> RowResults:
    """Values and metrics of each row, for any layout; 0 where the target is IGNORED, NaN where it is INVALID."""
    if not per_row.target.size:
        return no_rows(per_row, arithmetic_dtype(source), problem)

    def rows(source: Source, per_row: PerRow) -> RowResults:
        return _rows(source, per_row, problem)

    found: RowResults = over_heads(rows, [source], per_row, layout, problem.gathers)
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rows(source: Source, per_row: PerRow, problem: Problem) -> RowResults:
    return _forward(source, per_row, problem)[0]


def _forward(source: Source, per_row: PerRow, problem: Problem) -> tuple[RowResults, Any]:
    hidden, head = source
    source = gathered(hidden, problem.how.shard, problem.gathers), head
    terms = problem.kernels.linear_terms(_local(source, per_row, problem), problem.how)
    terms = fold_rows(terms, problem.how.shard)
    return _results(terms, per_row, problem.objective, problem.metrics), (source, per_row, terms)


def _backward(problem: Problem, residuals: Any, cotangents: RowResults) -> tuple[Any, PerRow]:
    (hidden, head), per_row, terms = residuals
    coefficients, by_row = derivatives(terms, per_row, cotangents, problem)
    rows = _local((hidden, head), per_row, problem)
    gradients = problem.kernels.linear_gradients(rows, terms, coefficients, problem.how)
    return input_gradients(gradients, hidden, head, problem.how.shard, problem.gathers), by_row


_rows.defvjp(_forward, _backward)


def _local(source: Source, per_row: PerRow, problem: Problem) -> LinearRows:
    return local_rows(source, per_row, problem.num_classes, problem.how.shard)


def summed(
    source: Source, target: jax.Array, scale: jax.Array, problem: Problem, *, skip: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Sum over rows of scale * cross entropy, a scalar in the dtype of the arithmetic; and the metrics of each row.

    Args:
        scale: [...] factor per row, in the dtype of the arithmetic; differentiable.
        skip: leave chunks of ignored rows out where that needs no sync, and gradients are wanted: XLA compiles a
            forward with the sort and the branch for more than half as long again.
    """
    arguments = (source, target, scale)
    axes = compat.varying_axes(*jax.tree.leaves(arguments))
    aligned = jax.tree.map(lambda x: compat.vary(x, axes), arguments)
    found: Any = _summed(*aligned, problem, skip)
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _summed(source: Source, target: jax.Array, scale: jax.Array, problem: Problem, skip: bool) -> Any:
    per_row = PerRow(target)
    terms = problem.kernels.linear_terms(_local(source, per_row, problem), problem.how)
    (loss,), found = _results(terms, per_row, problem.objective, problem.metrics)
    return jnp.sum(loss * scale), found


def _summed_forward(source: Any, target: Any, scale: Any, problem: Problem, skip: bool) -> tuple[Any, Any]:
    # With symbolic zeros each argument says whether it is differentiated: a frozen weight costs no product.
    hidden, head = jax.tree.map(lambda x: x.perturbed, source)
    wanted = Wanted(hidden, head.weight_VH, bool(head.bias_V), skip)
    source, target, scale = jax.tree.map(lambda x: x.value, (source, target, scale))
    per_row, upstream = PerRow(target), valid_upstream(scale, target)
    terms, gradients = problem.kernels.linear_terms_and_gradients(
        _local(source, per_row, problem), upstream, problem.objective, problem.how, wanted
    )
    (loss,), found = _results(terms, per_row, problem.objective, problem.metrics)
    # Empty arrays carry the dtypes to the backward.
    likes = jax.tree.map(lambda x: jnp.zeros(0, x.dtype), source)
    return (jnp.sum(loss * scale), found), (gradients, loss, target, likes)


def _summed_backward(problem: Problem, skip: bool, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    gradients, loss, target, (hidden, head) = residuals
    cotangent = compat.instantiate(cotangents[0])

    def times(gradient: Any, like: Any, *, of_rows: bool = False) -> Any:
        dtype = None if like is None else like.dtype
        return times_cotangent(gradient, cotangent, target, dtype, of_rows=of_rows)

    by_head = Head(*map(times, gradients[1:], head))
    by_scale = times(loss[..., None], loss, of_rows=True)[..., 0]
    return (times(gradients.hidden, hidden, of_rows=True), by_head), None, by_scale


_summed.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)
