"""Knowledge distillation between two heads, without the logits of all tokens at a time: `FusedLinearKDLoss`."""

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
from loss_core_jax.kernels import KernelSet, LinearGradients, LinearPairs, PairOptions, Shard, Wanted
from loss_core_jax.losses.base import Count, Loss, has_fields_of
from loss_core_jax.losses.linear import Head, Source, Sources, arithmetic_dtype, check_head, weighted_sum
from loss_core_jax.losses.rows import PerRow
from loss_core_jax.parallel.collectives import fold_mixture, fold_pairs, full_cotangent
from loss_core_jax.parallel.layout import layout_for
from loss_core_jax.reduction import RowResults, guard_count, row_scale, valid_losses, valid_upstream


@has_fields_of(FusedLinearKDConfig)
class FusedLinearKDLoss(Loss):
    """Divergence of a student's `hidden_states @ lm_weight.T` from a teacher's, computed by chunks of tokens.

    The logits of all tokens never exist at a time, except in second derivatives. Gradients that are not needed cost no
    product.

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
            teacher_hidden_states: [..., H_t] floating, differentiable; H_t and dtype may differ from the student's.
            teacher_lm_weight: [V, H_t]; as student_lm_weight.
            labels: [...] integers of any width; only compared with ignore_index.
            num_batch_labels: divides the sum instead of the number of positions; 0 gives 0.
            loss_weights: [...] factor per position; with num_batch_labels only.
        Returns:
            A scalar in float32, float64 for float64 inputs.
        Raises:
            TypeError: labels are floating or boolean, dtypes of hidden states and weight are not as for lm_weight in
                FusedLinearCrossEntropy.
            ValueError: shapes do not match, a readable count is negative or NaN, or weights come without a count.
        """
        arrays = ((student_hidden_states, student_lm_weight), (teacher_hidden_states, teacher_lm_weight))
        for prefix, (hidden, weight) in zip(("student_", "teacher_"), arrays, strict=True):
            inputs.check_arrays(**{f"{prefix}hidden_states": hidden, f"{prefix}lm_weight": weight})
        inputs.check_arrays(labels=labels, loss_weights=loss_weights)
        layout = layout_for(self.tp_group, *arrays[0], 0)
        for prefix, (hidden, weight) in zip(("student_", "teacher_"), arrays, strict=True):
            check_head(self, hidden, labels, weight, layout, prefix)
        if student_lm_weight.shape[0] != teacher_lm_weight.shape[0]:
            raise ValueError(
                f"student_lm_weight has shape {student_lm_weight.shape} but teacher_lm_weight has shape "
                f"{teacher_lm_weight.shape}; both must have a row for each class, as many as the other."
            )
        count = inputs.read_batch_count(labels, num_batch_labels, loss_weights)
        target = inputs.as_jax(inputs.read_labels(labels, None, self.ignore_index, None))
        student, teacher = _sources(arrays)
        dtype, beta = arithmetic_dtype(student), beta_of(self)
        if not target.size:
            # JAX loses the varying mesh axes of empty arrays.
            return jnp.zeros((), dtype)
        if beta == 1:
            # KL(student || teacher) is KL(teacher || student) with the roles exchanged.
            student, teacher, beta = teacher, student, 0.0
        options = PairOptions(beta, float(self.temperature), layout.shard)
        vocab, sequence_sharded = layout.vocab(student_lm_weight.shape[0]), self.sequence_parallel and bool(layout.axes)
        pair_loss = _PairLoss(self.kernels, options, vocab, sequence_sharded)
        scale = row_scale(target, dtype, mean=True, count=count, loss_weights=loss_weights)
        loss, _ = weighted_sum((student, teacher), PerRow(target), scale, pair_loss, layout)
        return guard_count(loss, count)


def _sources(arrays: tuple[tuple[ArrayLike, ArrayLike], ...]) -> list[Source]:
    """Hidden states and heads of student and teacher; all in float64 if any is."""
    pairs = [tuple(map(inputs.as_jax, pair)) for pair in arrays]
    if inputs.arithmetic_dtype(*pairs[0], *pairs[1]) == jnp.float64:
        pairs = [tuple(x.astype(jnp.float64) for x in pair) for pair in pairs]
    return [(hidden, Head(weight_VH)) for hidden, weight_VH in pairs]


class _PairLoss(NamedTuple):
    """The static arguments of a call, which are a `LinearLoss` of two sources. Hashable.

    Attributes:
        num_classes: of the full vocabulary.
        sequence_sharded: see `LinearLoss`.
    """

    kernels: KernelSet
    options: PairOptions
    num_classes: int
    sequence_sharded: bool

    @property
    def shard(self) -> Shard:
        return self.options.shard

    def results(self, sources: Sources, per_row: PerRow) -> tuple[RowResults, tuple[PairTerms, MixtureTerms | None]]:
        kernels, options, rows = self.kernels, self.options, self._pairs(sources, per_row)
        terms = fold_pairs(kernels.linear_pair_terms(rows, options), 1.0, options.shard)
        sums = fold_mixture(kernels.linear_pair_mixture(rows, terms, options), options.shard) if options.beta else None
        divergences = kl_divergence(jnp, terms) if sums is None else jensen_shannon(jnp, terms, sums, options.beta)
        return self._row_results(divergences, per_row), (terms, sums)

    def gradients(
        self, sources: Sources, per_row: PerRow, saved: Any, cotangents: RowResults
    ) -> tuple[Sequence[LinearGradients], None]:
        (terms, sums), ((cotangent,), _) = saved, cotangents
        upstream = valid_upstream(full_cotangent(cotangent, self.shard), per_row.target) * self.options.temperature**2
        rows = self._pairs(sources, per_row)
        return self.kernels.linear_pair_gradients(rows, terms, sums, upstream, self.options), None

    def results_and_gradients(
        self, sources: Sources, per_row: PerRow, upstream: jax.Array, wanted: Sequence[Wanted]
    ) -> tuple[RowResults, Sequence[LinearGradients]]:
        student, teacher = wanted
        divergences, gradients = self.kernels.linear_pair_losses_and_gradients(
            self._pairs(sources, per_row), self.options.temperature**2 * upstream, self.options, (student, teacher)
        )
        return self._row_results(divergences, per_row), gradients

    def _pairs(self, sources: Sources, per_row: PerRow) -> LinearPairs:
        rows = (per_row.linear_rows(source, self.num_classes, self.shard) for source in sources)
        return LinearPairs(*rows)

    def _row_results(self, divergences: jax.Array, per_row: PerRow) -> RowResults:
        return (valid_losses(self.options.temperature**2 * divergences, per_row.target),), ()
