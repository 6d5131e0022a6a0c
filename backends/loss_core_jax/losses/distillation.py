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
from loss_core_jax.kernels import KernelSet, PairOptions, Pairs
from loss_core_jax.losses.base import Count, Loss, has_fields_of
from loss_core_jax.parallel.collectives import align, fold_mixture, fold_pairs, full_cotangent
from loss_core_jax.parallel.layout import Layout, Operand, call_sharded, layout_for
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
            teacher_logits: shape of student_logits; floating; also differentiable.
            labels: [...] integers of any width; only compared with ignore_index.
            num_batch_labels: divides the sum instead of the number of positions; 0 gives 0.
            loss_weights: [...] factor per position; with num_batch_labels only.
        Returns:
            A scalar in float32 (float64 for float64 logits), or in the dtype of the student's logits with
            fp32_upcast=False.
        Raises:
            TypeError: labels are floating or boolean, logits are not floating.
            ValueError: shapes do not match, a readable count is negative or NaN, or weights come without a count.
        """
        inputs.check_arrays(
            student_logits=student_logits, teacher_logits=teacher_logits, labels=labels, loss_weights=loss_weights
        )
        inputs.check_pair(student_logits, teacher_logits, labels)
        count = inputs.read_batch_count(labels, num_batch_labels, loss_weights)
        layout = layout_for(self.tp_group, student_logits, student_logits, -1)
        target = inputs.read_labels(labels, None, self.ignore_index, None)
        return _reduced(self, student_logits, teacher_logits, target, count, loss_weights, layout=layout)


class _PairLoss(NamedTuple):
    """The static arguments of a call. Hashable."""

    kernels: KernelSet
    options: PairOptions


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
    """The loss of checked arguments."""
    beta = beta_of(loss_fn)
    # KL(student || teacher) is KL(teacher || student) with the roles exchanged.
    roles, beta = ((teacher, student), 0.0) if beta == 1 else ((student, teacher), beta)
    options = PairOptions(beta, float(loss_fn.temperature), layout.shard, int(loss_fn.chunk_size))
    losses = _from_logits(*roles, target, _PairLoss(loss_fn.kernels, options), layout)
    scale = row_scale(target, losses.dtype, mean=True, count=count, loss_weights=loss_weights)
    loss = total(losses, scale, count)
    return loss if loss_fn.fp32_upcast else loss.astype(student.dtype)


def _from_logits(
    student: jax.Array, teacher: jax.Array, target: jax.Array, pair_loss: _PairLoss, layout: Layout
) -> jax.Array:
    """T^2 times the divergence per row, for any layout; 0 where the target is IGNORED."""
    if not target.size:
        # JAX loses the varying mesh axes of empty arrays.
        return jnp.zeros(target.shape, inputs.arithmetic_dtype(student, teacher))

    def local_losses(student: jax.Array, teacher: jax.Array, target: jax.Array) -> jax.Array:
        return _rows(Pairs(*align(layout.axes, (student, teacher), (target,))), pair_loss)

    logits = (Operand(x, -1, padding=-jnp.inf) for x in (student, teacher))
    return call_sharded(layout, local_losses, *logits, Operand(target))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _rows(pairs: Pairs, pair_loss: _PairLoss) -> jax.Array:
    return _forward(pairs, pair_loss)[0]


def _forward(pairs: Pairs, pair_loss: _PairLoss) -> tuple[jax.Array, Any]:
    kernels, options = pair_loss
    terms = fold_pairs(kernels.pair_terms(pairs, options), options.temperature, options.shard)
    sums = fold_mixture(kernels.pair_mixture(pairs, terms, options), options.shard) if options.beta else None
    loss = kl_divergence(jnp, terms) if sums is None else jensen_shannon(jnp, terms, sums, options.beta)
    return valid_losses(options.temperature**2 * loss, pairs.target), (pairs, terms, sums)


def _backward(pair_loss: _PairLoss, residuals: Any, cotangent: jax.Array) -> tuple[Any]:
    (pairs, terms, sums), (kernels, options) = residuals, pair_loss
    upstream = valid_upstream(full_cotangent(cotangent, options.shard), pairs.target) * options.temperature**2
    student, teacher = kernels.pair_gradients(pairs, terms, sums, upstream, options)
    return (Pairs(student, teacher, None),)  # type: ignore[arg-type]


_rows.defvjp(_forward, _backward)
