"""Losses of one distribution per row: the values of an `Objective`, and their derivative.

Over logits, a custom derivative here saves the logits and the terms of each row. Over hidden states and head, the
derivative is that of `losses.linear`, which calls the methods of `RowLoss`.
"""

# T = tokens (any leading dimensions), V = vocabulary, H = hidden, K = classes of a teacher

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loss_core.row_terms import Coefficients, Objective, RowTerms, TopK, token_metrics
from loss_core_jax import inputs
from loss_core_jax.kernels import KernelSet, LinearGradients, LinearRows, RowOptions, Rows, Shard, Wanted
from loss_core_jax.losses.base import Loss
from loss_core_jax.losses.linear import Source, Sources, arithmetic_dtype, results_from_sources
from loss_core_jax.parallel import collectives
from loss_core_jax.parallel.layout import Layout, Operand, call_sharded
from loss_core_jax.reduction import RowResults, row_metrics, valid_losses, valid_upstream
from loss_core_jax.top_k_teacher import Teacher


class PerRow(NamedTuple):
    """The arrays over the rows, other than logits or hidden states.

    Attributes:
        target: [...] int32, classes of the full vocabulary, IGNORED or INVALID.
        inverse: [...] 1 / temperature; None for 1.
        teacher: of a `TopK`; its classes are the row's K targets, and `target` then only marks rows IGNORED or INVALID.
    """

    target: jax.Array
    inverse: jax.Array | None = None
    teacher: Teacher | None = None

    def rows(self, logits: jax.Array, num_classes: int, shard: Shard) -> Rows:
        """The rows over this device's shard of the vocabulary."""
        return Rows(logits, **self._local(logits.shape[-1], num_classes, shard))

    def linear_rows(self, source: Source, num_classes: int, shard: Shard) -> LinearRows:
        """The rows of hidden states and head over this device's shard of the vocabulary."""
        hidden, (weight_VH, bias_V) = source
        return LinearRows(hidden, weight_VH, bias_V=bias_V, **self._local(len(weight_VH), num_classes, shard))

    def _local(self, num_local: int, num_classes: int, shard: Shard) -> dict[str, Any]:
        columns = None if self.teacher is None else collectives.local_target(self.teacher.classes, num_local, shard)
        return {
            "target": collectives.local_target(self.target, num_local, shard),
            "num_classes": collectives.num_local_classes(num_local, num_classes, shard),
            "inverse_temperature": self.inverse,
            "columns": columns,
        }


class RowLoss(NamedTuple):
    """The static arguments of a call, which are a `LinearLoss` of one source. Hashable.

    Attributes:
        objective: defines the loss; a `TopK` is without its log-probabilities, which are in `PerRow`.
        num_classes: of the full vocabulary.
        metrics: names of `row_terms.token_metrics`, for a cross entropy.
        sequence_sharded: see `LinearLoss`.
    """

    kernels: KernelSet
    objective: Objective
    options: RowOptions
    num_classes: int
    metrics: tuple[str, ...] = ()
    sequence_sharded: bool = False

    @classmethod
    def of(cls, loss: Loss, objective: Objective, layout: Layout, num_classes: int) -> RowLoss:
        """The static arguments for a loss with this objective."""
        options = RowOptions(objective.sums, float(loss.logit_softcapping), layout.shard, loss.chunk_len)
        sequence_sharded = loss.sequence_parallel and bool(layout.axes)
        return cls(loss.kernels, objective, options, num_classes, row_metrics(loss.metrics), sequence_sharded)

    @property
    def shard(self) -> Shard:
        return self.options.shard

    def results(self, sources: Sources, per_row: PerRow) -> tuple[RowResults, RowTerms]:
        terms = self.kernels.linear_terms(self._linear_rows(sources, per_row), self.options)
        terms = collectives.fold_rows(terms, self.shard)
        return _results(terms, per_row, self.objective, self.metrics), terms

    def gradients(
        self, sources: Sources, per_row: PerRow, saved: RowTerms, cotangents: RowResults
    ) -> tuple[list[LinearGradients], PerRow]:
        coefficients, per_row_gradients = _derivatives(saved, per_row, cotangents, self)
        rows = self._linear_rows(sources, per_row)
        return [self.kernels.linear_gradients(rows, saved, coefficients, self.options)], per_row_gradients

    def results_and_gradients(
        self, sources: Sources, per_row: PerRow, upstream: jax.Array, wanted: Sequence[Wanted]
    ) -> tuple[RowResults, list[LinearGradients]]:
        (needs,), rows, objective = wanted, self._linear_rows(sources, per_row), self.objective
        terms, gradients = self.kernels.linear_terms_and_gradients(rows, upstream, objective, self.options, needs)
        return _results(terms, per_row, objective, self.metrics), [gradients]

    def _linear_rows(self, sources: Sources, per_row: PerRow) -> LinearRows:
        (source,) = sources
        return per_row.linear_rows(source, self.num_classes, self.shard)


# `results_from_logits` or `results_from_head`.
ResultsFn = Callable[[Any, PerRow, RowLoss, Layout], RowResults]


def results_from_head(source: Source, per_row: PerRow, row_loss: RowLoss, layout: Layout) -> RowResults:
    """As `results_from_logits`, from hidden states and head."""
    if not per_row.target.size:
        return _empty_results(per_row, arithmetic_dtype(source), row_loss)
    return results_from_sources((source,), per_row, row_loss, layout)


def results_from_logits(logits: jax.Array, per_row: PerRow, row_loss: RowLoss, layout: Layout) -> RowResults:
    """Values and metrics of each row, for any layout; 0 where the target is IGNORED, NaN where it is INVALID.

    Args:
        logits: [..., V], or this device's shard of it inside `jax.shard_map`.
    """
    leaves, tree = jax.tree.flatten(per_row)
    dtype = inputs.arithmetic_dtype(logits, *leaves)
    if not per_row.target.size:
        return _empty_results(per_row, dtype, row_loss)
    # The teacher may be float64 where the logits are not.
    logits = logits.astype(dtype) if dtype == jnp.float64 else logits

    def local_results(logits: jax.Array, *leaves: jax.Array) -> Any:
        logits, *aligned = collectives.align(layout.axes, (logits,), leaves)
        return _rows(logits, jax.tree.unflatten(tree, aligned), row_loss)

    results: Any = call_sharded(layout, local_results, Operand(logits, -1, padding=-jnp.inf), *map(Operand, leaves))
    return results


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rows(logits: jax.Array, per_row: PerRow, row_loss: RowLoss) -> RowResults:
    return _forward(logits, per_row, row_loss)[0]


def _forward(logits: jax.Array, per_row: PerRow, row_loss: RowLoss) -> tuple[RowResults, Any]:
    rows = per_row.rows(logits, row_loss.num_classes, row_loss.shard)
    terms = collectives.fold_rows(row_loss.kernels.row_terms(rows, row_loss.options), row_loss.shard)
    # The logits are not reshaped: outside a jit a reshaped residual would be a copy.
    return _results(terms, per_row, row_loss.objective, row_loss.metrics), (logits, per_row, terms)


def _backward(row_loss: RowLoss, residuals: Any, cotangents: RowResults) -> tuple[jax.Array, PerRow]:
    logits, per_row, terms = residuals
    coefficients, per_row_gradients = _derivatives(terms, per_row, cotangents, row_loss)
    rows = per_row.rows(logits, row_loss.num_classes, row_loss.shard)
    return row_loss.kernels.row_gradient(rows, terms, coefficients, row_loss.options), per_row_gradients


_rows.defvjp(_forward, _backward)


def _empty_results(per_row: PerRow, dtype: Any, row_loss: RowLoss) -> RowResults:
    """Results of a call without tokens, a separate case because JAX loses the varying mesh axes of empty arrays."""
    empty = jnp.zeros(per_row.target.shape, dtype)
    return (empty,) * row_loss.objective.num_values, (empty,) * len(row_loss.metrics)


# Under jit, so that an eager call runs one program.
@functools.partial(jax.jit, static_argnums=(2, 3))
def _results(terms: RowTerms, per_row: PerRow, objective: Objective, names: tuple[str, ...]) -> RowResults:
    """Values of the objective and metrics, from terms of full rows."""
    objective = _with_teacher(objective, per_row.teacher)
    values = tuple(valid_losses(x, per_row.target) for x in objective.values(jnp, terms))
    metrics = token_metrics(jnp, terms, objective, names)
    return values, tuple(valid_losses(x, per_row.target) for x in metrics)


def _derivatives(
    terms: RowTerms, per_row: PerRow, cotangents: RowResults, row_loss: RowLoss
) -> tuple[Coefficients, PerRow]:
    """Coefficients of the gradient of the logits, and the gradients of `per_row`; metrics are not differentiated."""
    shard, objective = row_loss.shard, _with_teacher(row_loss.objective, per_row.teacher)
    upstreams = [valid_upstream(collectives.full_cotangent(x, shard), per_row.target) for x in cotangents[0]]
    dinverse, dteacher = None if per_row.inverse is None else jnp.zeros_like(per_row.inverse), None
    if isinstance(objective, TopK):
        dlog_p = objective.teacher_gradient(jnp, terms) * upstreams[0][..., None]
        dteacher = Teacher(None, collectives.replicated_gradient(dlog_p, objective.log_p, shard))  # type: ignore[arg-type]
    return objective.coefficients(jnp, terms, upstreams), PerRow(None, dinverse, dteacher)  # type: ignore[arg-type]


def _with_teacher(objective: Objective, teacher: Teacher | None) -> Objective:
    """The objective; if it is a `TopK`, with the teacher's log-probabilities."""
    return TopK(teacher.log_p, objective.tail) if teacher is not None and isinstance(objective, TopK) else objective
