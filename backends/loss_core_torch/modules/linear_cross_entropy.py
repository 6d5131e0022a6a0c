"""The fused linear cross entropy as a torch module. No mathematics here."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, H = hidden

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from loss_core import BackendUnavailable, FusedLinearCEConfig
from loss_core.row_terms import Objective
from loss_core_torch import compat, inputs
from loss_core_torch.autograd.linear_cross_entropy import Call, LinearCrossEntropy
from loss_core_torch.inputs import Tokens
from loss_core_torch.kernels import IGNORED, Linear, Wanted, WholeLosses
from loss_core_torch.modules.base import Kernels, LossModule, is_whole
from loss_core_torch.reduction import coefficients, reduce_tokens, zero_where_ignored
from loss_core_torch.tracing import compute_dtype, is_differentiated, may_read


class FusedLinearCrossEntropy(LossModule):
    """Cross entropy of hidden_states @ lm_weight.T without the [T, V] logits.

    Config: `loss_core.FusedLinearCEConfig`. On a CPU, ignored tokens take part in no product;
    elsewhere so with skip_ignored=True, or where forward is given num_valid_tokens (whole vocabularies).
    """

    config_class = FusedLinearCEConfig
    ignore_index: int
    logit_softcapping: float
    reduction: str
    sequence_parallel: bool
    skip_ignored: bool | None
    # Numbers that give tensors their shape: no tensors themselves, for the bridge.
    static_arguments = ("num_valid_tokens",)
    # lm_weight [V, H].
    _vocab_dim = 0

    def operand_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """Dtype in which the logits' gradient enters its two matrix products, for hidden states of a dtype."""
        kernels = self._kernels
        return compute_dtype(dtype) if isinstance(kernels, WholeLosses) else kernels.operand_dtype(dtype, device)

    @staticmethod
    def materialize_lm_weight(lm_weight: Any, *, grad_reduce_group: dist.ProcessGroup | None = None) -> Any:
        """The whole weight of a sharded head, with a backward that gives each shard its right gradient.

        Every rank has tokens of its own, so the shard's gradient is a sum over ranks, not a slice of
        this rank's. As FSDP does, the mean over the ranks is given: scale the loss by the group's size
        where a sum is meant.

        Args:
            lm_weight: [V, H]; a plain tensor is returned as it is, a DTensor is gathered.
            grad_reduce_group: process group over which the ranks' tokens differ; its size must be
                that of the weight's mesh.
        Returns:
            [V, H] plain tensor, not an alias of the shard.
        Raises:
            ValueError: a trainable sharded weight whose mesh does not match the group.
        """
        from loss_core_torch.parallel import collectives

        return collectives.materialize(lm_weight, grad_reduce_group)

    def forward(
        self,
        hidden_states: Tensor,
        labels: Tensor,
        lm_weight: Tensor,
        num_label_tokens: int | Tensor | None = None,
        grad_reduce_group: dist.ProcessGroup | None = None,
        loss_weights: Tensor | None = None,
        num_valid_tokens: int | None = None,
    ) -> Tensor:
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
        Returns:
            Scalar, or the shape of labels for reduction="none"; float32 (float64 for float64). Under
            autocast both operands are rounded to its dtype first, as F.linear would.
        Raises:
            ValueError: shapes or devices that do not fit, a label that is no class (on a CPU), a count
                or weights without reduction="sum", a sharded weight without its group, placements that can't be
                served, num_valid_tokens with skip_ignored=False; over a group on every rank.
            TypeError: labels that are no integers; other dtypes of hidden_states and lm_weight that differ.
        """
        kernels = self._kernels_for(hidden_states, lm_weight)
        if self.sequence_parallel or not is_whole(self.tp_group, hidden_states, lm_weight):
            return self._sharded(
                kernels, hidden_states, labels, lm_weight, num_label_tokens, grad_reduce_group, loss_weights,
                num_valid_tokens,
            )  # fmt: skip
        hidden, weight = inputs.floats("hidden_states", hidden_states), inputs.floats("lm_weight", lm_weight)
        _check_operands(hidden, weight)
        inputs.not_empty("lm_weight", "vocabulary (first dimension)", weight, 0)
        tokens = self._tokens(hidden.shape[:-1], hidden, labels, num_label_tokens, loss_weights, num_valid_tokens)
        tokens = inputs.settled(inputs.in_range(tokens, weight.shape[0], self.ignore_index))
        return self._loss(kernels, hidden, weight, tokens, num_valid_tokens)

    # Hosts exchange messages there, which no graph can hold.
    @compat.outside_of_graphs
    def _sharded(
        self,
        kernels: Kernels,
        hidden: Any,
        labels: Any,
        lm_weight: Any,
        count: Any,
        grad_reduce_group: Any,
        loss_weights: Any,
        num_valid: int | None,
    ) -> Tensor:
        from loss_core_torch.parallel import placement_linear

        linear = placement_linear.of_linear(hidden, lm_weight, self.tp_group, grad_reduce_group, self.sequence_parallel)
        if linear.placed:
            weight = placement_linear.local_weight(linear, lm_weight)
        else:
            weight = self.materialize_lm_weight(lm_weight, grad_reduce_group=grad_reduce_group)
        layout = linear.tokens
        hidden = layout.local(hidden)

        def check() -> Tokens:
            _check_operands(inputs.floats("hidden_states", hidden), inputs.floats("lm_weight", weight))
            lead = placement_linear.whole_lead(linear, hidden)
            own = [layout.token_values(n, x, lead) for n, x in (("labels", labels), ("loss_weights", loss_weights))]
            return self._tokens(lead, hidden, own[0], count, own[1], num_valid)

        trains = torch.is_grad_enabled() and isinstance(hidden, Tensor) and hidden.requires_grad
        tokens, shards = self._agree(
            layout.ranks, weight, check, {"num_valid_tokens": num_valid}, hidden_states_require_grad=trains
        )
        vocab = weight.shape[0] if shards is None else shards.total
        tokens = inputs.settled(inputs.in_range(tokens, vocab, self.ignore_index))
        hidden, weight = inputs.floats("hidden_states", hidden), inputs.floats("lm_weight", weight)
        groups = layout.ranks.tokens
        loss = self._loss(kernels, hidden, weight, tokens, num_valid, shards, groups, linear.sequence_dim)
        return layout.token_result(loss, labels) if self.reduction == "none" else loss

    def _tokens(
        self, lead: torch.Size, hidden: Tensor, labels: Any, count: Any, loss_weights: Any, num_valid: Any
    ) -> Tokens:
        tokens = inputs.tokens(
            "hidden_states", lead, hidden.device, self.reduction, self.ignore_index, labels, num_tokens=count,
            loss_weights=loss_weights,
        )  # fmt: skip
        return inputs.with_number(tokens, num_valid, self.skip_ignored)

    def _loss(
        self,
        kernels: Kernels,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tokens,
        num_valid: int | None,
        shards: Any = None,
        token_groups: tuple[Any, ...] = (),
        sequence_dim: int | None = None,
    ) -> Tensor:
        start, total, group = (0, weight.shape[0], None) if shards is None else (
            shards.start, shards.total, shards.group,
        )  # fmt: skip
        objective, softcap = Objective.of(self, total), float(self.logit_softcapping)
        product_dtype = _product_dtype(hidden, weight)
        if isinstance(kernels, WholeLosses):
            if shards is not None:
                raise BackendUnavailable(
                    f"{kernels.flag!r} needs the whole vocabulary: use 'torch:eager' with a tp_group."
                )
            h_TH, labels_T = hidden.reshape(-1, hidden.shape[-1]), tokens.labels_T
            if tokens.keep_T is not None:
                # What an ignored token holds must not reach a product, not even times 0; its label is nobody's.
                h_TH = h_TH.masked_fill(~tokens.keep_T[:, None], 0.0)
                labels_T = labels_T.masked_fill(~tokens.keep_T, IGNORED)
            linear = Linear(h_TH, weight, labels_T, 0, softcap, product_dtype)
            loss_T = zero_where_ignored(kernels.linear_cross_entropy(linear, objective), tokens.keep_T)
            return reduce_tokens(loss_T, tokens, self.reduction, token_groups)
        want = Wanted(is_differentiated(hidden), is_differentiated(weight))
        call = Call(kernels, objective, softcap, product_dtype, want, start, group, sequence_dim)
        args = (hidden, weight, tokens.labels_T, tokens.keep_T, self._places(tokens, num_valid))
        if shards is None and self.reduction != "none" and not token_groups:
            # The factor of each token in the result is known before its loss, so that gradients can be made.
            coef_T = coefficients(tokens, self.reduction, hidden.dtype)
            loss: Tensor = LinearCrossEntropy.apply(*args, coef_T, call)[0]
            return loss
        loss_T = LinearCrossEntropy.apply(*args, None, call)[0]
        return reduce_tokens(loss_T, tokens, self.reduction, token_groups)

    def _places(self, tokens: Tokens, num_valid: int | None) -> Tensor | None:
        """The tokens that take part in matrix products, [N] int64 in ascending order; None for all of them.

        Their number must be on the host: for nothing on a CPU, or where the caller knows it (a larger one then repeats
        token 0, a smaller one loses tokens, and the loss is NaN); else for one sync.
        """
        keep_T = tokens.keep_T
        if keep_T is None:
            return None
        if num_valid is not None:
            return torch.nonzero_static(keep_T, size=num_valid, fill_value=0)[:, 0]
        if not (may_read(keep_T) if self.skip_ignored is None else self.skip_ignored):
            return None
        return keep_T.nonzero()[:, 0]


def _check_operands(hidden: Tensor, weight: Tensor) -> None:
    _product_dtype(hidden, weight)
    inputs.not_empty("hidden_states", "hidden dimension", hidden)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"lm_weight has shape {tuple(weight.shape)} but hidden_states has shape {tuple(hidden.shape)}; "
            f"lm_weight must be [V, H] with H = {hidden.shape[-1]}."
        )


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Dtype to which the operands are rounded: autocast's where it is on, else that of the hidden states."""
    device = hidden.device
    if weight.device != device:
        raise ValueError(f"hidden_states is on {device} but lm_weight is on {weight.device}; they must match.")
    # "meta" (shapes without values, as the bridge asks for) is unknown to autocast.
    autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    if autocast and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device.type)
    master_head = weight.dtype == torch.float32 and hidden.dtype in (torch.bfloat16, torch.float16)
    if hidden.dtype != weight.dtype and not master_head:
        raise TypeError(
            f"hidden_states is {hidden.dtype} but lm_weight is {weight.dtype}; they must match outside of "
            "torch.autocast, or be 16-bit hidden states beside a float32 weight."
        )
    return hidden.dtype
