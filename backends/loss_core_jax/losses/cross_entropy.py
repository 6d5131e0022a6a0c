"""Cross entropies: `MaskedCrossEntropy`, `TEParallelCrossEntropy`; `FusedLinearCrossEntropy`, `ChunkedCrossEntropy`."""

# T = tokens (any leading dimensions), V = vocabulary, H = hidden

from __future__ import annotations

import functools
from typing import Any, ClassVar

import jax

from loss_core import ChunkedCEConfig, FusedLinearCEConfig, MaskedCrossEntropyConfig, TEParallelCEConfig
from loss_core.dispatch.protocol import BackendUnavailable
from loss_core.row_terms import CrossEntropy
from loss_core_jax import inputs
from loss_core_jax.inputs import ArrayLike
from loss_core_jax.losses import valid_tokens
from loss_core_jax.losses.base import Count, Loss, has_fields_of
from loss_core_jax.losses.linear import arithmetic_dtype, read_source, summed
from loss_core_jax.losses.rows import PerRow, Problem, over_head, over_logits
from loss_core_jax.parallel.layout import NOWHERE, Layout, layout_for
from loss_core_jax.reduction import Result, finish_count, row_scale, total, with_metrics


class _LogitsCrossEntropy(Loss):
    """Cross entropy over logits; the two public classes differ in their fields alone."""

    reduction: str

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
    vocab = layout.vocab(logits.shape[-1])
    problem = Problem.of(loss_fn, CrossEntropy.of(loss_fn, vocab), layout, vocab)
    (loss,), found = over_logits(logits, PerRow(target), problem, layout)

    def reduced(of_rows: jax.Array) -> jax.Array:
        if loss_fn.reduction == "none":
            return of_rows
        scale = row_scale(target, loss.dtype, mean=loss_fn.reduction == "mean", count=count, loss_weights=loss_weights)
        return total(of_rows, scale, count)

    result = reduced(loss)
    result = result if loss_fn.fp32_upcast else result.astype(logits.dtype)
    return with_metrics(loss_fn.metrics, result, found, target, reduced)


class _LinearCrossEntropy(Loss):
    """Cross entropy of `hidden_states @ lm_weight.T`; likewise."""

    reduction: str
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
        source, layout = read_source(self, hidden_states, labels, lm_weight, lm_bias)
        inputs.check_reduction_arguments(self.reduction, labels, num_label_tokens, loss_weights)
        count = inputs.read_count("num_label_tokens", num_label_tokens)
        vocab = layout.vocab(lm_weight.shape[0])
        target = inputs.read_labels(labels, None, self.ignore_index, vocab)
        size = None
        if self.skip_ignored or num_valid_tokens is not None:
            if layout != NOWHERE:
                valid_tokens.refuse_sharded(self.skip_ignored, num_valid_tokens)
            size = valid_tokens.num_rows(target, self.skip_ignored, num_valid_tokens)
        problem = Problem.of(self, CrossEntropy.of(self, vocab), layout, vocab)
        target, is_mean = inputs.as_jax(target), self.reduction == "mean"
        scale = row_scale(target, arithmetic_dtype(source), mean=is_mean, count=count, loss_weights=loss_weights)
        taken, taken_scale, indices = target, scale, None
        if size is not None and target.size:
            # One row at least, which may be an ignored one: then everything below holds without any.
            hidden, taken, taken_scale, indices = valid_tokens.gather(source[0], target, scale, size=max(size, 1))
            source = hidden, source[1]

        def reduced(of_rows: jax.Array) -> jax.Array:
            if self.reduction != "none":
                of_rows = total(of_rows, taken_scale, count)
            elif indices is not None:
                of_rows = valid_tokens.scatter(of_rows, indices, shape=target.shape)
            return valid_tokens.nan_if_wrong(of_rows, target, num_valid_tokens)

        if self.reduction == "none" or not target.size:
            (loss,), found = over_head(source, PerRow(taken), problem, layout)
            loss = reduced(loss)
        else:
            skip = self.skip_ignored is not False
            loss, found = summed((source,), PerRow(taken), taken_scale, problem, layout, skip=skip)
            loss = valid_tokens.nan_if_wrong(finish_count(loss, count), target, num_valid_tokens)
        return with_metrics(self.metrics, loss, found, target, reduced)


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
