"""Distillation from K log-probabilities of a teacher, without logits: `FusedLinearTopKDistillation`.

The derivative is a custom one: it keeps hidden states and weight as they came and the terms of each row.
"""

# T = tokens (any leading dimensions), V = vocabulary, H = hidden, K = classes of the teacher

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from loss_core import FusedLinearTopKDistillationConfig
from loss_core_jax import inputs
from loss_core_jax.inputs import ArrayLike
from loss_core_jax.kernels import How, LinearRows
from loss_core_jax.losses.base import Count, Loss, has_fields_of
from loss_core_jax.losses.linear_source import Head, gathered, input_gradients, linear_layout, local_rows, over_head
from loss_core_jax.losses.top_k_distillation import Problem, check_weights, gradients, reduced, valid_divergence
from loss_core_jax.parallel.collectives import fold_rows, local_columns
from loss_core_jax.parallel.layout import Layout
from loss_core_jax.temperature import inverse_temperature
from loss_core_jax.top_k_teacher import Teacher, check_teacher, read_teacher


@has_fields_of(FusedLinearTopKDistillationConfig)
class FusedLinearTopKDistillation(Loss):
    """TopKDistillation of `hidden_states @ lm_weight.T`, without ever holding all logits.

    Fields are those of `loss_core.FusedLinearTopKDistillationConfig`; tp_group is the name of a mesh axis, or a tuple
    of names. The backward makes each chunk's logits again: four products in all.
    """

    temperature: float
    logit_softcapping: float
    tail: bool
    sequence_parallel: bool
    _vocab_axis = None

    def __call__(
        self,
        hidden_states: ArrayLike,
        lm_weight: ArrayLike,
        teacher_indices: ArrayLike,
        teacher_logprobs: ArrayLike,
        labels: ArrayLike,
        num_batch_labels: Count | None = None,
        loss_weights: ArrayLike | None = None,
        lm_bias: ArrayLike | None = None,
    ) -> jax.Array:
        """Mean over positions that are not ignored of T^2 times the divergence.

        Args:
            hidden_states: as in FusedLinearCrossEntropy.
            lm_weight: likewise.
            teacher_indices: as in TopKDistillation.
            teacher_logprobs: likewise; in the dtype of the arithmetic for the hidden states.
            labels: likewise.
            num_batch_labels: likewise.
            loss_weights: likewise.
            lm_bias: as in FusedLinearCrossEntropy.
        Returns:
            A scalar in float32 (float64 for float64 hidden states).
        Raises:
            TypeError, ValueError: as FusedLinearCrossEntropy and TopKDistillation.
        """
        inputs.check_arrays(hidden_states=hidden_states, lm_weight=lm_weight, labels=labels, loss_weights=loss_weights)
        layout, gathers = linear_layout(self, hidden_states, labels, lm_weight, lm_bias)
        check_weights(labels, num_batch_labels, loss_weights)
        count = inputs.read_count("num_batch_labels", num_batch_labels)
        vocab = layout.vocab(lm_weight.shape[0])
        check_teacher(labels, teacher_indices, teacher_logprobs, vocab)
        target = inputs.read_labels(labels, None, self.ignore_index, None)
        hidden, weight_VH = map(inputs.as_jax, (hidden_states, lm_weight))
        dtype = inputs.arithmetic_dtype(hidden, weight_VH)
        teacher, target = read_teacher(teacher_indices, teacher_logprobs, target, vocab, dtype)
        inverse = inverse_temperature(None, self.temperature, labels, dtype)
        tail = self.tail and teacher_indices.shape[-1] < vocab
        how = How(softcap=float(self.logit_softcapping), shard=layout.shard)
        head = Head(weight_VH, None if lm_bias is None else inputs.as_jax(lm_bias))
        return _reduced_linear(
            self, hidden, head, teacher, target, inverse, count, loss_weights,
            problem=Problem(self.kernels, vocab, tail, how, gathers), layout=layout,
        )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("problem", "layout"))
def _reduced_linear(
    loss_fn: FusedLinearTopKDistillation,
    hidden: jax.Array,
    head: Head,
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
    if not target.size:
        # JAX forgets what empty arrays vary over.
        return reduced(jnp.zeros(target.shape, teacher.log_p.dtype), 1.0, target, count, loss_weights)

    def rows(hidden: jax.Array, head: Head, classes: jax.Array, log_p: jax.Array, *rest: jax.Array) -> jax.Array:
        return _linear(hidden, head, Teacher(classes, log_p), rest[0], rest[1] if rest[1:] else None, problem)

    of_rows = [x for x in (*teacher, target, inverse) if x is not None]
    loss = over_head(rows, hidden, head, of_rows, layout, problem.gathers)
    return reduced(loss, loss_fn.temperature, target, count, loss_weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _linear(
    hidden: jax.Array, head: Head, teacher: Teacher, target: jax.Array, inverse: Any, problem: Problem
) -> jax.Array:
    return _linear_forward(hidden, head, teacher, target, inverse, problem)[0]


def _linear_forward(
    hidden: jax.Array, head: Head, teacher: Teacher, target: jax.Array, inverse: Any, problem: Problem
) -> tuple[jax.Array, Any]:
    hidden = gathered(hidden, problem.how.shard, problem.gathers)
    rows = _linear_rows(hidden, head, teacher, target, inverse, problem)
    terms = fold_rows(problem.kernels.linear_terms(rows, problem.how), problem.how.shard)
    return valid_divergence(terms, teacher, target, problem), (hidden, head, teacher, target, inverse, terms)


def _linear_backward(problem: Problem, residuals: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    hidden, head, teacher, target, inverse, terms = residuals
    coefficients, by_log_p = gradients(terms, teacher, target, cotangent, problem)
    rows = _linear_rows(hidden, head, teacher, target, inverse, problem)
    found = problem.kernels.linear_gradients(rows, terms, coefficients, problem.how)
    by_inputs = input_gradients(found, hidden, head, problem.how.shard, problem.gathers)
    return *by_inputs, Teacher(None, by_log_p), None, None if inverse is None else jnp.zeros_like(inverse)  # type: ignore[arg-type]


_linear.defvjp(_linear_forward, _linear_backward)


def _linear_rows(
    hidden: jax.Array, head: Head, teacher: Teacher, target: jax.Array, inverse: Any, problem: Problem
) -> LinearRows:
    shard = problem.how.shard
    columns = local_columns(teacher.classes, head.weight_VH.shape[0], shard)
    return local_rows(hidden, head, target, inverse, problem.num_classes, shard)._replace(
        target=target, columns=columns
    )
