"""Distillation from K log-probabilities of a teacher: `TopKDistillation`.

The derivative is a custom one: it keeps the logits as they came and the terms of each row.
"""

# T = tokens (any leading dimensions), V = vocabulary, K = classes of the teacher

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loss_core import TopKDistillationConfig
from loss_core.row_terms import RowTerms, TopK
from loss_core_jax import inputs
from loss_core_jax.inputs import ArrayLike
from loss_core_jax.kernels import How, KernelSet, Rows
from loss_core_jax.losses.base import Count, Loss, has_fields_of
from loss_core_jax.parallel import collectives
from loss_core_jax.parallel.collectives import fold_rows, local_columns, num_local_classes, whole_cotangent
from loss_core_jax.parallel.layout import Layout, Operand, layout_for, over
from loss_core_jax.reduction import row_scale, total, valid_losses, valid_upstream
from loss_core_jax.temperature import inverse_temperature
from loss_core_jax.top_k_teacher import Teacher, check_teacher, read_teacher


@has_fields_of(TopKDistillationConfig)
class TopKDistillation(Loss):
    """KL(teacher || student) from K log-probabilities of the teacher, times T^2.

    Fields are those of `loss_core.TopKDistillationConfig`; tp_group is the name of a mesh axis, or a tuple of names.
    """

    temperature: float
    fp32_upcast: bool
    logit_softcapping: float
    tail: bool
    _vocab_axis = None

    def __call__(
        self,
        student_logits: ArrayLike,
        teacher_indices: ArrayLike,
        teacher_logprobs: ArrayLike,
        labels: ArrayLike,
        num_batch_labels: Count | None = None,
        loss_weights: ArrayLike | None = None,
    ) -> jax.Array:
        """Mean over positions that are not ignored of T^2 times the divergence.

        Args:
            student_logits: [..., V] floating.
            teacher_indices: [..., K] integers of any width: classes in [0, V), in any order, that differ in each
                position.
            teacher_logprobs: [..., K] floating: the teacher's log-probabilities of these classes at this temperature;
                -inf for a probability of 0; differentiable, through the tail's probability too.
            labels: [...] integers of any width; they only say what is ignored, by ignore_index.
            num_batch_labels: divides the sum instead of the number of positions; 0 gives 0.
            loss_weights: [...] factor per position; with num_batch_labels only.
        Returns:
            A scalar in float32 (float64 for float64 arguments), or in the dtype of the student's logits with
            fp32_upcast=False. +inf where the teacher has probability for a class, or for all others together, that the
            student rules out with -inf.
        Raises:
            TypeError: labels or indices that are no integers, logits or log-probabilities that are not floating.
            ValueError: shapes do not match, a count that can be read is negative or NaN, or weights without a count; a
                teacher that can be read and is no distribution (else the position is NaN), see `read_teacher`.
        """
        inputs.check_arrays(student_logits=student_logits, labels=labels, loss_weights=loss_weights)
        inputs.check_floating(student_logits=student_logits)
        inputs.check_logits("student_logits", student_logits, labels)
        check_weights(labels, num_batch_labels, loss_weights)
        count = inputs.read_count("num_batch_labels", num_batch_labels)
        layout = layout_for(self.tp_group, student_logits, student_logits, -1)
        vocab = layout.vocab(student_logits.shape[-1])
        check_teacher(labels, teacher_indices, teacher_logprobs, vocab)
        target = inputs.read_labels(labels, None, self.ignore_index, None)
        dtype = inputs.arithmetic_dtype(inputs.as_jax(student_logits), inputs.as_jax(teacher_logprobs))
        teacher, target = read_teacher(teacher_indices, teacher_logprobs, target, vocab, dtype)
        inverse = inverse_temperature(None, self.temperature, labels, dtype)
        # Where all classes are the teacher's, there are no others.
        tail = self.tail and teacher_indices.shape[-1] < vocab
        problem = Problem(self.kernels, vocab, tail, How(softcap=float(self.logit_softcapping), shard=layout.shard))
        return _reduced(
            self, inputs.as_jax(student_logits), teacher, target, inverse, count, loss_weights,
            problem=problem, layout=layout,
        )  # fmt: skip


class Problem(NamedTuple):
    """What is static in a call; hashable.

    Attributes:
        num_classes: of all devices.
        tail: whether the other classes together are one more class.
        gathers: whether hidden states are this device's share of the sequence, which is gathered.
    """

    kernels: KernelSet
    num_classes: int
    tail: bool
    how: How
    gathers: bool = False


def check_weights(labels: ArrayLike, count: Any, loss_weights: ArrayLike | None) -> None:
    """Weights have the shape of labels, and come with a count."""
    inputs.check_weights_have_count(loss_weights, count)
    inputs.check_reduction_arguments("sum", labels, None, loss_weights)


@functools.partial(jax.jit, static_argnames=("problem", "layout"))
def _reduced(
    loss_fn: TopKDistillation,
    student: jax.Array,
    teacher: Teacher,
    target: jax.Array,
    inverse: jax.Array | None,
    count: jax.Array | None,
    loss_weights: jax.Array | None,
    *,
    problem: Problem,
    layout: Layout,
) -> jax.Array:
    """The loss of arguments that have been checked."""
    loss = _loss_rows(student, teacher, target, inverse, problem, layout)
    loss = reduced(loss, loss_fn.temperature, target, count, loss_weights)
    return loss if loss_fn.fp32_upcast else loss.astype(student.dtype)


def reduced(loss: jax.Array, temperature: float, target: jax.Array, count: Any, loss_weights: Any) -> jax.Array:
    """The sum or mean of the rows' divergences times T^2."""
    loss = float(temperature) ** 2 * loss
    return total(loss, row_scale(target, loss.dtype, mean=True, count=count, loss_weights=loss_weights), count)


def _loss_rows(
    student: jax.Array,
    teacher: Teacher,
    target: jax.Array,
    inverse: jax.Array | None,
    problem: Problem,
    layout: Layout,
) -> jax.Array:
    """The divergence per row, for any layout; 0 where the target is IGNORED."""
    if not target.size:
        # JAX forgets what empty arrays vary over.
        return jnp.zeros(target.shape, teacher.log_p.dtype)
    student = student.astype(jnp.float64) if teacher.log_p.dtype == jnp.float64 else student

    def inside(student: jax.Array, *of_rows: jax.Array) -> jax.Array:
        student, classes, log_p, target, *rest = collectives.align(layout.axes, (student,), of_rows)
        return _rows(student, Teacher(classes, log_p), target, rest[0] if rest else None, problem)

    operands = [Operand(x) for x in (*teacher, target, inverse) if x is not None]
    return over(layout, inside, Operand(student, -1, padding=-jnp.inf), *operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _rows(
    student: jax.Array, teacher: Teacher, target: jax.Array, inverse: jax.Array | None, problem: Problem
) -> jax.Array:
    return _forward(student, teacher, target, inverse, problem)[0]


def _forward(
    student: jax.Array, teacher: Teacher, target: jax.Array, inverse: jax.Array | None, problem: Problem
) -> tuple[jax.Array, Any]:
    terms = problem.kernels.row_terms(_local_rows(student, teacher, target, inverse, problem), problem.how)
    terms = fold_rows(terms, problem.how.shard)
    return valid_divergence(terms, teacher, target, problem), (student, teacher, target, inverse, terms)


def _backward(problem: Problem, residuals: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    student, teacher, target, inverse, terms = residuals
    coefficients, by_log_p = gradients(terms, teacher, target, cotangent, problem)
    rows = _local_rows(student, teacher, target, inverse, problem)
    by_student = problem.kernels.row_gradient(rows, terms, coefficients, problem.how)
    by_inverse = None if inverse is None else jnp.zeros_like(inverse)
    return by_student, Teacher(None, by_log_p), None, by_inverse  # type: ignore[arg-type]


_rows.defvjp(_forward, _backward)


def _local_rows(
    student: jax.Array, teacher: Teacher, target: jax.Array, inverse: jax.Array | None, problem: Problem
) -> Rows:
    num_local, shard = student.shape[-1], problem.how.shard
    num_classes = num_local_classes(num_local, problem.num_classes, shard)
    return Rows(student, target, num_classes, inverse, local_columns(teacher.classes, num_local, shard))


def valid_divergence(terms: RowTerms, teacher: Teacher, target: jax.Array, problem: Problem) -> jax.Array:
    """The divergence of each row: 0 where it is ignored, NaN where it is invalid."""
    return valid_losses(TopK(teacher.log_p, problem.tail).values(jnp, terms)[0], target)


def gradients(
    terms: RowTerms, teacher: Teacher, target: jax.Array, cotangent: jax.Array, problem: Problem
) -> tuple[Any, jax.Array]:
    """Coefficients of the student's gradient, and the gradient of the teacher's log-probabilities."""
    shard, given = problem.how.shard, TopK(teacher.log_p, problem.tail)
    upstream = valid_upstream(whole_cotangent(cotangent, shard), target)
    by_log_p = given.teacher_gradient(jnp, terms) * upstream[..., None]
    return given.coefficients(jnp, terms, [upstream]), collectives.of_every_device(by_log_p, teacher.log_p, shard)
