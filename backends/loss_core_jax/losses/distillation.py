"""Knowledge distillation: `KDLoss`."""

# T = tokens (any leading dimensions), V = vocabulary

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loss_core import KDLossConfig
from loss_core.row_terms import beta_of, jensen_shannon, kl_divergence
from loss_core_jax import inputs
from loss_core_jax.inputs import ArrayLike
from loss_core_jax.kernels import KernelSet, PairHow, Pairs
from loss_core_jax.losses.base import Count, Loss, has_fields_of
from loss_core_jax.parallel.collectives import added, align, fold_pairs, whole_cotangent
from loss_core_jax.parallel.layout import Layout, Operand, layout_for, over
from loss_core_jax.reduction import row_scale, total, valid_losses, valid_upstream


@has_fields_of(KDLossConfig)
class KDLoss(Loss):
    """Knowledge distillation: a divergence of a student from a teacher at temperature T, times T^2.

    Fields are those of `loss_core.KDLossConfig`; tp_group is the name of a mesh axis, or a tuple of names.
    """

    temperature: float
    fp32_upcast: bool
    chunk_size: int
    divergence: str
    beta: float
    _vocab_axis = None

    def __call__(
        self,
        student_logits: ArrayLike,
        teacher_logits: ArrayLike,
        labels: ArrayLike,
        num_batch_labels: Count | None = None,
        loss_weights: ArrayLike | None = None,
    ) -> jax.Array:
        """Mean over positions that are not ignored of T^2 times the divergence.

        Args:
            student_logits: [..., V] floating.
            teacher_logits: shape of student_logits; floating; differentiable, too.
            labels: [...] integers of any width; they only say what is ignored, by ignore_index.
            num_batch_labels: divides the sum instead of the number of positions; 0 gives 0.
            loss_weights: [...] factor per position; with num_batch_labels only.
        Returns:
            A scalar in float32 (float64 for float64 logits), or in the dtype of the student's logits with
            fp32_upcast=False.
        Raises:
            TypeError: labels are floating or boolean, logits are not floating.
            ValueError: shapes do not match, a count that can be read is negative or NaN, or weights without a count.
        """
        inputs.check_arrays(
            student_logits=student_logits, teacher_logits=teacher_logits, labels=labels, loss_weights=loss_weights
        )
        inputs.check_pair(student_logits, teacher_logits, labels)
        count = inputs.read_batch_count(labels, num_batch_labels, loss_weights)
        layout = layout_for(self.tp_group, student_logits, student_logits, -1)
        target = inputs.read_labels(labels, None, self.ignore_index, None)
        return _reduced(self, student_logits, teacher_logits, target, count, loss_weights, layout=layout)


class _Problem(NamedTuple):
    """What is static in a call; hashable."""

    kernels: KernelSet
    how: PairHow


@functools.partial(jax.jit, static_argnames="layout")
def _reduced(
    loss_fn: KDLoss,
    student: jax.Array,
    teacher: jax.Array,
    target: jax.Array,
    count: jax.Array | None,
    loss_weights: jax.Array | None,
    *,
    layout: Layout,
) -> jax.Array:
    """The loss of arguments that have been checked."""
    beta = beta_of(loss_fn)
    # KL(student || teacher) is KL(teacher || student) with the roles exchanged.
    roles, beta = ((teacher, student), 0.0) if beta == 1 else ((student, teacher), beta)
    how = PairHow(beta, float(loss_fn.temperature), layout.shard, int(loss_fn.chunk_size))
    loss = _over_logits(*roles, target, _Problem(loss_fn.kernels, how), layout)
    scale = row_scale(target, loss.dtype, mean=True, count=count, loss_weights=loss_weights)
    loss = total(loss, scale, count)
    return loss if loss_fn.fp32_upcast else loss.astype(student.dtype)


def _over_logits(
    student: jax.Array, teacher: jax.Array, target: jax.Array, problem: _Problem, layout: Layout
) -> jax.Array:
    """T^2 times the divergence per row, for any layout; 0 where the target is IGNORED."""
    if not target.size:
        # JAX forgets what empty arrays vary over.
        return jnp.zeros(target.shape, inputs.arithmetic_dtype(student, teacher))

    def inside(student: jax.Array, teacher: jax.Array, target: jax.Array) -> jax.Array:
        return _rows(Pairs(*align(layout.axes, (student, teacher), (target,))), problem)

    logits = (Operand(x, -1, padding=-jnp.inf) for x in (student, teacher))
    return over(layout, inside, *logits, Operand(target))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _rows(pairs: Pairs, problem: _Problem) -> jax.Array:
    return _forward(pairs, problem)[0]


def _forward(pairs: Pairs, problem: _Problem) -> tuple[jax.Array, Any]:
    kernels, how = problem
    terms = fold_pairs(kernels.pair_terms(pairs, how), how.temperature, how.shard)
    sums = added(kernels.pair_mixture(pairs, terms, how), how.shard) if how.beta else None
    loss = kl_divergence(jnp, terms) if sums is None else jensen_shannon(jnp, terms, sums, how.beta)
    return valid_losses(how.temperature**2 * loss, pairs.target), (pairs, terms, sums)


def _backward(problem: _Problem, residuals: Any, cotangent: jax.Array) -> tuple[Any]:
    (pairs, terms, sums), (kernels, how) = residuals, problem
    upstream = valid_upstream(whole_cotangent(cotangent, how.shard), pairs.target) * how.temperature**2
    by_student, by_teacher = kernels.pair_gradients(pairs, terms, sums, upstream, how)
    return (Pairs(by_student, by_teacher, None),)  # type: ignore[arg-type]


_rows.defvjp(_forward, _backward)
