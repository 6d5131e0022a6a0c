"""Distillation from K log-probabilities of a teacher: `TopKDistillation`, and `FusedLinearTopKDistillation`."""

# T = tokens (any leading dimensions), V = vocabulary, H = hidden, K = classes of the teacher

from __future__ import annotations

import functools
from typing import Any

import jax

from loss_core import FusedLinearTopKDistillationConfig, TopKDistillationConfig
from loss_core.row_terms import TopK
from loss_core_jax import inputs
from loss_core_jax.inputs import ArrayLike
from loss_core_jax.losses.base import Count, Loss, has_fields_of
from loss_core_jax.losses.linear import arithmetic_dtype, read_source
from loss_core_jax.losses.rows import PerRow, ResultsFn, RowLoss, results_from_head, results_from_logits
from loss_core_jax.parallel.layout import Layout, layout_for
from loss_core_jax.reduction import row_scale, total
from loss_core_jax.temperature import inverse_temperature
from loss_core_jax.top_k_teacher import check_teacher, read_teacher


class _TopKDistillation(Loss):
    """The preprocessing that is the same over logits and over hidden states."""

    temperature: float
    tail: bool
    _vocab_axis = None

    def _objective_and_rows(
        self, labels: ArrayLike, indices: ArrayLike, logprobs: ArrayLike, vocab: int, dtype: Any
    ) -> tuple[TopK, PerRow]:
        target = inputs.read_labels(labels, None, self.ignore_index, None)
        teacher, target = read_teacher(indices, logprobs, target, vocab, dtype)
        # A teacher with all classes has no tail.
        objective = TopK(None, self.tail and indices.shape[-1] < vocab)
        return objective, PerRow(target, inverse_temperature(None, self.temperature, labels, dtype), teacher)


@has_fields_of(TopKDistillationConfig)
class TopKDistillation(_TopKDistillation):
    """KL(teacher || student) from K log-probabilities of the teacher, times T^2.

    Fields are those of `loss_core.TopKDistillationConfig`; tp_group is the name of a mesh axis, or a tuple of names.
    """

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
            teacher_indices: [..., K] integers of any width: classes in [0, V), in any order, distinct in each position.
            teacher_logprobs: [..., K] floating: the teacher's log-probabilities of these classes at this temperature;
                -inf for a probability of 0; differentiable, also through the tail's probability.
            labels: [...] integers of any width; only compared with ignore_index.
            num_batch_labels: divides the sum instead of the number of positions; 0 gives 0.
            loss_weights: [...] factor per position; with num_batch_labels only.
        Returns:
            A scalar in float32 (float64 for float64 arguments), or in the dtype of the student's logits with
            fp32_upcast=False. +inf where the teacher's probability of a class, or of the tail, is not 0 and the
            student's is.
        Raises:
            TypeError: labels or indices are not integers, logits or log-probabilities are not floating.
            ValueError: shapes do not match, a readable count is negative or NaN, or weights come without a count; a
                readable teacher is not a distribution (if not readable, the position is NaN), see `read_teacher`.
        """
        inputs.check_arrays(student_logits=student_logits, labels=labels, loss_weights=loss_weights)
        inputs.check_logits("student_logits", student_logits, labels)
        count = inputs.read_batch_count(labels, num_batch_labels, loss_weights)
        layout = layout_for(self.tp_group, student_logits, student_logits, -1)
        vocab = layout.vocab(student_logits.shape[-1])
        check_teacher(labels, teacher_indices, teacher_logprobs, vocab)
        student = inputs.as_jax(student_logits)
        dtype = inputs.arithmetic_dtype(student, inputs.as_jax(teacher_logprobs))
        objective, per_row = self._objective_and_rows(labels, teacher_indices, teacher_logprobs, vocab, dtype)
        row_loss = RowLoss.of(self, objective, layout, vocab)
        return _reduced(
            self, results_from_logits, student, per_row, count, loss_weights, row_loss=row_loss, layout=layout
        )


@has_fields_of(FusedLinearTopKDistillationConfig)
class FusedLinearTopKDistillation(_TopKDistillation):
    """TopKDistillation of `hidden_states @ lm_weight.T`; the logits of all tokens never exist at a time.

    Fields are those of `loss_core.FusedLinearTopKDistillationConfig`; tp_group is the name of a mesh axis, or a tuple
    of names. The backward recomputes the logits of each chunk: four products in all.
    """

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
            lm_weight: as in FusedLinearCrossEntropy.
            teacher_indices: as in TopKDistillation.
            teacher_logprobs: as in TopKDistillation; cast to the dtype of the arithmetic, which the hidden states set.
            labels: as in TopKDistillation.
            num_batch_labels: as in TopKDistillation.
            loss_weights: as in TopKDistillation.
            lm_bias: as in FusedLinearCrossEntropy.
        Returns:
            A scalar in float32 (float64 for float64 hidden states).
        Raises:
            TypeError, ValueError: as FusedLinearCrossEntropy and TopKDistillation.
        """
        inputs.check_arrays(hidden_states=hidden_states, lm_weight=lm_weight, labels=labels, loss_weights=loss_weights)
        source, layout = read_source(self, hidden_states, labels, lm_weight, lm_bias)
        count = inputs.read_batch_count(labels, num_batch_labels, loss_weights)
        vocab = layout.vocab(lm_weight.shape[0])
        check_teacher(labels, teacher_indices, teacher_logprobs, vocab)
        dtype = arithmetic_dtype(source)
        objective, per_row = self._objective_and_rows(labels, teacher_indices, teacher_logprobs, vocab, dtype)
        row_loss = RowLoss.of(self, objective, layout, vocab)
        return _reduced(self, results_from_head, source, per_row, count, loss_weights, row_loss=row_loss, layout=layout)


@functools.partial(jax.jit, static_argnames=("results_fn", "row_loss", "layout"))
def _reduced(
    loss_fn: _TopKDistillation,
    results_fn: ResultsFn,
    source: Any,
    per_row: PerRow,
    count: jax.Array | None,
    loss_weights: jax.Array | None,
    *,
    row_loss: RowLoss,
    layout: Layout,
) -> jax.Array:
    """The loss of checked arguments: T^2 times the sum or mean of the rows' divergences."""
    (losses,), _ = results_fn(source, per_row, row_loss, layout)
    losses = float(loss_fn.temperature) ** 2 * losses
    scale = row_scale(per_row.target, losses.dtype, mean=True, count=count, loss_weights=loss_weights)
    loss = total(losses, scale, count)
    return loss if loss_fn.fp32_upcast else loss.astype(source.dtype)
