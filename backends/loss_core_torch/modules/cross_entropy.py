"""The cross entropies as torch modules, over logits and over hidden states. No mathematics here."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from loss_core import (
    BackendUnavailable,
    ChunkedCEConfig,
    FusedLinearCEConfig,
    KernelChoice,
    MaskedCrossEntropyConfig,
    TEParallelCEConfig,
)
from loss_core.row_terms import CrossEntropy
from loss_core_torch import compat, inputs, metrics
from loss_core_torch.inputs import Tokens
from loss_core_torch.metrics import Result
from loss_core_torch.modules.base import LossModule, cast
from loss_core_torch.modules.linear import LinearModule
from loss_core_torch.modules.logits import LogitsModule
from loss_core_torch.modules.rows import RowCall, RowModule


class _CrossEntropy(RowModule):
    """Cross entropy over logits or hidden states."""

    reduction: str
    metrics: tuple[str, ...] = ()
    _token_arguments: tuple[str, ...] = ("loss_weights",)

    def _tokens(
        self, of: str, like: Tensor, lead: torch.Size, labels: Any, args: Mapping[str, Any], vocab: int | None = None
    ) -> Tokens:
        return inputs.tokens(
            of, lead, like.device, self.reduction, self.ignore_index, labels, args.get("mask"),
            num_tokens=args["num_label_tokens"], loss_weights=args["loss_weights"], vocab=vocab,
        )  # fmt: skip

    def _returns_tokens(self) -> bool:
        return self.reduction == "none"

    def _loss(self, call: RowCall) -> Result:
        objective, names = CrossEntropy.of(self, call.num_classes), metrics.per_token(self.metrics)
        loss, found = call.reduced(objective, self.reduction, names)
        loss = cast(loss, self.fp32_upcast, call.dtype)
        if not self.metrics:
            return loss
        return loss, metrics.reduced(self.metrics, found, call.tokens, self.reduction, call.token_groups)


class _LogitsCrossEntropy(_CrossEntropy, LogitsModule):
    """Cross entropy over logits; its two public subclasses differ only in their fields."""

    kernel_names = ("plain", "eager", "compile", "triton", "te")
    _token_arguments = ("mask", "loss_weights")

    def with_kernel_choice(self, choice: KernelChoice) -> LossModule:
        if self.inplace_grad:
            if choice.flag in ("torch:te", "torch:plain"):
                raise BackendUnavailable(
                    f"'{choice.flag}' does not write the gradient over the logits (inplace_grad=True): use "
                    "'torch:triton' or 'torch:eager', or inplace_grad=False."
                )
            # `auto` must not choose them for a call either.
            candidates = tuple(kernel for kernel in choice.candidates if kernel not in ("te", "plain"))
            choice = replace(choice, candidates=candidates)
        return super().with_kernel_choice(choice)

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        num_label_tokens: int | Tensor | None = None,
        loss_weights: Tensor | None = None,
    ) -> Result:
        """Cross entropy between logits and labels.

        Args:
            logits: [..., V] float32, bfloat16, float16 or float64, any strides; not changed (with
                inplace_grad the backward overwrites them with their gradient). With tp_group: this rank's part of the
                vocabulary, of any size, in rank order. Or a DTensor, which needs no tp_group; its gradient has the
                same placement.
            labels: [...] integers: a class in [0, V over all ranks) or ignore_index; not changed. The same on every
                rank of the group. Labels, mask and loss_weights are plain tensors, or DTensors sharded as the tokens
                of the logits; beside a DTensor of logits, plain ones may also hold all tokens.
            mask: shape of labels, or broadcasting to it; bool, integer or float; 0 ignores the position.
            num_label_tokens: divides the sum; number or 0-d tensor. 0 gives a loss of 0 and zero gradients.
            loss_weights: [...] factor of each token's loss, differentiable; reduction="sum" only.
        Returns:
            Scalar, or the shape of labels for reduction="none"; float32 (float64 for float64 logits),
            the dtype of the logits with fp32_upcast=False. For a DTensor of logits, the loss of all its tokens on every
            rank; with reduction="none" a DTensor, unless labels are plain and those of this rank. With metrics a pair:
            the loss, and a dict of detached metrics; "num_valid" is an int64 scalar.
        Raises:
            ValueError: shapes that do not fit, no classes, a label that is no class (on a CPU; elsewhere that
                token's loss and gradient are NaN), a count or weights without reduction="sum". Over a group it is
                raised on every rank, whichever rank's arguments are at fault.
            TypeError: labels that are no integers, logits that are no floats; other ranks get a ValueError.
            RuntimeError: with inplace_grad, logits that can't be overwritten; see `inplace.check`.
        """
        args = {"mask": mask, "num_label_tokens": num_label_tokens, "loss_weights": loss_weights}
        found: Result = self._evaluate(logits, labels, args)
        return found

    def _loss(self, call: RowCall) -> Result:
        return self._loss_outside_of_graphs(call) if self.inplace_grad else super()._loss(call)

    # `inplace.check` breaks a graph, and torch.compile would compile what follows: a graph writes its results to new
    # memory, and the logits would be returned as their gradient.
    @compat.outside_of_graphs
    def _loss_outside_of_graphs(self, call: RowCall) -> Result:
        return super()._loss(call)


class MaskedCrossEntropy(_LogitsCrossEntropy):
    """Cross entropy over logits, with a mask. Config: `loss_core.MaskedCrossEntropyConfig`."""

    config_class = MaskedCrossEntropyConfig


class TEParallelCrossEntropy(_LogitsCrossEntropy):
    """Cross entropy over logits whose vocabulary is sharded over tp_group, if there is one.

    Config: `loss_core.TEParallelCEConfig`. The name is NeMo AutoModel's; any kernel can run it.
    """

    config_class = TEParallelCEConfig


class _LinearCrossEntropy(_CrossEntropy, LinearModule):
    """Cross entropy of hidden_states @ lm_weight.T; its two public subclasses differ only in their fields."""

    # Arguments that are Python integers and determine shapes: the bridge does not convert them to tensors.
    static_arguments = ("num_valid_tokens",)

    def forward(
        self,
        hidden_states: Tensor,
        labels: Tensor,
        lm_weight: Tensor,
        num_label_tokens: int | Tensor | None = None,
        grad_reduce_group: dist.ProcessGroup | None = None,
        loss_weights: Tensor | None = None,
        num_valid_tokens: int | None = None,
        lm_bias: Tensor | None = None,
    ) -> Result:
        """Cross entropy of the head's logits and labels.

        Args:
            hidden_states: [..., H] float; not changed. With sequence_parallel: this rank's share of the first
                dimension. A DTensor needs no such flag, and its loss is that of all its tokens.
            labels: [...] integers: a class in [0, V over all ranks) or ignore_index; not changed. All tokens of the
                group over which the vocabulary is sharded, the same on each of its ranks.
            lm_weight: [V, H], dtype and device of hidden_states; or float32 with 16-bit hidden states: products are
                then computed in the dtype of the hidden states, and the weight's gradient is float32. With tp_group:
                this rank's rows. A DTensor stays sharded over the dimension of its mesh that is tp_group's, or is
                named "tp", or is not one of FSDP's, or over which the DTensor of hidden_states is replicated; it is
                gathered over the others.
            num_label_tokens: divides the sum; number or 0-d tensor. 0 gives a loss of 0 and zero gradients.
            grad_reduce_group: see materialize_lm_weight; only for a weight that is gathered.
            loss_weights: [...] factor of each token's loss, differentiable; reduction="sum" only.
            num_valid_tokens: how many labels of this call are not ignore_index, as a Python integer; ignored tokens are
                then excluded from the products on any device, without a host sync and with static shapes. A wrong
                number is a ValueError on a CPU and makes the loss NaN elsewhere.
            lm_bias: [V] float of any dtype, added to the logits before the softcap in the dtype of the arithmetic. With
                a sharded vocabulary: this rank's part, a plain tensor.
        Returns:
            Scalar, or the shape of labels for reduction="none"; float32 (float64 for float64). Under
            autocast both operands are rounded to its dtype first, as F.linear would. With metrics as
            MaskedCrossEntropy.
        Raises:
            ValueError: shapes or devices that do not fit, a label that is no class (on a CPU), a count
                or weights without reduction="sum", a sharded weight without its group, placements that can't be
                served, num_valid_tokens with skip_ignored=False; over a group on every rank.
            TypeError: labels that are no integers; other dtypes of hidden_states and lm_weight that differ.
        """
        args = {
            "num_label_tokens": num_label_tokens, "loss_weights": loss_weights, "num_valid_tokens": num_valid_tokens
        }  # fmt: skip
        found: Result = self._evaluate(hidden_states, labels, lm_weight, lm_bias, args, grad_reduce_group)
        return found

    def _tokens(
        self, of: str, like: Tensor, lead: torch.Size, labels: Any, args: Mapping[str, Any], vocab: int | None = None
    ) -> Tokens:
        tokens = super()._tokens(of, like, lead, labels, args, vocab)
        return inputs.check_num_valid(tokens, args["num_valid_tokens"], self.skip_ignored)


class FusedLinearCrossEntropy(_LinearCrossEntropy):
    """Cross entropy of hidden_states @ lm_weight.T without the [T, V] logits.

    Config: `loss_core.FusedLinearCEConfig`. Ignored tokens are excluded from the products on a CPU, and elsewhere with
    skip_ignored=True or num_valid_tokens.
    """

    config_class = FusedLinearCEConfig


class ChunkedCrossEntropy(_LinearCrossEntropy):
    """As FusedLinearCrossEntropy, with the logits of at most chunk_len tokens at a time.

    Config: `loss_core.ChunkedCEConfig`. The field `compile` is an attribute and hides `nn.Module.compile`, as it does
    in NeMo AutoModel: use `torch.compile(loss)`.
    """

    config_class = ChunkedCEConfig
    # torch:plain computes the logits of all tokens at once.
    kernel_names = ("eager", "triton")
