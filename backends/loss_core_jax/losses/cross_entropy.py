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
from loss_core_jax.losses.linear import arithmetic_dtype, read_source, weighted_sum
from loss_core_jax.losses.rows import PerRow, RowLoss, results_from_head, results_from_logits
from loss_core_jax.parallel.layout import UNSHARDED, Layout, layout_for
from loss_core_jax.reduction import Result, guard_count, row_scale, total, with_metrics


class _LogitsCrossEntropy(Loss):
    """Cross entropy over logits; its two public subclasses differ only in their fields."""

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
            dtype of the logits with fp32_upcast=False. With metrics, a pair: the loss, and a dict of metrics, not
            differentiated.
        Raises:
            TypeError: labels are floating or boolean, logits are not floating.
            ValueError: shapes do not match, or a readable label or count is out of range.
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
    """`MaskedCrossEntropy` with a result that is always float32 (float64 for float64 logits).

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
    """The loss of checked arguments."""
    vocab = layout.vocab(logits.shape[-1])
    row_loss = RowLoss.of(loss_fn, CrossEntropy.of(loss_fn, vocab), layout, vocab)
    (losses,), metrics = results_from_logits(logits, PerRow(target), row_loss, layout)

    def reduce(x: jax.Array) -> jax.Array:
        if loss_fn.reduction == "none":
            return x
        is_mean = loss_fn.reduction == "mean"
        scale = row_scale(target, losses.dtype, mean=is_mean, count=count, loss_weights=loss_weights)
        return total(x, scale, count)

    loss = reduce(losses)
    loss = loss if loss_fn.fp32_upcast else loss.astype(logits.dtype)
    return with_metrics(loss_fn.metrics, loss, metrics, target, reduce)


class _LinearCrossEntropy(Loss):
    """Cross entropy of `hidden_states @ lm_weight.T`; its two public subclasses differ only in their fields."""

    reduction: str
    # Numbers that determine shapes: the bridge passes them as Python numbers, not as arrays.
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
            lm_weight: [V, H], dtype of hidden_states; or float32 beside bfloat16 or float16: then products are computed
                in the dtype of hidden_states, and the weight's gradient is float32.
            num_label_tokens: divides the sum; 0 gives 0. Reduction "sum" only.
            grad_reduce_group: of torch; must be None. Under `shard_map` JAX sums the weight's gradient itself.
            loss_weights: [...] factor per position. Reduction "sum" only.
            num_valid_tokens: how many labels of this call are not ignore_index, as a Python integer (static under
                jit); the other tokens are then skipped in the products. A wrong number is a ValueError where labels
                are readable, a NaN elsewhere.
            lm_bias: [V] floating, added to the logits before the softcap in the dtype of the arithmetic.
        Returns:
            A scalar, or the shape of labels for reduction "none"; float32, float64 for float64 inputs. With metrics, a
            pair: the loss, and a dict of metrics, not differentiated.
        Raises:
            TypeError: labels are floating or boolean, dtypes of hidden_states and lm_weight are not as above,
                num_valid_tokens is not a Python integer.
            ValueError: shapes do not match, or a readable label or count is out of range;
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
            if layout != UNSHARDED:
                valid_tokens.refuse_sharded(self.skip_ignored, num_valid_tokens)
            size = valid_tokens.num_rows(target, self.skip_ignored, num_valid_tokens)
        row_loss = RowLoss.of(self, CrossEntropy.of(self, vocab), layout, vocab)
        target, is_mean = inputs.as_jax(target), self.reduction == "mean"
        scale = row_scale(target, arithmetic_dtype(source), mean=is_mean, count=count, loss_weights=loss_weights)
        row_target, indices = target, None
        if size is not None and target.size:
            # At least one row, which may be ignored: the code below needs no case for none.
            hidden, row_target, scale, indices = valid_tokens.gather(source[0], target, scale, size=max(size, 1))
            source = hidden, source[1]

        def reduce(x: jax.Array) -> jax.Array:
            if self.reduction != "none":
                x = total(x, scale, count)
            elif indices is not None:
                x = valid_tokens.scatter(x, indices, shape=target.shape)
            return valid_tokens.nan_if_miscounted(x, target, num_valid_tokens)

        if self.reduction == "none" or not target.size:
            (losses,), metrics = results_from_head(source, PerRow(row_target), row_loss, layout)
            loss = reduce(losses)
        else:
            skip = self.skip_ignored is not False
            loss, metrics = weighted_sum((source,), PerRow(row_target), scale, row_loss, layout, skip=skip)
            loss = valid_tokens.nan_if_miscounted(guard_count(loss, count), target, num_valid_tokens)
        return with_metrics(self.metrics, loss, metrics, target, reduce)


@has_fields_of(FusedLinearCEConfig)
class FusedLinearCrossEntropy(_LinearCrossEntropy):
    """Cross entropy of `hidden_states @ lm_weight.T`; the logits of all tokens never exist at a time.

    Under `jax.grad` the gradients are computed in the forward (three products; four for reduction "none"); a call that
    is not differentiated does the forward product only. A sharded vocabulary takes four products for every reduction.
    Second derivatives work, but store the logits of every chunk.

    Fields are those of `loss_core.FusedLinearCEConfig`; tp_group is the name of a mesh axis, or a tuple of names.
    Ignored tokens are skipped in the products with skip_ignored=True (outside of jit) or with num_valid_tokens. With
    skip_ignored=None on a CPU, also under jit, all but those of one chunk (at most 512) are skipped if a reduced loss
    is differentiated and no vocabulary is sharded.
    """


@has_fields_of(ChunkedCEConfig)
class ChunkedCrossEntropy(_LinearCrossEntropy):
    """`FusedLinearCrossEntropy` with the logits of at most chunk_len tokens at a time, except in second derivatives.

    Fields are those of `loss_core.ChunkedCEConfig`. compile must be True: XLA compiles everything that JAX runs. Where
    XLA partitions arrays over devices, chunk_len counts the tokens of all devices.
    """

    compile: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.compile:
            raise BackendUnavailable(
                "ChunkedCrossEntropy on jax got compile=False: XLA compiles whatever JAX runs. Use compile=True, or "
                "backend='torch:eager' or 'torch:triton', whose kernels no torch.compile makes."
            )
