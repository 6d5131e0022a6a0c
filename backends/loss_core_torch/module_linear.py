"""The fused linear cross entropy as a torch module. No mathematics here."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, H = hidden

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from loss_core import (
    FusedLinearCEConfig,
)
from loss_core_torch import (
    autograd,
    checks,
    distributed,
    ordinary,
    placement_linear,
    reduction,
)
from loss_core_torch.autograd_parallel import ParallelLinearCrossEntropy
from loss_core_torch.checks import Tokens
from loss_core_torch.distributed import Shards
from loss_core_torch.module_base import LossModule
from loss_core_torch.placement_linear import LinearLayout


class FusedLinearCrossEntropy(LossModule):
    """Cross entropy of hidden_states @ lm_weight.T without the [T, V] logits.

    Config: `loss_core.FusedLinearCEConfig`. On a CPU, ignored tokens take part in no product;
    elsewhere so with skip_ignored=True, or where forward is given num_valid_tokens (whole vocabularies).
    """

    _fields = ("ignore_index", "logit_softcapping", "reduction", "sequence_parallel", "skip_ignored")
    # Numbers that give tensors their shape: no tensors themselves, for the bridge.
    static_arguments = ("num_valid_tokens",)
    # lm_weight [V, H].
    _vocab_dim = 0

    def __init__(
        self,
        ignore_index: int = -100,
        logit_softcapping: float = 0.0,
        reduction: str = "sum",
        tp_group: Any = None,
        sequence_parallel: bool = False,
        skip_ignored: bool | None = None,
    ) -> None:
        """Fields as in FusedLinearCEConfig, which validates them."""
        super().__init__()
        config = FusedLinearCEConfig(ignore_index, logit_softcapping, reduction, None, sequence_parallel, skip_ignored)
        self.ignore_index, self.reduction = config.ignore_index, config.reduction
        self.logit_softcapping, self.skip_ignored = config.logit_softcapping, config.skip_ignored
        self.tp_group, self.sequence_parallel = tp_group, config.sequence_parallel

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
        return distributed.materialize(lm_weight, grad_reduce_group)

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
            lm_weight: [V, H], dtype and device of hidden_states. With tp_group: this rank's rows. A DTensor stays
                sharded over the dimension of its mesh that is tp_group's, or is named "tp", or over which FSDP did
                not cut it, or over which the DTensor of hidden_states is replicated; it is gathered over the others.
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
            TypeError: labels that are no integers; hidden_states and lm_weight of two dtypes.
        """
        self._take_kernel(hidden_states, lm_weight)
        given = (num_label_tokens, grad_reduce_group, loss_weights, num_valid_tokens)
        if all(x is None for x in given) and (loss := self._ordinary(hidden_states, labels, lm_weight)) is not None:
            return loss
        layout = placement_linear.of_linear(
            hidden_states, lm_weight, self.tp_group, grad_reduce_group, self.sequence_parallel
        )
        if layout.placed:
            weight = placement_linear.local_weight(layout, lm_weight)
        else:
            weight = self.materialize_lm_weight(lm_weight, grad_reduce_group=grad_reduce_group)
        compute = self._compute if layout.tokens.ranks.alone() else self._compute_apart
        return compute(layout, hidden_states, labels, weight, num_label_tokens, loss_weights, num_valid_tokens)

    def _ordinary(self, hidden: Any, labels: Any, weight: Any) -> Tensor | None:
        """The loss of an ordinary call, None for any other; see `ordinary`."""
        if (
            self.tp_group is not None
            or self.sequence_parallel
            or self.skip_ignored is not None
            or not ordinary.same_kind(hidden, weight)
            or weight.dim() != 2
            or hidden.shape[-1:] != weight.shape[1:]
            or torch.is_autocast_enabled("cpu")
        ):
            return None
        labels_T = ordinary.labels_of(hidden, labels, weight.shape[0], self.ignore_index, self.reduction)
        if labels_T is None:
            return None
        found = ordinary.tokens(labels_T, hidden.dtype, self.reduction)
        grad = torch.is_grad_enabled()
        want = (grad and hidden.requires_grad, grad and weight.requires_grad)
        args = (float(self.logit_softcapping), hidden.dtype, want, self._kernel, None, None)
        h_TH = hidden.reshape(-1, hidden.shape[-1])
        return autograd.run(autograd.LinearCrossEntropySum, h_TH, weight, *found, *args)[0]

    def _compute(
        self,
        linear: LinearLayout,
        hidden: Any,
        labels: Any,
        weight: Any,
        count: Any,
        loss_weights: Any,
        num_valid: int | None,
    ) -> Tensor:
        layout = linear.tokens
        hidden = layout.local(hidden)

        def check() -> Tokens:
            checks.floats("hidden_states", hidden)
            checks.floats("lm_weight", weight)
            _product_dtype(hidden, weight)
            if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
                raise ValueError(
                    f"lm_weight has shape {tuple(weight.shape)} but hidden_states has shape {tuple(hidden.shape)}; "
                    f"lm_weight must be [V, H] with H = {hidden.shape[-1]}."
                )
            lead = placement_linear.whole_lead(linear, hidden)
            own = [layout.token_values(n, x, lead) for n, x in (("labels", labels), ("loss_weights", loss_weights))]
            found = checks.tokens(
                "hidden_states", lead, hidden.device, self.reduction, self.ignore_index, own[0], num_tokens=count,
                loss_weights=own[1],
            )  # fmt: skip
            return found._replace(one_or_nan=checks.valid_tokens(num_valid, found.keep_T, self.skip_ignored))

        trains = torch.is_grad_enabled() and isinstance(hidden, Tensor) and hidden.requires_grad
        tokens, shards = self._agree(
            layout, weight, check, hidden_states_require_grad=trains, num_valid_tokens=num_valid
        )
        shape, labels_T, keep_T, num_tokens, weights_T, one_or_nan = tokens
        product_dtype = _product_dtype(hidden, weight)
        vocab = weight.shape[0] if shards is None else shards.total
        bad_T = checks.out_of_range(labels_T, keep_T, shape, vocab, self.ignore_index)
        skip = (self.skip_ignored, num_valid)
        keep_T = reduction.keep_if_counted(keep_T, num_tokens)
        if shards is None and self.reduction != "none" and not layout.ranks.tokens:
            tokens = Tokens(shape, labels_T, keep_T, num_tokens, weights_T)
            loss = self._with_gradients(hidden, weight, tokens, bad_T, product_dtype, skip)
            return loss if one_or_nan is None else loss * one_or_nan
        loss_T = self._per_token(
            hidden, weight, labels_T, keep_T, bad_T, product_dtype, shards, linear.sequence_dim, skip
        )
        loss_T = loss_T if one_or_nan is None else loss_T * one_or_nan
        loss = reduction.reduce_tokens(
            loss_T, keep_T, shape, self.reduction, num_tokens, weights_T, layout.ranks.tokens
        )
        return layout.token_result(loss, labels) if self.reduction == "none" else loss

    # Hosts exchange messages there, which no graph can hold.
    _compute_apart = torch.compiler.disable(_compute)

    def _with_gradients(
        self,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tokens,
        bad_T: Tensor | None,
        product_dtype: torch.dtype,
        skip: tuple[bool | None, int | None],
    ) -> Tensor:
        """The reduced loss over a whole vocabulary: the factor of each token is known, so one pass makes all."""
        _, labels_T, keep_T, num_tokens, weights_T, _ = tokens
        coef_T = reduction.coefficients(hidden.dtype, keep_T, bad_T, self.reduction, num_tokens, weights_T)
        if bad_T is not None:
            labels_T = torch.where(bad_T, 0, labels_T)
        h_TH = hidden.reshape(-1, hidden.shape[-1])
        grad = torch.is_grad_enabled()
        want = (grad and hidden.requires_grad, grad and weight.requires_grad)
        softcap = float(self.logit_softcapping)
        args = (h_TH, weight, labels_T, keep_T, coef_T, softcap, product_dtype, want, self._kernel, *skip)
        return autograd.LinearCrossEntropySum.apply(*args)[0]

    def _per_token(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels_T: Tensor,
        keep_T: Tensor,
        bad_T: Tensor | None,
        product_dtype: torch.dtype,
        shards: Shards | None,
        sequence_dim: int | None,
        skip: tuple[bool | None, int | None],
    ) -> Tensor:
        softcap = float(self.logit_softcapping)
        if shards is not None:
            return ParallelLinearCrossEntropy.apply(
                hidden, weight, labels_T, keep_T, bad_T, softcap, product_dtype, shards, sequence_dim, self._kernel,
                *skip,
            )  # fmt: skip
        if bad_T is not None:
            labels_T = torch.where(bad_T, 0, labels_T)
        h_TH = hidden.reshape(-1, hidden.shape[-1])
        args = (h_TH, weight, labels_T, keep_T, softcap, product_dtype, self._kernel, *skip)
        loss_T = autograd.LinearCrossEntropy.apply(*args)
        return reduction.nan_where(loss_T, bad_T)


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Dtype to which the operands are rounded: autocast's where it is on, else their own."""
    device = hidden.device
    if weight.device != device:
        raise ValueError(f"hidden_states is on {device} but lm_weight is on {weight.device}; they must match.")
    # "meta" (shapes without values, as the bridge asks for) is unknown to autocast.
    autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    if autocast and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device.type)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"hidden_states is {hidden.dtype} but lm_weight is {weight.dtype}; "
            "they must match outside of torch.autocast."
        )
    return hidden.dtype
