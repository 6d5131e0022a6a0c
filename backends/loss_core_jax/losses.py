"""The losses: frozen, hashable callables that are pytrees without leaves.

They hold no array and do no arithmetic: `checks` reads the arguments, `reduction` sums what `cross_entropy`,
`fused_linear` and `distillation` compute per row. Forward argument names are those of the torch
modules.

JAX gives gradients of every floating argument (logits, hidden states, weight, loss weights). Derivatives of
second order are computed in reverse mode (`jax.grad` of `jax.grad`), or forward over reverse (`jax.hessian`);
`jax.jvp` of a loss itself is refused by JAX (`jax.custom_vjp`).
"""

# T = tokens (any leading dimensions), V = vocabulary, H = hidden

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax

from loss_core.backend import BackendUnavailable, KernelChoice
from loss_core.config import FusedLinearCEConfig, KDLossConfig, MaskedCrossEntropyConfig, TEParallelCEConfig
from loss_core_jax import checks, sharded_linear, skipping
from loss_core_jax.checks import ArrayLike
from loss_core_jax.chunked import same_varying_axes
from loss_core_jax.cross_entropy import arithmetic_dtype
from loss_core_jax.fused_linear import linear_rows, linear_total
from loss_core_jax.layout import axis_names, layout_for
from loss_core_jax.reduction import cross_entropy, distillation, linear_targets_and_scale, total, zero_without_tokens

Count = int | ArrayLike
TPGroup = str | tuple[str, ...] | None


class _Loss:
    """What the losses share."""

    # The argument, and its axis, that says how large the vocabulary is.
    _vocab_axis: ClassVar[tuple[str, int]] = ("logits", -1)
    ignore_index: int

    def with_kernel_choice(self, choice: KernelChoice) -> Self:
        """A copy that tells which kernel runs and why."""
        return dataclasses.replace(self, kernel_choice=choice)  # type: ignore[type-var]

    def check_values(self, arguments: Mapping[str, Any]) -> None:
        """Raise for a label that is no class: for callers that run the loss under jit, where it can't look.

        Args:
            arguments: of a call, by name. labels and mask are NumPy arrays; of the rest only the shape is used.
        Raises:
            ValueError: a label outside [0, V) that is not ignored; names position and value.
        """
        name, axis = self._vocab_axis
        labels, mask, scores = arguments.get("labels"), arguments.get("mask"), arguments.get(name)
        if labels is None or scores is None:
            return  # the call itself will name the missing argument
        checks.check_mask(labels, mask)
        checks.read_labels(labels, mask, self.ignore_index, scores.shape[axis])


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class MaskedCrossEntropy(_Loss):
    """Cross entropy over logits, with a mask.

    Attributes: as in `loss_core.MaskedCrossEntropyConfig`; tp_group is the name of a mesh axis, or a tuple of names;
        inplace_grad must be False.
    """

    fp32_upcast: bool = True
    ignore_index: int = -100
    reduction: str = "sum"
    tp_group: TPGroup = None
    inplace_grad: bool = False
    kernel_choice: KernelChoice | None = None

    def __post_init__(self) -> None:
        _check_group(self.tp_group)
        MaskedCrossEntropyConfig(self.fp32_upcast, self.ignore_index, self.reduction, None, self.inplace_grad)
        _refuse_inplace(type(self).__name__, self.inplace_grad)

    def __call__(
        self,
        logits: ArrayLike,
        labels: ArrayLike,
        mask: ArrayLike | None = None,
        num_label_tokens: Count | None = None,
        loss_weights: ArrayLike | None = None,
    ) -> jax.Array:
        """Cross entropy of `softmax(logits)` at the labels.

        Args:
            logits: [..., V] floating.
            labels: [...] integers of any width, in [0, V) or ignore_index.
            mask: shape of labels or broadcastable to it; positions where it is 0 are ignored.
            num_label_tokens: divides the sum; 0 gives 0. Reduction "sum" only.
            loss_weights: [...] factor per position. Reduction "sum" only.
        Returns:
            A scalar, or the shape of labels for reduction "none"; float32 (float64 for float64 logits), or the
            dtype of the logits with fp32_upcast=False.
        Raises:
            TypeError: labels are floating or boolean, logits are not floating.
            ValueError: shapes do not match, or a label that can be read is outside [0, V) and not ignored.
        """
        return _over_logits(
            logits,
            labels,
            mask,
            num_label_tokens,
            loss_weights,
            self.ignore_index,
            self.reduction,
            self.fp32_upcast,
            self.tp_group,
        )


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class TEParallelCrossEntropy(_Loss):
    """Cross entropy over logits, always in float32 (float64 for float64).

    Attributes: as in `loss_core.TEParallelCEConfig`; tp_group is the name of a mesh axis, or a tuple of names;
        inplace_grad must be False.
    """

    ignore_index: int = -100
    reduction: str = "sum"
    tp_group: TPGroup = None
    inplace_grad: bool = False
    kernel_choice: KernelChoice | None = None

    def __post_init__(self) -> None:
        _check_group(self.tp_group)
        TEParallelCEConfig(self.ignore_index, self.reduction, None, self.inplace_grad)
        _refuse_inplace(type(self).__name__, self.inplace_grad)

    def __call__(
        self,
        logits: ArrayLike,
        labels: ArrayLike,
        mask: ArrayLike | None = None,
        num_label_tokens: Count | None = None,
        loss_weights: ArrayLike | None = None,
    ) -> jax.Array:
        """As `MaskedCrossEntropy`, always in float32 (float64 for float64 logits)."""
        return _over_logits(
            logits, labels, mask, num_label_tokens, loss_weights, self.ignore_index, self.reduction, True, self.tp_group
        )


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class FusedLinearCrossEntropy(_Loss):
    """Cross entropy of `hidden_states @ lm_weight.T`, without ever holding all logits.

    Under `jax.grad` the gradients are made in the forward (three products; four for reduction "none"); a call
    that is not differentiated does the forward product only. Sharded, it is four products for every reduction.
    A second derivative is right, but keeps the logits of every chunk.

    Attributes: as in `loss_core.FusedLinearCEConfig`; tp_group is the name of a mesh axis, or a tuple of names. Ignored
        tokens stay out of the products with skip_ignored=True (outside of jit) or with num_valid_tokens; with None on a
        CPU, also under jit, up to a chunk of 512 tokens, if a reduced loss is differentiated and no vocabulary is
        sharded.
    """

    ignore_index: int = -100
    logit_softcapping: float = 0.0
    reduction: str = "sum"
    tp_group: TPGroup = None
    sequence_parallel: bool = False
    skip_ignored: bool | None = None
    # Numbers that give arrays their shape: no arrays themselves, for the bridge.
    static_arguments: ClassVar[tuple[str, ...]] = ("num_valid_tokens",)
    _vocab_axis: ClassVar[tuple[str, int]] = ("lm_weight", 0)
    kernel_choice: KernelChoice | None = None

    def __post_init__(self) -> None:
        _check_group(self.tp_group)
        FusedLinearCEConfig(
            self.ignore_index, self.logit_softcapping, self.reduction, None, self.sequence_parallel, self.skip_ignored
        )
        if self.sequence_parallel and self.tp_group is None:
            raise ValueError(
                "sequence_parallel=True needs tp_group, the mesh axis over which hidden_states are gathered; without "
                "it, XLA moves sharded hidden_states by itself: use sequence_parallel=False."
            )

    def __call__(
        self,
        hidden_states: ArrayLike,
        labels: ArrayLike,
        lm_weight: ArrayLike,
        num_label_tokens: Count | None = None,
        grad_reduce_group: Any = None,
        loss_weights: ArrayLike | None = None,
        num_valid_tokens: int | None = None,
    ) -> jax.Array:
        """Cross entropy of `softmax(softcap(hidden_states @ lm_weight.T))` at the labels.

        Args:
            hidden_states: [..., H] floating.
            labels: [...] integers of any width, in [0, V) or ignore_index.
            lm_weight: [V, H], dtype of hidden_states.
            num_label_tokens: divides the sum; 0 gives 0. Reduction "sum" only.
            grad_reduce_group: of torch; must be None. Under `shard_map` JAX sums the weight's gradient itself.
            loss_weights: [...] factor per position. Reduction "sum" only.
            num_valid_tokens: how many labels are not ignore_index, in this call, as a Python integer (static under
                jit); the others then take part in no product. A wrong number is a ValueError where labels can be
                read, a NaN elsewhere.
        Returns:
            A scalar, or the shape of labels for reduction "none"; float32, float64 for float64 inputs.
        Raises:
            TypeError: labels are floating or boolean, hidden_states and lm_weight differ in dtype,
                num_valid_tokens is no Python integer.
            ValueError: shapes do not match, or a label that can be read is outside [0, V) and not ignored;
                skip_ignored=True under jit, skip_ignored=False with num_valid_tokens.
        """
        if grad_reduce_group is not None:
            raise ValueError(
                f"grad_reduce_group must be None on jax, got {grad_reduce_group!r}: it names a torch process group. "
                "Under jax.shard_map the gradient of a replicated lm_weight is summed by JAX."
            )
        checks.check_arrays(hidden_states=hidden_states, labels=labels, lm_weight=lm_weight, loss_weights=loss_weights)
        layout = layout_for(self.tp_group, hidden_states, lm_weight, 0)
        rows = hidden_states
        if self.sequence_parallel and layout is not None:
            rows = sharded_linear.gathered(hidden_states, layout)
        checks.check_linear(rows, labels, lm_weight)
        checks.check_reduction_arguments(self.reduction, labels, num_label_tokens, loss_weights)
        vocab = lm_weight.shape[0] if layout is None else layout.vocab(lm_weight.shape[0])
        labels, ignore_index = checks.read_labels(labels, None, self.ignore_index, vocab)
        if layout is not None:
            _refuse_skipping(self.skip_ignored, num_valid_tokens)
        size = skipping.num_rows(labels, ignore_index, vocab, self.skip_ignored, num_valid_tokens)
        hidden_states, lm_weight = checks.as_jax(hidden_states), checks.as_jax(lm_weight)
        count = checks.as_count(num_label_tokens)
        target, scale = linear_targets_and_scale(
            labels,
            count,
            loss_weights,
            ignore_index=ignore_index,
            vocab=vocab,
            mean=self.reduction == "mean",
            dtype=arithmetic_dtype(hidden_states),
        )
        softcap, all_targets = float(self.logit_softcapping), target
        if layout is not None:
            loss = sharded_linear.linear_rows(hidden_states, lm_weight, target, softcap, layout, self.sequence_parallel)
            return loss if self.reduction == "none" else total(loss, scale, count)
        hidden_states, lm_weight, target, scale = same_varying_axes(hidden_states, lm_weight, target, scale)
        if size is not None:
            hidden_states, target, scale, places = skipping.take_counted(hidden_states, target, scale, size=size)
        if self.reduction == "none":
            loss = linear_rows(hidden_states, lm_weight, target, softcap)
            loss = loss if size is None else skipping.put_back(loss, places, shape=all_targets.shape)
        else:
            loss = zero_without_tokens(
                linear_total(hidden_states, lm_weight, target, scale, softcap, self.skip_ignored is not False), count
            )
        return skipping.nan_if_wrong(loss, all_targets, num_valid_tokens)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class KDLoss(_Loss):
    """Knowledge distillation: forward KL(teacher || student) at temperature T, times T^2.

    Attributes: as in `loss_core.KDLossConfig`; tp_group is the name of a mesh axis, or a tuple of names.
    """

    ignore_index: int = -100
    temperature: float = 1.0
    fp32_upcast: bool = True
    tp_group: TPGroup = None
    chunk_size: int = 0
    _vocab_axis: ClassVar[tuple[str, int]] = ("student_logits", -1)
    kernel_choice: KernelChoice | None = None

    def __post_init__(self) -> None:
        _check_group(self.tp_group)
        KDLossConfig(self.ignore_index, self.temperature, self.fp32_upcast, None, self.chunk_size)

    def __call__(
        self,
        student_logits: ArrayLike,
        teacher_logits: ArrayLike,
        labels: ArrayLike,
        num_batch_labels: Count | None = None,
    ) -> jax.Array:
        """Mean over positions that are not ignored of T^2 * KL(teacher || student).

        Args:
            student_logits: [..., V] floating.
            teacher_logits: shape of student_logits; floating; differentiable, too.
            labels: [...] integers of any width, in [0, V) or ignore_index; they only say what is ignored.
            num_batch_labels: divides the sum instead of the number of positions; 0 gives 0.
        Returns:
            A scalar in float32 (float64 for float64 logits), or in the dtype of the student's logits with
            fp32_upcast=False.
        Raises:
            TypeError: labels are floating or boolean, logits are not floating.
            ValueError: shapes do not match, or a label that can be read is outside [0, V) and not ignored.
        """
        checks.check_arrays(student_logits=student_logits, teacher_logits=teacher_logits, labels=labels)
        checks.check_pair(student_logits, teacher_logits, labels)
        checks.check_count("num_batch_labels", num_batch_labels)
        layout = layout_for(self.tp_group, student_logits, student_logits, -1)
        vocab = student_logits.shape[-1] if layout is None else layout.vocab(student_logits.shape[-1])
        labels, ignore_index = checks.read_labels(labels, None, self.ignore_index, vocab)
        loss: jax.Array = distillation(
            student_logits,
            teacher_logits,
            labels,
            checks.as_count(num_batch_labels),
            ignore_index=ignore_index,
            temperature=float(self.temperature),
            chunk_size=int(self.chunk_size),
            upcast=self.fp32_upcast,
            layout=layout,
        )
        return loss


def _check_group(tp_group: Any) -> None:
    if tp_group is not None:
        axis_names(tp_group)


def _refuse_inplace(name: str, inplace_grad: bool) -> None:
    if inplace_grad:
        raise BackendUnavailable(
            f"{name} on 'jax:xla' got inplace_grad=True: a jax.Array can't be written to. Use inplace_grad=False; a "
            "training step under jax.jit reuses the logits' memory by itself, and that of its arguments with "
            "donate_argnums."
        )


def _refuse_skipping(skip_ignored: bool | None, num_valid_tokens: Any) -> None:
    if skip_ignored or num_valid_tokens is not None:
        raise BackendUnavailable(
            f"FusedLinearCrossEntropy got skip_ignored={skip_ignored}, num_valid_tokens={num_valid_tokens} with a "
            "sharded vocabulary: ignored tokens take part in its products. Use skip_ignored=None and leave out "
            "num_valid_tokens."
        )


def _over_logits(
    logits: ArrayLike,
    labels: ArrayLike,
    mask: ArrayLike | None,
    num_label_tokens: Count | None,
    loss_weights: ArrayLike | None,
    ignore_index: int,
    reduction: str,
    upcast: bool,
    tp_group: TPGroup,
) -> jax.Array:
    checks.check_arrays(logits=logits, labels=labels, mask=mask, loss_weights=loss_weights)
    checks.check_logits("logits", logits)
    checks.check_labels("logits", logits, labels)
    checks.check_mask(labels, mask)
    checks.check_reduction_arguments(reduction, labels, num_label_tokens, loss_weights)
    layout = layout_for(tp_group, logits, logits, -1)
    vocab = logits.shape[-1] if layout is None else layout.vocab(logits.shape[-1])
    labels, ignore_index = checks.read_labels(labels, mask, ignore_index, vocab)
    loss: jax.Array = cross_entropy(
        logits,
        labels,
        mask,
        checks.as_count(num_label_tokens),
        loss_weights,
        ignore_index=ignore_index,
        reduction=reduction,
        upcast=upcast,
        layout=layout,
    )
    return loss
