"""The two fused linear cross entropies as torch modules. No mathematics here."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from loss_core import ChunkedCEConfig, FusedLinearCEConfig
from loss_core.row_terms import CrossEntropy
from loss_core_torch import inputs, metrics
from loss_core_torch.autograd.linear_cross_entropy import Call, LinearCrossEntropy
from loss_core_torch.inputs import Tokens
from loss_core_torch.kernels import KernelSet, WholeLosses
from loss_core_torch.metrics import Result
from loss_core_torch.modules.linear import LinearCall, LinearModule
from loss_core_torch.reduction import coefficients, reduce_tokens, zero_where_ignored


class _LinearCrossEntropy(LinearModule):
    """Cross entropy of hidden_states @ lm_weight.T; the two public classes differ in their fields alone."""

    reduction: str
    # Where the config has no such field.
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    metrics: tuple[str, ...] = ()
    # Numbers that give tensors their shape: no tensors themselves, for the bridge.
    static_arguments = ("num_valid_tokens",)
    _values = ("loss_weights",)

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
                dimension. A DTensor's placement says as much, and its loss is that of all its tokens.
            labels: [...] integers: a class in [0, V over all ranks) or ignore_index; not changed. All tokens of the
                group over which the vocabulary is sharded, the same on each of its ranks.
            lm_weight: [V, H], dtype and device of hidden_states; or float32 beside hidden states in 16 bits: products
                are then made in the dtype of the hidden states, and the weight's gradient is float32. With tp_group:
                this rank's rows. A DTensor stays sharded over the dimension of its mesh that is tp_group's, or is
                named "tp", or over which FSDP did not cut it, or over which the DTensor of hidden_states is
                replicated; it is gathered over the others.
            num_label_tokens: divides the sum; number or 0-d tensor. 0 gives a loss of 0 and zero gradients.
            grad_reduce_group: see materialize_lm_weight; only for a weight that is gathered.
            loss_weights: [...] factor of each token's loss, differentiable; reduction="sum" only.
            num_valid_tokens: how many labels are not ignore_index, in this call, as a Python integer; the others then
                take part in no product on any device, without a host sync and with static shapes. A wrong number
                is a ValueError on a CPU, a NaN elsewhere.
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
        given = {"num_label_tokens": num_label_tokens, "loss_weights": loss_weights}
        found: Result = self._evaluate(
            hidden_states, labels, lm_weight, lm_bias, given, grad_reduce_group, num_valid_tokens
        )
        return found

    def _tokens(
        self, lead: torch.Size, hidden: Tensor, labels: Any, given: Mapping[str, Any], num_valid: Any
    ) -> Tokens:
        tokens = inputs.tokens(
            "hidden_states", lead, hidden.device, self.reduction, self.ignore_index, labels,
            num_tokens=given["num_label_tokens"], loss_weights=given["loss_weights"],
        )  # fmt: skip
        return inputs.with_number(tokens, num_valid, self.skip_ignored)

    def _of_tokens(self) -> bool:
        return self.reduction == "none"

    def _loss(self, call: LinearCall) -> Result:
        tokens, objective, groups = call.tokens, CrossEntropy.of(self, call.num_classes), call.token_groups
        if isinstance(call.kernels, WholeLosses):
            whole = call.whole()
            loss_T = zero_where_ignored(call.kernels.linear_cross_entropy(whole, objective), tokens.keep_T)
            loss = reduce_tokens(loss_T, tokens, self.reduction, groups)
            found = metrics.of_whole(call.kernels, whole, tokens.keep_T, objective, self.metrics)
        else:
            loss, found = self._loss_and_metrics(call.kernels, call, objective)
        return (loss, metrics.reduced(self.metrics, found, tokens, self.reduction, groups)) if self.metrics else loss

    def _loss_and_metrics(
        self, kernels: KernelSet, call: LinearCall, objective: CrossEntropy
    ) -> tuple[Tensor, list[Tensor]]:
        tokens, names, coef_T = call.tokens, metrics.of_tokens(self.metrics), None
        if call.source.group is None and self.reduction != "none" and not call.token_groups:
            # The factor of each token in the result is known before its loss, so that gradients can be made.
            coef_T = coefficients(tokens, self.reduction, call.hidden.dtype)
        loss, *rest = LinearCrossEntropy.apply(
            call.hidden, call.weight, call.bias, tokens.labels_T, tokens.keep_T, call.places_N, coef_T,
            Call(kernels, objective, call.wanted(), call.source, names),
        )  # fmt: skip
        found = rest[len(rest) - len(names) :]
        return (reduce_tokens(loss, tokens, self.reduction, call.token_groups) if coef_T is None else loss), found


class FusedLinearCrossEntropy(_LinearCrossEntropy):
    """Cross entropy of hidden_states @ lm_weight.T without the [T, V] logits.

    Config: `loss_core.FusedLinearCEConfig`. On a CPU, ignored tokens take part in no product;
    elsewhere so with skip_ignored=True, or where forward is given num_valid_tokens (whole vocabularies).
    """

    config_class = FusedLinearCEConfig


class ChunkedCrossEntropy(_LinearCrossEntropy):
    """As FusedLinearCrossEntropy, with the logits of at most chunk_len tokens at a time.

    Config: `loss_core.ChunkedCEConfig`. The field `compile` is an attribute and hides `nn.Module.compile`, as it does
    in NeMo AutoModel: use `torch.compile(loss)`.
    """

    config_class = ChunkedCEConfig
