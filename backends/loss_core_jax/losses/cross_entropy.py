"""Cross entropy over logits: `MaskedCrossEntropy` and `TEParallelCrossEntropy`.

The derivative is a custom one: it keeps the logits as they came and the terms of each row.
"""

# T = tokens (any leading dimensions), V = vocabulary

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loss_core import MaskedCrossEntropyConfig, TEParallelCEConfig
from loss_core.row_terms import CrossEntropy, RowTerms
from loss_core_jax import inputs, metrics
from loss_core_jax.inputs import ArrayLike
from loss_core_jax.kernels import How, KernelSet, Rows
from loss_core_jax.losses.base import Count, Loss, has_fields_of
from loss_core_jax.metrics import Result
from loss_core_jax.parallel.collectives import align, fold_rows, local_target, num_local_classes, whole_cotangent
from loss_core_jax.parallel.layout import Layout, Operand, layout_for, over
from loss_core_jax.reduction import row_scale, total, valid_losses, valid_upstream

Residuals = tuple[jax.Array, jax.Array, RowTerms]

# Loss and metrics of each row.
RowResults = tuple[jax.Array, tuple[jax.Array, ...]]


class _LogitsCrossEntropy(Loss):
    reduction: str
    logit_softcapping: float
    metrics: tuple[str, ...]
    # Of the class that has no such field.
    fp32_upcast = True

    def __call__(
        self,
        logits: ArrayLike,
        labels: ArrayLike,
        mask: ArrayLike | None = None,
        num_label_tokens: Count | None = None,
        loss_weights: ArrayLike | None = None,
    ) -> Result:
        """Cross entropy of `softmax(logits)` at the labels.

        Args:
            logits: [..., V] floating.
            labels: [...] integers of any width, in [0, V) or ignore_index.
            mask: shape of labels or broadcastable to it; positions where it is 0 are ignored.
            num_label_tokens: divides the sum; 0 gives 0. Reduction "sum" only.
            loss_weights: [...] factor per position. Reduction "sum" only.
        Returns:
            A scalar, or the shape of labels for reduction "none"; float32 (float64 for float64 logits), or the
            dtype of the logits with fp32_upcast=False. With metrics a pair: the loss, and a dict of them, not
            differentiated.
        Raises:
            TypeError: labels are floating or boolean, logits are not floating.
            ValueError: shapes do not match, or a label or count that can be read is out of its range.
        """
        inputs.check_arrays(logits=logits, labels=labels, mask=mask, loss_weights=loss_weights)
        inputs.check_logits("logits", logits, labels)
        inputs.check_mask(labels, mask)
        inputs.check_reduction_arguments(self.reduction, labels, num_label_tokens, loss_weights)
        count = inputs.read_count("num_label_tokens", num_label_tokens)
        layout = layout_for(self.tp_group, logits, logits, -1)
        target = inputs.read_labels(labels, mask, self.ignore_index, layout.vocab(logits.shape[-1]))
        return _reduced(self, logits, target, count, loss_weights, layout=layout)


@has_fields_of(MaskedCrossEntropyConfig)
class MaskedCrossEntropy(_LogitsCrossEntropy):
    """Cross entropy over logits, with a mask.

    Fields are those of `loss_core.MaskedCrossEntropyConfig`; tp_group is the name of a mesh axis, or a tuple of names;
    inplace_grad must be False.
    """


@has_fields_of(TEParallelCEConfig)
class TEParallelCrossEntropy(_LogitsCrossEntropy):
    """As `MaskedCrossEntropy`, always in float32 (float64 for float64 logits).

    Fields are those of `loss_core.TEParallelCEConfig`; tp_group is the name of a mesh axis, or a tuple of names;
    inplace_grad must be False.
    """


@functools.partial(jax.jit, static_argnames="layout")
def _reduced(
    loss_fn: _LogitsCrossEntropy,
    logits: jax.Array,
    target: jax.Array,
    count: jax.Array | None,
    loss_weights: jax.Array | None,
    *,
    layout: Layout,
) -> Result:
    """The loss of arguments that have been checked."""
    objective, names = CrossEntropy.of(loss_fn, layout.vocab(logits.shape[-1])), metrics.of_rows(loss_fn.metrics)
    how = How(objective.sums, float(loss_fn.logit_softcapping), layout.shard)
    loss, found = loss_rows(Problem(loss_fn.kernels, objective, how, names), logits, target, layout)

    def reduced(of_rows: jax.Array) -> jax.Array:
        if loss_fn.reduction == "none":
            return of_rows
        scale = row_scale(target, loss.dtype, mean=loss_fn.reduction == "mean", count=count, loss_weights=loss_weights)
        return total(of_rows, scale, count)

    result = reduced(loss)
    result = result if loss_fn.fp32_upcast else result.astype(logits.dtype)
    return metrics.with_metrics(loss_fn.metrics, result, found, target, reduced)


class Problem(NamedTuple):
    """What is static in a call; hashable.

    Attributes:
        metrics: names of `row_terms.token_metrics`.
    """

    kernels: KernelSet
    objective: CrossEntropy
    how: How
    metrics: tuple[str, ...] = ()


def loss_rows(problem: Problem, logits: jax.Array, target: jax.Array, layout: Layout) -> RowResults:
    """Cross entropy and metrics per row, for any layout; 0 where the target is IGNORED, NaN where it is INVALID.

    Args:
        logits: [..., V], or this device's share inside `jax.shard_map`.
        target: [...] int32, classes of the full vocabulary or IGNORED or INVALID.
    """
    if not target.size:
        # JAX forgets what empty arrays vary over.
        none = jnp.zeros(target.shape, inputs.arithmetic_dtype(logits))
        return none, (none,) * len(problem.metrics)

    def inside(logits: jax.Array, target: jax.Array) -> Any:
        logits, target = align(layout.axes, (logits,), (target,))
        return _rows(logits, target, problem)

    found: Any = over(layout, inside, Operand(logits, -1, padding=-jnp.inf), Operand(target))
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rows(logits: jax.Array, target: jax.Array, problem: Problem) -> RowResults:
    return _forward(logits, target, problem)[0]


def _forward(logits: jax.Array, target: jax.Array, problem: Problem) -> tuple[RowResults, Residuals]:
    kernels, objective, how, names = problem
    terms = fold_rows(kernels.row_terms(_local(logits, target, problem), how), how.shard)
    loss = valid_losses(objective.values(jnp, terms)[0], target)
    # The logits as they came, not reshaped: outside a jit a reshaped residual would be a copy.
    return (loss, metrics.made(terms, target, objective, names)), (logits, target, terms)


def _backward(problem: Problem, residuals: Residuals, cotangents: RowResults) -> tuple[jax.Array, None]:
    kernels, objective, how, _ = problem
    logits, target, terms = residuals
    upstream = valid_upstream(whole_cotangent(cotangents[0], how.shard), target)
    coefficients = objective.coefficients(jnp, terms, [upstream])
    return kernels.row_gradient(_local(logits, target, problem), terms, coefficients, how), None


_rows.defvjp(_forward, _backward)


def _local(logits: jax.Array, target: jax.Array, problem: Problem) -> Rows:
    num_local, shard = logits.shape[-1], problem.how.shard
    num_classes = num_local_classes(num_local, problem.objective.num_classes, shard)
    return Rows(logits, local_target(target, num_local, shard), num_classes)
