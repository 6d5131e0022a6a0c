"""Knowledge distillation between two heads that never holds the logits of all tokens: `FusedLinearKDLoss`.

Two derivatives, as in `linear_rows`: `_summed` makes the gradients while a chunk's logits are at hand, one
product for the logits of each head and one for each gradient that is wanted; `_rows`, for a vocabulary that is sharded,
makes the logits again in the backward.
"""

# T = tokens (any leading dimensions), V = vocabulary, H = hidden

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loss_core import FusedLinearKDConfig
from loss_core.row_terms import beta_of, jensen_shannon, kl_divergence
from loss_core_jax import compat, inputs
from loss_core_jax.inputs import ArrayLike
from loss_core_jax.kernels import KernelSet, LinearPairs, PairHow, Shard, Wanted
from loss_core_jax.losses.base import Count, Loss, has_fields_of
from loss_core_jax.losses.linear_source import (
    Head,
    Source,
    arithmetic_dtype,
    check_head,
    gathered,
    input_gradients,
    local_rows,
    over_heads,
    times_cotangent,
)
from loss_core_jax.losses.rows import PerRow
from loss_core_jax.parallel import collectives
from loss_core_jax.parallel.layout import NOWHERE, layout_for
from loss_core_jax.reduction import finish_count, row_scale, total, valid_losses, valid_upstream


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
        inputs.check_weights_have_count(loss_weights, num_batch_labels)
        inputs.check_reduction_arguments("sum", labels, None, loss_weights)
        count = inputs.read_count("num_batch_labels", num_batch_labels)
        target = inputs.as_jax(inputs.read_labels(labels, None, self.ignore_index, None))
        student, teacher = _sources(given)
        dtype, beta = arithmetic_dtype(student), beta_of(self)
        if not target.size:
            # JAX forgets what empty arrays vary over.
            return jnp.zeros((), dtype)
        if beta == 1:
            # KL(student || teacher) is KL(teacher || student) with the roles exchanged.
            student, teacher, beta = teacher, student, 0.0
        vocab = layout.vocab(student_lm_weight.shape[0])
        gathers = self.sequence_parallel and bool(layout.axes)
        problem = _Problem(self.kernels, beta, float(self.temperature), layout.shard, vocab, gathers)
        scale = _row_scale(target, dtype, mean=True, count=count, loss_weights=loss_weights)
        if layout != NOWHERE:

            def rows(student: Source, teacher: Source, target: jax.Array) -> jax.Array:
                return _rows(student, teacher, target, problem)

            return _total(over_heads(rows, (student, teacher), target, layout, gathers), scale, count)
        arguments = (student, teacher, target, scale)
        axes = compat.varying_axes(*jax.tree.leaves(arguments))
        aligned = jax.tree.map(lambda x: compat.vary(x, axes), arguments)
        return finish_count(_summed(*aligned, problem), count)


_row_scale = jax.jit(row_scale, static_argnames=("dtype", "mean"))
_total = jax.jit(total)


def _sources(given: tuple[tuple[ArrayLike, ArrayLike], ...]) -> list[Source]:
    """Hidden states and heads of student and teacher, in float64 where one of them is."""
    arrays = [tuple(map(inputs.as_jax, pair)) for pair in given]
    if inputs.arithmetic_dtype(*arrays[0], *arrays[1]) == jnp.float64:
        arrays = [tuple(x.astype(jnp.float64) for x in pair) for pair in arrays]
    return [(hidden, Head(weight_VH)) for hidden, weight_VH in arrays]


class _Problem(NamedTuple):
    """What is static in a call; hashable.

    Attributes:
        beta: as in `PairHow`.
        num_classes: of the whole vocabulary.
        gathers: whether hidden states are this device's share of the sequence, which is gathered.
    """

    kernels: KernelSet
    beta: float
    temperature: float
    shard: Shard
    num_classes: int
    gathers: bool

    def rows(self, sources: Sequence[Source], target: jax.Array) -> LinearPairs:
        """The rows over this device's share of the vocabulary."""
        dtype = arithmetic_dtype(sources[0])
        inverse = None if self.temperature == 1 else jnp.full(target.shape, 1.0 / self.temperature, dtype)
        per_row = PerRow(target, inverse)
        return LinearPairs(*(local_rows(source, per_row, self.num_classes, self.shard) for source in sources))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _summed(student: Source, teacher: Source, target: jax.Array, scale: jax.Array, problem: _Problem) -> jax.Array:
    """Sum over rows of scale * T^2 * divergence; a scalar in the dtype of the arithmetic.

    Args:
        scale: [...] factor per row, in the dtype of the arithmetic; differentiable.
    """
    loss, _ = _losses((student, teacher), target, problem)
    return jnp.sum(loss * scale)


def _summed_forward(student: Any, teacher: Any, target: Any, scale: Any, problem: _Problem) -> tuple[jax.Array, Any]:
    # With symbolic zeros each argument says whether it is differentiated: a frozen teacher costs no product.
    sources = [_values(source) for source in (student, teacher)]
    how = PairHow(problem.beta, problem.shard, (_wanted(student), _wanted(teacher)))
    squared = problem.temperature**2
    upstream = squared * valid_upstream(scale.value, target.value)
    divergences, gradients = problem.kernels.linear_pair_losses_and_gradients(
        problem.rows(sources, target.value), upstream, how
    )
    loss = valid_losses(squared * divergences, target.value)
    # Empty arrays carry the dtypes to the backward.
    likes = [[jnp.zeros(0, x.dtype) for x in (hidden, head.weight_VH)] for hidden, head in sources]
    return jnp.sum(loss * scale.value), (gradients, loss, target.value, likes)


def _summed_backward(problem: _Problem, residuals: Any, cotangent: Any) -> tuple[Any, ...]:
    gradients, loss, target, likes = residuals
    cotangent = compat.instantiate(cotangent)

    def times(gradient: Any, like: jax.Array, of_rows: bool) -> Any:
        return times_cotangent(gradient, cotangent, target, like.dtype, of_rows=of_rows)

    by_sources = (
        (times(found.hidden, hidden, True), Head(times(found.weight_VH, weight_VH, False)))
        for found, (hidden, weight_VH) in zip(gradients, likes, strict=True)
    )
    return *by_sources, None, times(loss[..., None], loss, True)[..., 0]


_summed.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rows(student: Source, teacher: Source, target: jax.Array, problem: _Problem) -> jax.Array:
    """T^2 times the divergence per row, shape of target, whose sums over the vocabulary are made by several devices."""
    return _rows_forward(student, teacher, target, problem)[0]


def _rows_forward(student: Source, teacher: Source, target: jax.Array, problem: _Problem) -> tuple[jax.Array, Any]:
    whole = [(gathered(hidden, problem.shard, problem.gathers), head) for hidden, head in (student, teacher)]
    loss, found = _losses(whole, target, problem)
    return loss, (whole, found, target)


def _losses(whole: Sequence[Source], target: jax.Array, problem: _Problem) -> tuple[jax.Array, Any]:
    """T^2 times the divergence of each row; terms and sums of the whole rows."""
    kernels, how, rows = problem.kernels, PairHow(problem.beta, problem.shard), problem.rows(whole, target)
    terms = collectives.fold_pairs(kernels.linear_pair_terms(rows, how), 1.0, problem.shard)
    if problem.beta:
        sums: Any = collectives.added(kernels.linear_pair_mixture(rows, terms, how), problem.shard)
        divergences = jensen_shannon(jnp, terms, sums, problem.beta)
    else:
        divergences = sums = kl_divergence(jnp, terms)
    return valid_losses(problem.temperature**2 * divergences, target), (terms, sums)


def _rows_backward(problem: _Problem, residuals: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    whole, (terms, sums), target = residuals
    shard = problem.shard
    upstream = valid_upstream(collectives.whole_cotangent(cotangent, shard), target) * problem.temperature**2
    # All are wanted: in `jax.shard_map` JAX does not say which are not, and leaves out what is not used.
    how, rows = PairHow(problem.beta, shard), problem.rows(whole, target)
    gradients = problem.kernels.linear_pair_gradients(rows, terms, sums, upstream, how)
    by_sources = (
        input_gradients(found, hidden, head, shard, problem.gathers)
        for found, (hidden, head) in zip(gradients, whole, strict=True)
    )
    return *by_sources, None


_rows.defvjp(_rows_forward, _rows_backward)


def _values(source: Any) -> Source:
    """The arrays of a source whose leaves say whether they are differentiated."""
    hidden, head = source
    return hidden.value, Head(head.weight_VH.value)


def _wanted(source: Any) -> Wanted:
    hidden, head = source
    return Wanted(hidden.perturbed, head.weight_VH.perturbed, bias=False)
