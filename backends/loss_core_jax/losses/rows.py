"""Any loss of one distribution per row, over logits: the values of its `Objective`, and their derivative.

The derivative is a custom one: it keeps the logits as they came and the terms of each row. What it is made of serves
`linear_rows` as well.
"""

# T = tokens (any leading dimensions), V = vocabulary, K = classes of a teacher

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loss_core.row_terms import Coefficients, Objective, RowTerms, TopK
from loss_core_jax import inputs, metrics
from loss_core_jax.kernels import How, KernelSet, Rows, Shard
from loss_core_jax.losses.base import Loss
from loss_core_jax.parallel import collectives
from loss_core_jax.parallel.layout import Layout, Operand, over
from loss_core_jax.reduction import valid_losses, valid_upstream
from loss_core_jax.top_k_teacher import Teacher

# Values of the objective and metrics of each row, each in the shape of the labels.
RowResults = tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]


class Problem(NamedTuple):
    """What is static in a call; hashable.

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
        return cls(loss.kernels, objective, how, num_classes, metrics.of_rows(loss.metrics), gathers)


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

    def local(self, num_local: int, num_classes: int, shard: Shard) -> dict[str, Any]:
        """What `Rows` and `LinearRows` have of them over this device's share of the vocabulary, by its field there."""
        classes = None if self.teacher is None else self.teacher.classes
        return {
            "target": collectives.local_target(self.target, num_local, shard),
            "num_classes": collectives.num_local_classes(num_local, num_classes, shard),
            "inverse_temperature": self.inverse,
            "columns": None if classes is None else collectives.local_columns(classes, num_local, shard),
        }


# `over_logits`, or the same over another source of the logits.
Over = Callable[[Any, PerRow, Problem, Layout], RowResults]


def over_logits(logits: jax.Array, per_row: PerRow, problem: Problem, layout: Layout) -> RowResults:
    """Values and metrics of each row, for any layout; 0 where the target is IGNORED, NaN where it is INVALID.

    Args:
        logits: [..., V], or this device's share inside `jax.shard_map`.
    """
    leaves, tree = jax.tree.flatten(per_row)
    dtype = inputs.arithmetic_dtype(logits, *leaves)
    if not per_row.target.size:
        return no_rows(per_row, dtype, problem)
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
    terms = problem.kernels.row_terms(_local(logits, per_row, problem), problem.how)
    terms = collectives.fold_rows(terms, problem.how.shard)
    # The logits as they came, not reshaped: outside a jit a reshaped residual would be a copy.
    return results(terms, per_row, problem.objective, problem.metrics), (logits, per_row, terms)


def _backward(problem: Problem, residuals: Any, cotangents: RowResults) -> tuple[jax.Array, PerRow]:
    logits, per_row, terms = residuals
    coefficients, by_row = derivatives(terms, per_row, cotangents, problem)
    return problem.kernels.row_gradient(_local(logits, per_row, problem), terms, coefficients, problem.how), by_row


_rows.defvjp(_forward, _backward)


def _local(logits: jax.Array, per_row: PerRow, problem: Problem) -> Rows:
    return Rows(logits, **per_row.local(logits.shape[-1], problem.num_classes, problem.how.shard))


def no_rows(per_row: PerRow, dtype: Any, problem: Problem) -> RowResults:
    """Of no tokens: JAX forgets what empty arrays vary over."""
    none = jnp.zeros(per_row.target.shape, dtype)
    return (none,) * problem.objective.num_values, (none,) * len(problem.metrics)


def results(terms: RowTerms, per_row: PerRow, objective: Objective, names: tuple[str, ...]) -> RowResults:
    """Values of the objective and metrics, from terms of whole rows."""
    objective = with_teacher(objective, per_row.teacher)
    values = tuple(valid_losses(x, per_row.target) for x in objective.values(jnp, terms))
    return values, metrics.made(terms, per_row.target, objective, names)


def derivatives(
    terms: RowTerms, per_row: PerRow, cotangents: RowResults, problem: Problem
) -> tuple[Coefficients, PerRow]:
    """Coefficients of the gradient of the logits, and the gradients of the rows' own arrays; metrics have none."""
    shard, objective = problem.how.shard, with_teacher(problem.objective, per_row.teacher)
    upstreams = [valid_upstream(collectives.whole_cotangent(x, shard), per_row.target) for x in cotangents[0]]
    by_inverse, by_teacher = None if per_row.inverse is None else jnp.zeros_like(per_row.inverse), None
    if isinstance(objective, TopK):
        by_log_p = objective.teacher_gradient(jnp, terms) * upstreams[0][..., None]
        by_teacher = Teacher(None, collectives.of_every_device(by_log_p, objective.log_p, shard))  # type: ignore[arg-type]
    return objective.coefficients(jnp, terms, upstreams), PerRow(None, by_inverse, by_teacher)  # type: ignore[arg-type]


def with_teacher(objective: Objective, teacher: Teacher | None) -> Objective:
    """The objective with the log-probabilities of a `TopK`, which are an input."""
    return TopK(teacher.log_p, objective.tail) if teacher is not None and isinstance(objective, TopK) else objective
