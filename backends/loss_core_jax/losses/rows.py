"""Any loss of one distribution per row: the values of its `Objective`, and their derivative.

Over logits the derivative is a custom one: it keeps the logits as they came and the terms of each row. Over hidden
states and head it is that of `losses.linear`, which asks a `Problem` for values and gradients.
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
from loss_core_jax.kernels import How, KernelSet, LinearGradients, LinearRows, Rows, Shard, Wanted
from loss_core_jax.losses.base import Loss
from loss_core_jax.losses.linear import Source, Sources, arithmetic_dtype, over_sources
from loss_core_jax.parallel import collectives
from loss_core_jax.parallel.layout import Layout, Operand, over
from loss_core_jax.reduction import RowResults, row_metrics, valid_losses, valid_upstream
from loss_core_jax.top_k_teacher import Teacher


class PerRow(NamedTuple):
    """Arrays of the rows beside what their logits come from.

    Attributes:
        target: [...] int32, classes of the full vocabulary, IGNORED or INVALID.
        inverse: [...] 1 / temperature; None for 1.
        teacher: of a `TopK`, whose classes are the row's K targets; then `target` only says what is IGNORED or INVALID.
    """

    target: jax.Array
    inverse: jax.Array | None = None
    teacher: Teacher | None = None

    def rows(self, logits: jax.Array, num_classes: int, shard: Shard) -> Rows:
        """The rows over this device's share of the vocabulary."""
        return Rows(logits, **self._local(logits.shape[-1], num_classes, shard))

    def linear_rows(self, source: Source, num_classes: int, shard: Shard) -> LinearRows:
        """Likewise, of hidden states and head."""
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


class Problem(NamedTuple):
    """What is static in a call: hashable, and a `LinearLoss` of one source.

    Attributes:
        objective: what the loss is; the log-probabilities of a `TopK` are an input.
        num_classes: of all devices.
        metrics: names of `row_terms.token_metrics`, of a cross entropy.
        gathers: whether hidden states are this device's share of the sequence, which is gathered.
    """

    kernels: KernelSet
    objective: Objective
    how: How
    num_classes: int
    metrics: tuple[str, ...] = ()
    gathers: bool = False

    @classmethod
    def of(cls, loss: Loss, objective: Objective, layout: Layout, num_classes: int) -> Problem:
        """That of a loss, from its fields."""
        how = How(objective.sums, float(loss.logit_softcapping), layout.shard, loss.chunk_len)
        gathers = loss.sequence_parallel and bool(layout.axes)
        return cls(loss.kernels, objective, how, num_classes, row_metrics(loss.metrics), gathers)

    @property
    def shard(self) -> Shard:
        return self.how.shard

    def results(self, sources: Sources, per_row: PerRow) -> tuple[RowResults, RowTerms]:
        terms = self.kernels.linear_terms(self._linear_rows(sources, per_row), self.how)
        terms = collectives.fold_rows(terms, self.shard)
        return _results(terms, per_row, self.objective, self.metrics), terms

    def gradients(
        self, sources: Sources, per_row: PerRow, kept: RowTerms, cotangents: RowResults
    ) -> tuple[list[LinearGradients], PerRow]:
        coefficients, by_row = _derivatives(kept, per_row, cotangents, self)
        rows = self._linear_rows(sources, per_row)
        return [self.kernels.linear_gradients(rows, kept, coefficients, self.how)], by_row

    def results_and_gradients(
        self, sources: Sources, per_row: PerRow, upstream: jax.Array, wanted: Sequence[Wanted]
    ) -> tuple[RowResults, list[LinearGradients]]:
        rows = self._linear_rows(sources, per_row)
        terms, gradients = self.kernels.linear_terms_and_gradients(rows, upstream, self.objective, self.how, wanted[0])
        return _results(terms, per_row, self.objective, self.metrics), [gradients]

    def _linear_rows(self, sources: Sources, per_row: PerRow) -> LinearRows:
        (source,) = sources
        return per_row.linear_rows(source, self.num_classes, self.shard)


# `over_logits` or `over_head`.
Over = Callable[[Any, PerRow, Problem, Layout], RowResults]


def over_head(source: Source, per_row: PerRow, problem: Problem, layout: Layout) -> RowResults:
    """As `over_logits`, of hidden states and head."""
    if not per_row.target.size:
        return _no_rows(per_row, arithmetic_dtype(source), problem)
    return over_sources((source,), per_row, problem, layout)


def over_logits(logits: jax.Array, per_row: PerRow, problem: Problem, layout: Layout) -> RowResults:
    """Values and metrics of each row, for any layout; 0 where the target is IGNORED, NaN where it is INVALID.

    Args:
        logits: [..., V], or this device's share inside `jax.shard_map`.
    """
    leaves, tree = jax.tree.flatten(per_row)
    dtype = inputs.arithmetic_dtype(logits, *leaves)
    if not per_row.target.size:
        return _no_rows(per_row, dtype, problem)
    # A teacher in float64 makes it the dtype of the arithmetic.
    logits = logits.astype(dtype) if dtype == jnp.float64 else logits

    def inside(logits: jax.Array, *leaves: jax.Array) -> Any:
        logits, *aligned = collectives.align(layout.axes, (logits,), leaves)
        return _rows(logits, jax.tree.unflatten(tree, aligned), problem)

    found: Any = over(layout, inside, Operand(logits, -1, padding=-jnp.inf), *map(Operand, leaves))
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rows(logits: jax.Array, per_row: PerRow, problem: Problem) -> RowResults:
    return _forward(logits, per_row, problem)[0]


def _forward(logits: jax.Array, per_row: PerRow, problem: Problem) -> tuple[RowResults, Any]:
    rows = per_row.rows(logits, problem.num_classes, problem.shard)
    terms = collectives.fold_rows(problem.kernels.row_terms(rows, problem.how), problem.shard)
    # The logits as they came, not reshaped: outside a jit a reshaped residual would be a copy.
    return _results(terms, per_row, problem.objective, problem.metrics), (logits, per_row, terms)


def _backward(problem: Problem, residuals: Any, cotangents: RowResults) -> tuple[jax.Array, PerRow]:
    logits, per_row, terms = residuals
    coefficients, by_row = _derivatives(terms, per_row, cotangents, problem)
    rows = per_row.rows(logits, problem.num_classes, problem.shard)
    return problem.kernels.row_gradient(rows, terms, coefficients, problem.how), by_row


_rows.defvjp(_forward, _backward)


def _no_rows(per_row: PerRow, dtype: Any, problem: Problem) -> RowResults:
    """Of no tokens: JAX forgets what empty arrays vary over."""
    none = jnp.zeros(per_row.target.shape, dtype)
    return (none,) * problem.objective.num_values, (none,) * len(problem.metrics)


# One program where a call is not under jit.
@functools.partial(jax.jit, static_argnums=(2, 3))
def _results(terms: RowTerms, per_row: PerRow, objective: Objective, names: tuple[str, ...]) -> RowResults:
    """Values of the objective and metrics, from terms of whole rows."""
    objective = _with_teacher(objective, per_row.teacher)
    values = tuple(valid_losses(x, per_row.target) for x in objective.values(jnp, terms))
    metrics = token_metrics(jnp, terms, objective, names)
    return values, tuple(valid_losses(x, per_row.target) for x in metrics)


def _derivatives(
    terms: RowTerms, per_row: PerRow, cotangents: RowResults, problem: Problem
) -> tuple[Coefficients, PerRow]:
    """Coefficients of the gradient of the logits, and the gradients of the rows' own arrays; metrics have none."""
    shard, objective = problem.shard, _with_teacher(problem.objective, per_row.teacher)
    upstreams = [valid_upstream(collectives.whole_cotangent(x, shard), per_row.target) for x in cotangents[0]]
    by_inverse, by_teacher = None if per_row.inverse is None else jnp.zeros_like(per_row.inverse), None
    if isinstance(objective, TopK):
        by_log_p = objective.teacher_gradient(jnp, terms) * upstreams[0][..., None]
        by_teacher = Teacher(None, collectives.of_every_device(by_log_p, objective.log_p, shard))  # type: ignore[arg-type]
    return objective.coefficients(jnp, terms, upstreams), PerRow(None, by_inverse, by_teacher)  # type: ignore[arg-type]


def _with_teacher(objective: Objective, teacher: Teacher | None) -> Objective:
    """The objective with the log-probabilities of a `TopK`, which are an input."""
    return TopK(teacher.log_p, objective.tail) if teacher is not None and isinstance(objective, TopK) else objective
