"""Cross entropy of `hidden_states @ lm_weight.T` that never holds the logits of all tokens.

Two derivatives, because what is known in the forward differs:

- `_summed`: the factor of every row is known, so the forward that runs under differentiation makes the
  gradients while a chunk's logits are at hand (three products in all).
- `_rows`: upstream gradients, or the terms of other devices, come later, so the backward makes each chunk's logits
  again (four products).
"""

# T = tokens (any leading dimensions), V = vocabulary, H = hidden

from __future__ import annotations

import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from loss_core import ChunkedCEConfig, FusedLinearCEConfig
from loss_core.dispatch.protocol import BackendUnavailable
from loss_core.row_terms import CrossEntropy, RowTerms
from loss_core_jax import compat, inputs, metrics
from loss_core_jax.inputs import ArrayLike
from loss_core_jax.kernels import How, KernelSet, LinearRows, Wanted
from loss_core_jax.losses import valid_tokens
from loss_core_jax.losses.base import Count, Loss, has_fields_of
from loss_core_jax.losses.linear_source import (
    Head,
    gathered,
    input_gradients,
    linear_layout,
    local_rows,
    over_head,
    times_cotangent,
)
from loss_core_jax.metrics import Result
from loss_core_jax.parallel import collectives
from loss_core_jax.parallel.layout import NOWHERE, Layout
from loss_core_jax.reduction import finish_count, row_scale, total, valid_losses, valid_upstream

# Loss, or its weighted sum, and metrics of each row.
RowResults = tuple[jax.Array, tuple[jax.Array, ...]]


class _LinearCrossEntropy(Loss):
    """Cross entropy of `hidden_states @ lm_weight.T`; the two public classes differ in their fields alone."""

    reduction: str
    # Where the config has no such field.
    logit_softcapping: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    sequence_parallel: bool = False
    skip_ignored: bool | None = None
    chunk_len: int = 0
    metrics: tuple[str, ...] = ()
    # Numbers that give arrays their shape: no arrays themselves, for the bridge.
    static_arguments: ClassVar[tuple[str, ...]] = ("num_valid_tokens",)
    _vocab_axis = ("lm_weight", 0)

    def __call__(
        self,
        hidden_states: ArrayLike,
        labels: ArrayLike,
        lm_weight: ArrayLike,
        num_label_tokens: Count | None = None,
        grad_reduce_group: Any = None,
        loss_weights: ArrayLike | None = None,
        num_valid_tokens: int | None = None,
        lm_bias: ArrayLike | None = None,
    ) -> Result:
        """Cross entropy of `softmax(softcap(hidden_states @ lm_weight.T))` at the labels.

        Args:
            hidden_states: [..., H] floating.
            labels: [...] integers of any width, in [0, V) or ignore_index.
            lm_weight: [V, H], dtype of hidden_states; or float32 beside bfloat16 or float16: then products are made in
                the dtype of hidden_states, and the weight's gradient is float32.
            num_label_tokens: divides the sum; 0 gives 0. Reduction "sum" only.
            grad_reduce_group: of torch; must be None. Under `shard_map` JAX sums the weight's gradient itself.
            loss_weights: [...] factor per position. Reduction "sum" only.
            num_valid_tokens: how many labels are not ignore_index, in this call, as a Python integer (static under
                jit); the others then take part in no product. A wrong number is a ValueError where labels can be
                read, a NaN elsewhere.
            lm_bias: [V] floating, added to the logits before the softcap in the dtype of the arithmetic.
        Returns:
            A scalar, or the shape of labels for reduction "none"; float32, float64 for float64 inputs. With metrics a
            pair: the loss, and a dict of them, not differentiated.
        Raises:
            TypeError: labels are floating or boolean, hidden_states and lm_weight differ in dtype in another way,
                num_valid_tokens is no Python integer.
            ValueError: shapes do not match, or a label or count that can be read is out of its range;
                skip_ignored=True under jit, skip_ignored=False with num_valid_tokens.
        """
        if grad_reduce_group is not None:
            raise ValueError(
                f"grad_reduce_group must be None on jax, got {grad_reduce_group!r}: it names a torch process group. "
                "Under jax.shard_map the gradient of a replicated lm_weight is summed by JAX."
            )
        inputs.check_arrays(hidden_states=hidden_states, labels=labels, lm_weight=lm_weight, loss_weights=loss_weights)
        layout, gathers = linear_layout(self, hidden_states, labels, lm_weight, lm_bias)
        inputs.check_reduction_arguments(self.reduction, labels, num_label_tokens, loss_weights)
        count = inputs.read_count("num_label_tokens", num_label_tokens)
        vocab = layout.vocab(lm_weight.shape[0])
        target = inputs.read_labels(labels, None, self.ignore_index, vocab)
        if layout != NOWHERE:
            valid_tokens.refuse_if_sharded(self.skip_ignored, num_valid_tokens)
        size = None
        if self.skip_ignored or num_valid_tokens is not None:
            size = valid_tokens.num_rows(target, self.skip_ignored, num_valid_tokens)
        hidden, weight_VH, target = map(inputs.as_jax, (hidden_states, lm_weight, target))
        head = Head(weight_VH, None if lm_bias is None else inputs.as_jax(lm_bias))
        dtype = inputs.arithmetic_dtype(hidden, weight_VH)
        scale = _row_scale(target, dtype, mean=self.reduction == "mean", count=count, loss_weights=loss_weights)
        objective, names = CrossEntropy.of(self, vocab), metrics.of_rows(self.metrics)
        how = How(objective.sums, float(self.logit_softcapping), layout.shard, self.chunk_len)
        problem = _Problem(self.kernels, objective, how, gathers, names)
        if not target.size:
            # JAX forgets what empty arrays vary over.
            none = jnp.zeros(target.shape if self.reduction == "none" else (), dtype)
            return metrics.with_metrics(self.metrics, none, (none,) * len(names), target, lambda x: x)
        taken, taken_scale, indices = target, scale, None
        if size is not None:
            # One row at least, which may be an ignored one: then everything below holds without any.
            hidden, taken, taken_scale, indices = valid_tokens.gather(hidden, target, scale, size=max(size, 1))

        def reduced(of_rows: jax.Array) -> jax.Array:
            if self.reduction != "none":
                of_rows = _total(of_rows, taken_scale, count)
            elif indices is not None:
                of_rows = valid_tokens.scatter(of_rows, indices, shape=target.shape)
            return of_rows if num_valid_tokens is None else valid_tokens.nan_if_wrong(of_rows, target, num_valid_tokens)

        if layout != NOWHERE or self.reduction == "none":
            loss, found = _loss_rows(hidden, head, taken, problem, layout)
            loss = reduced(loss)
        else:
            rows = (hidden, head, taken, taken_scale)
            axes = compat.varying_axes(*jax.tree.leaves(rows))
            aligned = jax.tree.map(lambda x: compat.vary(x, axes), rows)
            loss, found = _summed(*aligned, problem, self.skip_ignored is not False)
            loss = finish_count(loss, count)
            loss = loss if num_valid_tokens is None else valid_tokens.nan_if_wrong(loss, target, num_valid_tokens)
        return metrics.with_metrics(self.metrics, loss, found, target, reduced)


@has_fields_of(FusedLinearCEConfig)
class FusedLinearCrossEntropy(_LinearCrossEntropy):
    """Cross entropy of `hidden_states @ lm_weight.T`, without ever holding all logits.

    Under `jax.grad` the gradients are made in the forward (three products; four for reduction "none"); a call
    that is not differentiated does the forward product only. Sharded, it is four products for every reduction.
    A second derivative is right, but keeps the logits of every chunk.

    Fields are those of `loss_core.FusedLinearCEConfig`; tp_group is the name of a mesh axis, or a tuple of names.
    Ignored tokens stay out of the products with skip_ignored=True (outside of jit) or with num_valid_tokens; with None
    on a CPU, also under jit, up to a chunk of 512 tokens, if a reduced loss is differentiated and no vocabulary is
    sharded.
    """


@has_fields_of(ChunkedCEConfig)
class ChunkedCrossEntropy(_LinearCrossEntropy):
    """As `FusedLinearCrossEntropy`, with the logits of at most chunk_len tokens at a time, but for second derivatives.

    Fields are those of `loss_core.ChunkedCEConfig`. compile must be True: XLA compiles whatever JAX runs. Where XLA
    spreads arrays over devices, chunk_len counts the tokens of all devices together.
    """

    compile: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.compile:
            raise BackendUnavailable(
                "ChunkedCrossEntropy on jax got compile=False: XLA compiles whatever JAX runs. Use compile=True, or "
                "backend='torch:eager' or 'torch:triton', whose kernels no torch.compile makes."
            )


_row_scale = jax.jit(row_scale, static_argnames=("dtype", "mean"))
_total = jax.jit(total)


class _Problem(NamedTuple):
    """What is static in a call; hashable.

    Attributes:
        gathers: whether hidden states are this device's share of the sequence, which is gathered.
        metrics: names of `row_terms.token_metrics`.
    """

    kernels: KernelSet
    objective: CrossEntropy
    how: How
    gathers: bool
    metrics: tuple[str, ...] = ()


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _summed(
    hidden: jax.Array, head: Head, target: jax.Array, scale: jax.Array, problem: _Problem, skip: bool
) -> RowResults:
    """Sum over rows of scale * cross entropy, a scalar in the dtype of the arithmetic; and the metrics of each row.

    Args:
        scale: [...] factor per row, in the dtype of the arithmetic; differentiable.
        skip: leave chunks of ignored rows out where that needs no sync, and gradients are wanted: XLA compiles a
            forward with the sort and the branch for more than half as long again.
    """
    rows = LinearRows(hidden, head.weight_VH, target, bias_V=head.bias_V)
    terms = problem.kernels.linear_terms(rows, problem.how)
    loss, found = _results(terms, target, problem.objective, problem.metrics)
    return jnp.sum(loss * scale), found


def _summed_forward(
    hidden: Any, head: Any, target: Any, scale: Any, problem: _Problem, skip: bool
) -> tuple[RowResults, Any]:
    # With symbolic zeros each argument says whether it is differentiated: a frozen weight costs no product.
    bias = head.bias_V
    rows = LinearRows(hidden.value, head.weight_VH.value, target.value, bias_V=None if bias is None else bias.value)
    wanted = Wanted(hidden.perturbed, head.weight_VH.perturbed, bias is not None and bias.perturbed, skip)
    upstream = valid_upstream(scale.value, rows.target)
    terms, gradients = problem.kernels.linear_terms_and_gradients(
        rows, upstream, problem.objective, problem.how, wanted
    )
    loss, found = _results(terms, rows.target, problem.objective, problem.metrics)
    # Empty arrays carry the dtypes to the backward.
    dtypes = [None if x is None else jnp.zeros(0, x.dtype) for x in (rows.hidden, rows.weight_VH, rows.bias_V)]
    return (jnp.sum(loss * scale.value), found), (gradients, loss, rows.target, dtypes)


def _summed_backward(problem: _Problem, skip: bool, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    gradients, loss, target, likes = residuals
    cotangent = compat.instantiate(cotangents[0])
    by_hidden, by_weight, by_bias = (
        None if like is None else times_cotangent(gradient, cotangent, target, like.dtype, of_rows=place == 0)
        for place, (gradient, like) in enumerate(zip(gradients, likes, strict=True))
    )
    by_scale = times_cotangent(loss[..., None], cotangent, target, loss.dtype, of_rows=True)[..., 0]
    return by_hidden, Head(by_weight, by_bias), None, by_scale


_summed.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _results(terms: RowTerms, target: jax.Array, objective: CrossEntropy, names: tuple[str, ...]) -> RowResults:
    loss = valid_losses(objective.values(jnp, terms)[0], target)
    return loss, metrics.made(terms, target, objective, names)


def _loss_rows(hidden: jax.Array, head: Head, target: jax.Array, problem: _Problem, layout: Layout) -> RowResults:
    """Cross entropy and metrics per row, shape of target, for any layout."""

    def rows(hidden: jax.Array, head: Head, target: jax.Array) -> Any:
        return _rows(hidden, head, target, problem)

    found: Any = over_head(rows, hidden, head, (target,), layout, problem.gathers)
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rows(hidden: jax.Array, head: Head, target: jax.Array, problem: _Problem) -> RowResults:
    return _rows_forward(hidden, head, target, problem)[0]


def _rows_forward(hidden: jax.Array, head: Head, target: jax.Array, problem: _Problem) -> tuple[RowResults, Any]:
    shard = problem.how.shard
    hidden = gathered(hidden, shard, problem.gathers)
    rows = local_rows(hidden, head, target, None, problem.objective.num_classes, shard)
    terms = collectives.fold_rows(problem.kernels.linear_terms(rows, problem.how), shard)
    return _results(terms, target, problem.objective, problem.metrics), (hidden, head, target, terms)


def _rows_backward(problem: _Problem, residuals: Any, cotangents: RowResults) -> tuple[Any, ...]:
    hidden, head, target, terms = residuals
    shard = problem.how.shard
    upstream = valid_upstream(collectives.whole_cotangent(cotangents[0], shard), target)
    rows = local_rows(hidden, head, target, None, problem.objective.num_classes, shard)
    coefficients = problem.objective.coefficients(jnp, terms, [upstream])
    gradients = problem.kernels.linear_gradients(rows, terms, coefficients, problem.how)
    return *input_gradients(gradients, hidden, head, shard, problem.gathers), None


_rows.defvjp(_rows_forward, _rows_backward)
