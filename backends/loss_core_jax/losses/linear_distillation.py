"""Knowledge distillation between two heads that never holds the logits of all tokens: `FusedLinearKDLoss`."""

# T = tokens (any leading dimensions), V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loss_core import FusedLinearKDConfig
from loss_core.row_terms import MixtureTerms, PairTerms, beta_of, jensen_shannon, kl_divergence
from loss_core_jax import inputs
from loss_core_jax.inputs import ArrayLike
from loss_core_jax.kernels import KernelSet, LinearGradients, LinearPairs, PairHow, Shard, Wanted
from loss_core_jax.losses.base import Count, Loss, has_fields_of
from loss_core_jax.losses.linear import Head, Source, Sources, arithmetic_dtype, check_head, summed
from loss_core_jax.losses.rows import PerRow
from loss_core_jax.parallel.collectives import added, fold_pairs, whole_cotangent
from loss_core_jax.parallel.layout import layout_for
from loss_core_jax.reduction import RowResults, finish_count, row_scale, valid_losses, valid_upstream


@has_fields_of(FusedLinearKDConfig)
class FusedLinearKDLoss(Loss):
    """Divergence of a student's `hidden_states @ lm_weight.T` from a teacher's, without ever holding all logits.

    No product is made for gradients that are not asked for. A second derivative is right, but keeps the logits of every
    chunk.

    Fields are those of `loss_core.FusedLinearKDConfig`; tp_group is the name of a mesh axis, or a tuple of names.
    """

    temperature: float
    divergence: str
    beta: float
    _vocab_axis = None

    def __call__(
        self,
        student_hidden_states: ArrayLike,
        student_lm_weight: ArrayLike,
        teacher_hidden_states: ArrayLike,
        teacher_lm_weight: ArrayLike,
        labels: ArrayLike,
        num_batch_labels: Count | None = None,
        loss_weights: ArrayLike | None = None,
    ) -> jax.Array:
        """Mean over positions that are not ignored of T^2 times the divergence.

        Args:
            student_hidden_states: [..., H] floating.
            student_lm_weight: [V, H]; as lm_weight in FusedLinearCrossEntropy.
            teacher_hidden_states: [..., H_t] floating, of a hidden size and a dtype of its own; differentiable, too.
            teacher_lm_weight: [V, H_t]; likewise.
            labels: [...] integers of any width; they only say what is ignored, by ignore_index.
            num_batch_labels: divides the sum instead of the number of positions; 0 gives 0.
            loss_weights: [...] factor per position; with num_batch_labels only.
        Returns:
            A scalar in float32, float64 for float64 inputs.
        Raises:
            TypeError: labels are floating or boolean, hidden states and weight differ in dtype in another way.
            ValueError: shapes do not match, a count that can be read is negative or NaN, or weights without a count.
        """
        given = ((student_hidden_states, student_lm_weight), (teacher_hidden_states, teacher_lm_weight))
        for of, (hidden, weight) in zip(("student_", "teacher_"), given, strict=True):
            inputs.check_arrays(**{f"{of}hidden_states": hidden, f"{of}lm_weight": weight})
        inputs.check_arrays(labels=labels, loss_weights=loss_weights)
        layout = layout_for(self.tp_group, *given[0], 0)
        for of, (hidden, weight) in zip(("student_", "teacher_"), given, strict=True):
            check_head(self, hidden, labels, weight, layout, of)
        if student_lm_weight.shape[0] != teacher_lm_weight.shape[0]:
            raise ValueError(
                f"student_lm_weight has shape {student_lm_weight.shape} but teacher_lm_weight has shape "
                f"{teacher_lm_weight.shape}; both must have a row for each class, as many as the other."
            )
        count = inputs.read_batch_count(labels, num_batch_labels, loss_weights)
        target = inputs.as_jax(inputs.read_labels(labels, None, self.ignore_index, None))
        student, teacher = _sources(given)
        dtype, beta = arithmetic_dtype(student), beta_of(self)
        if not target.size:
            # JAX forgets what empty arrays vary over.
            return jnp.zeros((), dtype)
        if beta == 1:
            # KL(student || teacher) is KL(teacher || student) with the roles exchanged.
            student, teacher, beta = teacher, student, 0.0
        how = PairHow(beta, float(self.temperature), layout.shard)
        vocab, gathers = layout.vocab(student_lm_weight.shape[0]), self.sequence_parallel and bool(layout.axes)
        problem = _Problem(self.kernels, how, vocab, gathers)
        scale = row_scale(target, dtype, mean=True, count=count, loss_weights=loss_weights)
        loss, _ = summed((student, teacher), PerRow(target), scale, problem, layout)
        return finish_count(loss, count)


def _sources(given: tuple[tuple[ArrayLike, ArrayLike], ...]) -> list[Source]:
    """Hidden states and heads of student and teacher, in float64 where one of them is."""
    arrays = [tuple(map(inputs.as_jax, pair)) for pair in given]
    if inputs.arithmetic_dtype(*arrays[0], *arrays[1]) == jnp.float64:
        arrays = [tuple(x.astype(jnp.float64) for x in pair) for pair in arrays]
    return [(hidden, Head(weight_VH)) for hidden, weight_VH in arrays]


class _Problem(NamedTuple):
    """What is static in a call: hashable, and a `LinearLoss` of two sources.

    Attributes:
        num_classes: of the whole vocabulary.
        gathers: whether hidden states are this device's share of the sequence, which is gathered.
    """

    kernels: KernelSet
    how: PairHow
    num_classes: int
    gathers: bool

    @property
    def shard(self) -> Shard:
        return self.how.shard

    def results(self, sources: Sources, per_row: PerRow) -> tuple[RowResults, tuple[PairTerms, MixtureTerms | None]]:
        kernels, how, rows = self.kernels, self.how, self._pairs(sources, per_row)
        terms = fold_pairs(kernels.linear_pair_terms(rows, how), 1.0, how.shard)
        sums = added(kernels.linear_pair_mixture(rows, terms, how), how.shard) if how.beta else None
        divergences = kl_divergence(jnp, terms) if sums is None else jensen_shannon(jnp, terms, sums, how.beta)
        return self._of_rows(divergences, per_row), (terms, sums)

    def gradients(
        self, sources: Sources, per_row: PerRow, kept: Any, cotangents: RowResults
    ) -> tuple[Sequence[LinearGradients], None]:
        (terms, sums), ((cotangent,), _) = kept, cotangents
        upstream = valid_upstream(whole_cotangent(cotangent, self.shard), per_row.target) * self.how.temperature**2
        rows = self._pairs(sources, per_row)
        return self.kernels.linear_pair_gradients(rows, terms, sums, upstream, self.how), None

    def results_and_gradients(
        self, sources: Sources, per_row: PerRow, upstream: jax.Array, wanted: Sequence[Wanted]
    ) -> tuple[RowResults, Sequence[LinearGradients]]:
        student, teacher = wanted
        divergences, gradients = self.kernels.linear_pair_losses_and_gradients(
            self._pairs(sources, per_row), self.how.temperature**2 * upstream, self.how, (student, teacher)
        )
        return self._of_rows(divergences, per_row), gradients

    def _pairs(self, sources: Sources, per_row: PerRow) -> LinearPairs:
        rows = (per_row.linear_rows(source, self.num_classes, self.shard) for source in sources)
        return LinearPairs(*rows)

    def _of_rows(self, divergences: jax.Array, per_row: PerRow) -> RowResults:
        return (valid_losses(self.how.temperature**2 * divergences, per_row.target),), ()
