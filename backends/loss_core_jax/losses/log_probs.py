"""Log-probabilities and entropies: `LogProbs` over logits, `FusedLinearLogProbs` over hidden states and weight.

The derivatives are custom ones: they keep the logits (or hidden states and weight) as they came and the terms of each
row. Over hidden states the backward makes each chunk's logits again: four products in all.
"""

# T = tokens (any leading dimensions), V = vocabulary, H = hidden

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loss_core import FusedLinearLogProbsConfig, LogProbsConfig, TokenLogProbs
from loss_core.row_terms import Coefficients, LogProbability, RowTerms, Sums, entropy
from loss_core_jax import inputs
from loss_core_jax.inputs import ArrayLike
from loss_core_jax.kernels import How, KernelSet, Rows
from loss_core_jax.losses.base import Loss, has_fields_of
from loss_core_jax.losses.linear_source import (
    Head,
    gathered,
    input_gradients,
    linear_layout,
    local_rows,
    over_head,
)
from loss_core_jax.parallel import collectives
from loss_core_jax.parallel.collectives import fold_rows, local_target, num_local_classes, whole_cotangent
from loss_core_jax.parallel.layout import Layout, Operand, layout_for, over
from loss_core_jax.reduction import valid_losses, valid_upstream
from loss_core_jax.temperature import inverse_temperature

Results = tuple[jax.Array, jax.Array | None]


class Problem(NamedTuple):
    """What is static in a call; hashable.

    Attributes:
        num_classes: of all devices.
        gathers: whether hidden states are this device's share of the sequence, which is gathered.
    """

    kernels: KernelSet
    num_classes: int
    how: How
    gathers: bool = False


@has_fields_of(LogProbsConfig)
class LogProbs(Loss):
    """Log-probability of each label, and the entropy of its distribution.

    Fields are those of `loss_core.LogProbsConfig`; tp_group is the name of a mesh axis, or a tuple of names.
    """

    temperature: float
    logit_softcapping: float
    entropy: bool

    def __call__(
        self, logits: ArrayLike, labels: ArrayLike, temperature: float | ArrayLike | None = None
    ) -> TokenLogProbs:
        """Log-probabilities of labels under softmax(softcap(logits) / temperature).

        Args:
            logits: [..., V] floating.
            labels: [...] integers of any width, in [0, V) or ignore_index.
            temperature: > 0, a number, or a floating array of one number or [...]; its gradient is 0. None: that of the
                config. Below 2**-63 it is taken for that.
        Returns:
            Log-probabilities [...], and entropies [...] in nats where the config asks for them; float32 (float64 for
            float64 logits), 0 where ignored.
        Raises:
            TypeError: labels are floating or boolean, logits are not floating.
            ValueError: shapes do not match; a label or temperature that can be read is out of its range.
        """
        inputs.check_arrays(logits=logits, labels=labels)
        inputs.check_logits("logits", logits, labels)
        layout = layout_for(self.tp_group, logits, logits, -1)
        vocab = layout.vocab(logits.shape[-1])
        target = inputs.as_jax(inputs.read_labels(labels, None, self.ignore_index, vocab))
        logits = inputs.as_jax(logits)
        dtype = inputs.arithmetic_dtype(logits)
        inverse = inverse_temperature(temperature, self.temperature, labels, dtype)
        how = How(Sums(e=self.entropy), float(self.logit_softcapping), layout.shard)
        problem = Problem(self.kernels, vocab, how)
        return _over_logits(logits, target, inverse, problem, layout)


@has_fields_of(FusedLinearLogProbsConfig)
class FusedLinearLogProbs(Loss):
    """Log-probabilities and entropies of `hidden_states @ lm_weight.T`, without ever holding all logits.

    Fields are those of `loss_core.FusedLinearLogProbsConfig`; tp_group is the name of a mesh axis, or a tuple of names.
    """

    temperature: float
    logit_softcapping: float
    entropy: bool
    sequence_parallel: bool
    _vocab_axis = ("lm_weight", 0)

    def __call__(
        self,
        hidden_states: ArrayLike,
        labels: ArrayLike,
        lm_weight: ArrayLike,
        temperature: float | ArrayLike | None = None,
        lm_bias: ArrayLike | None = None,
    ) -> TokenLogProbs:
        """Log-probabilities of labels under softmax(softcap(hidden_states @ lm_weight.T) / temperature).

        Args:
            hidden_states: as in FusedLinearCrossEntropy.
            labels: likewise.
            lm_weight: likewise.
            temperature: as in LogProbs.
            lm_bias: as in FusedLinearCrossEntropy.
        Returns:
            As LogProbs.
        Raises:
            TypeError, ValueError: as FusedLinearCrossEntropy and LogProbs.
        """
        inputs.check_arrays(hidden_states=hidden_states, labels=labels, lm_weight=lm_weight)
        layout, gathers = linear_layout(self, hidden_states, labels, lm_weight, lm_bias)
        vocab = layout.vocab(lm_weight.shape[0])
        target = inputs.as_jax(inputs.read_labels(labels, None, self.ignore_index, vocab))
        hidden, weight_VH = map(inputs.as_jax, (hidden_states, lm_weight))
        dtype = inputs.arithmetic_dtype(hidden, weight_VH)
        inverse = inverse_temperature(temperature, self.temperature, labels, dtype)
        how = How(Sums(e=self.entropy), float(self.logit_softcapping), layout.shard)
        head = Head(weight_VH, None if lm_bias is None else inputs.as_jax(lm_bias))
        return _over_hidden(hidden, head, target, inverse, Problem(self.kernels, vocab, how, gathers), layout)


@functools.partial(jax.jit, static_argnames=("problem", "layout"))
def _over_logits(
    logits: jax.Array, target: jax.Array, inverse: jax.Array | None, problem: Problem, layout: Layout
) -> TokenLogProbs:
    """Results of arguments that have been checked."""
    if not target.size:
        return _none(target, inputs.arithmetic_dtype(logits), problem)

    def inside(logits: jax.Array, *of_rows: jax.Array) -> Any:
        logits, *of_rows = collectives.align(layout.axes, (logits,), of_rows)  # type: ignore[assignment]
        return _rows(logits, of_rows[0], _at(of_rows, 1), problem)

    operands = [Operand(x) for x in (target, inverse) if x is not None]
    found: Any = over(layout, inside, Operand(logits, -1, padding=-jnp.inf), *operands)
    return TokenLogProbs(*found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rows(logits: jax.Array, target: jax.Array, inverse: jax.Array | None, problem: Problem) -> Results:
    return _rows_forward(logits, target, inverse, problem)[0]


def _rows_forward(logits: jax.Array, target: jax.Array, inverse: Any, problem: Problem) -> tuple[Results, Any]:
    terms = problem.kernels.row_terms(_local_rows(logits, target, inverse, problem), problem.how)
    terms = fold_rows(terms, problem.how.shard)
    return _results(terms, target), (logits, target, inverse, terms)


def _rows_backward(problem: Problem, residuals: Any, cotangents: Results) -> tuple[Any, ...]:
    logits, target, inverse, terms = residuals
    coefficients = _coefficients(terms, cotangents, target, problem)
    rows = _local_rows(logits, target, inverse, problem)
    gradient = problem.kernels.row_gradient(rows, terms, coefficients, problem.how)
    return gradient, None, None if inverse is None else jnp.zeros_like(inverse)


_rows.defvjp(_rows_forward, _rows_backward)


def _local_rows(logits: jax.Array, target: jax.Array, inverse: jax.Array | None, problem: Problem) -> Rows:
    num_local, shard = logits.shape[-1], problem.how.shard
    num_classes = num_local_classes(num_local, problem.num_classes, shard)
    return Rows(logits, local_target(target, num_local, shard), num_classes, inverse)


def _over_hidden(
    hidden: jax.Array, head: Head, target: jax.Array, inverse: jax.Array | None, problem: Problem, layout: Layout
) -> TokenLogProbs:
    """Results of arguments that have been checked."""
    if not target.size:
        return _none(target, inputs.arithmetic_dtype(hidden, head.weight_VH), problem)

    def rows(hidden: jax.Array, head: Head, target: jax.Array, inverse: jax.Array | None = None) -> Any:
        return _linear(hidden, head, target, inverse, problem)

    of_rows = [x for x in (target, inverse) if x is not None]
    return TokenLogProbs(*over_head(rows, hidden, head, of_rows, layout, problem.gathers))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _linear(hidden: jax.Array, head: Head, target: jax.Array, inverse: Any, problem: Problem) -> Results:
    return _linear_forward(hidden, head, target, inverse, problem)[0]


def _linear_forward(
    hidden: jax.Array, head: Head, target: jax.Array, inverse: Any, problem: Problem
) -> tuple[Results, Any]:
    shard = problem.how.shard
    hidden = gathered(hidden, shard, problem.gathers)
    rows = local_rows(hidden, head, target, inverse, problem.num_classes, shard)
    terms = fold_rows(problem.kernels.linear_terms(rows, problem.how), shard)
    return _results(terms, target), (hidden, head, target, inverse, terms)


def _linear_backward(problem: Problem, residuals: Any, cotangents: Results) -> tuple[Any, ...]:
    hidden, head, target, inverse, terms = residuals
    shard = problem.how.shard
    coefficients = _coefficients(terms, cotangents, target, problem)
    rows = local_rows(hidden, head, target, inverse, problem.num_classes, shard)
    gradients = problem.kernels.linear_gradients(rows, terms, coefficients, problem.how)
    by_inverse = None if inverse is None else jnp.zeros_like(inverse)
    return *input_gradients(gradients, hidden, head, shard, problem.gathers), None, by_inverse


_linear.defvjp(_linear_forward, _linear_backward)


def _results(terms: RowTerms, target: jax.Array) -> Results:
    logprobs = valid_losses(LogProbability().values(jnp, terms)[0], target)
    return logprobs, None if terms.e is None else valid_losses(entropy(jnp, terms), target)


def _coefficients(terms: RowTerms, cotangents: Results, target: jax.Array, problem: Problem) -> Coefficients:
    of_log_prob, of_entropy = (
        None if x is None else valid_upstream(whole_cotangent(x, problem.how.shard), target) for x in cotangents
    )
    return LogProbability(terms.e is not None).coefficients(jnp, terms, [of_log_prob, of_entropy])


def _none(target: jax.Array, dtype: Any, problem: Problem) -> TokenLogProbs:
    """Of no tokens; JAX forgets what empty arrays vary over."""
    empty = jnp.zeros(target.shape, dtype)
    return TokenLogProbs(empty, empty if problem.how.sums.e else None)


def _at(values: Any, index: int) -> Any:
    return values[index] if len(values) > index else None
