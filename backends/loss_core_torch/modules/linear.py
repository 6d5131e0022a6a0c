"""Base classes of the fused losses: checks of hidden states and head, on one rank or sharded, and their operands."""

# T = tokens (all leading dimensions of labels, flattened), N = tokens in products, V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from loss_core import BackendUnavailable
from loss_core.row_terms import Objective
from loss_core_torch import compat, inputs
from loss_core_torch.autograd.linear_rows import Call, LinearRowLoss
from loss_core_torch.autograd.linear_source import HeadInputs, Source
from loss_core_torch.inputs import Tokens
from loss_core_torch.kernels import IGNORED, Linear, Wanted, WholeLosses
from loss_core_torch.kernels.terms import per_row
from loss_core_torch.modules.base import Kernels, LossModule, is_unsharded
from loss_core_torch.modules.rows import RowCall, RowModule
from loss_core_torch.tracing import compute_dtype, is_differentiated, is_readable, is_traced


@dataclass(frozen=True)
class LinearCall(RowCall):
    """A call over hidden states and a head.

    Attributes:
        hidden: [..., H], of this rank.
        weight, bias: [V, H] and [V] or None, of this rank.
        indices_N: indices of the tokens in the matrix products, int64, ascending; None for all tokens.
        source: how the logits are computed from these.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    indices_N: Tensor | None
    source: Source

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    def promoted(self, other: torch.dtype) -> LinearCall:
        """The call unchanged: hidden states and weight alone determine the dtype of a head's arithmetic."""
        return self

    def operands(self) -> Linear:
        """The operands for a `WholeLosses`, with zeros and the label IGNORED in ignored rows.

        Raises:
            BackendUnavailable: the call has a chunk_len.
        """
        if self.source.block_tokens:
            raise BackendUnavailable(
                f"{self.kernels.flag!r} makes the logits of all tokens, got chunk_len={self.source.block_tokens}: use "
                "'torch:eager' or 'torch:triton'."
            )
        labels_T, keep_T = self.targets, self.tokens.keep_T
        if keep_T is not None:
            labels_T = labels_T.masked_fill(~per_row(keep_T, labels_T), IGNORED)
        inverse_T = self.tokens.inverse_temperature_T
        return HeadInputs(self.hidden, self.weight, self.bias, keep_T, None).linear(self.source, labels_T, inverse_T)

    def has_known_coefficients(self) -> bool:
        # The custom operator of a traced call takes no teacher.
        traced = self.tokens.teacher is not None and is_traced(self.hidden, self.weight)
        return self.group is None and not self.token_groups and not traced

    def apply(
        self, objective: Objective, log_p_TK: Tensor | None, coef_T: Tensor | None, names: tuple[str, ...]
    ) -> tuple[Tensor, ...]:
        kernels = self.kernels
        assert not isinstance(kernels, WholeLosses)
        bias, tokens = self.bias is not None and is_differentiated(self.bias), self.tokens
        want = Wanted(is_differentiated(self.hidden), is_differentiated(self.weight), bias)
        found: tuple[Tensor, ...] = LinearRowLoss.apply(
            self.hidden, self.weight, self.bias, tokens.keep_T, self.indices_N, self.targets,
            tokens.inverse_temperature_T, log_p_TK, coef_T, Call(kernels, objective, want, self.source, names),
        )  # fmt: skip
        return found


class HeadModule(LossModule):
    """A loss of hidden states and the weights of heads: the dtype of their products, and the tokens in them."""

    ignore_index: int
    # Defaults for configs without such a field.
    sequence_parallel: bool = False
    skip_ignored: bool | None = None
    chunk_len: int = 0
    # lm_weight [V, H].
    _vocab_dim = 0

    def operand_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """Dtype in which the gradient of the logits enters its two matrix products, for hidden states of a dtype."""
        kernels = self._kernels
        return compute_dtype(dtype) if isinstance(kernels, WholeLosses) else kernels.operand_dtype(dtype, device)

    def _product_indices(self, tokens: Tokens, num_valid: int | None = None) -> Tensor | None:
        """Indices of the tokens in the matrix products, [N] int64, ascending; None for all tokens.

        N must be known on the host. It is on a CPU, or with num_valid; skip_ignored=True costs one sync elsewhere. A
        num_valid above the number of valid tokens repeats token 0, one below it drops tokens; the loss is NaN then.
        """
        keep_T = tokens.keep_T
        if keep_T is None:
            return None
        if num_valid is not None:
            return torch.nonzero_static(keep_T, size=num_valid, fill_value=0)[:, 0]
        if not (is_readable(keep_T) if self.skip_ignored is None else self.skip_ignored):
            return None
        return keep_T.nonzero()[:, 0]

    @staticmethod
    def materialize_lm_weight(lm_weight: Any, *, grad_reduce_group: dist.ProcessGroup | None = None) -> Any:
        """The full weight of a sharded head, whose backward reduces the gradient over the ranks.

        Every rank has other tokens, so the gradient of a shard is a sum over ranks, not a slice of this rank's. As in
        FSDP, it is the mean over the ranks: scale the loss by the size of the group for a sum.

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


class LinearModule(RowModule, HeadModule):
    """A loss of one distribution of hidden_states @ lm_weight.T, without the [T, V] logits."""

    # No "compile": the time is that of the matrix products, which a compiler does not make faster.
    kernel_names: ClassVar[tuple[str, ...]] = ("plain", "eager", "triton")

    def _evaluate(
        self,
        hidden_states: Any,
        labels: Any,
        lm_weight: Any,
        lm_bias: Any,
        args: Mapping[str, Any],
        grad_reduce_group: Any = None,
    ) -> Any:
        """The result of a call; `args` are the other arguments by name."""
        kernels = self._kernels_for(hidden_states, lm_weight)
        if self.sequence_parallel or not is_unsharded(self.tp_group, hidden_states, lm_weight):
            return self._sharded(kernels, hidden_states, labels, lm_weight, lm_bias, args, grad_reduce_group)
        hidden, weight = inputs.floats("hidden_states", hidden_states), inputs.floats("lm_weight", lm_weight)
        check_operands(hidden, weight, lm_bias)
        inputs.not_empty("lm_weight", "vocabulary (first dimension)", weight, 0)
        vocab = weight.shape[0]
        tokens = self._tokens("hidden_states", hidden, hidden.shape[:-1], labels, args, vocab)
        tokens, source = self._validated(tokens, vocab), self._source(hidden, weight)
        indices_N = self._product_indices(tokens, args.get("num_valid_tokens"))
        return self._loss(LinearCall(kernels, tokens, vocab, None, (), hidden, weight, lm_bias, indices_N, source))

    # Not traceable: hosts exchange messages.
    @compat.outside_of_graphs
    def _sharded(
        self,
        kernels: Kernels,
        hidden: Any,
        labels: Any,
        lm_weight: Any,
        lm_bias: Any,
        args: Mapping[str, Any],
        grad_reduce_group: Any,
    ) -> Any:
        from loss_core_torch.parallel import placement_linear

        linear = placement_linear.of_linear(hidden, lm_weight, self.tp_group, grad_reduce_group, self.sequence_parallel)
        if linear.redistribute:
            weight = placement_linear.local_weight(linear, lm_weight)
        else:
            weight = self.materialize_lm_weight(lm_weight, grad_reduce_group=grad_reduce_group)
        layout = linear.tokens
        hidden = layout.local(hidden)

        def check() -> Tokens:
            check_operands(inputs.floats("hidden_states", hidden), inputs.floats("lm_weight", weight), lm_bias)
            lead = placement_linear.full_lead(linear, hidden)
            local = {name: layout.token_values(name, args[name], lead) for name in self._token_arguments}
            local_labels = layout.token_values("labels", labels, lead)
            return self._tokens("hidden_states", hidden, lead, local_labels, {**args, **local})

        trains = torch.is_grad_enabled() and isinstance(hidden, Tensor) and hidden.requires_grad
        num_valid = args.get("num_valid_tokens")
        must_match = {"num_valid_tokens": num_valid, "a lm_bias": lm_bias is not None}
        tokens, shards = self._agree(layout.ranks, weight, check, must_match, hidden_states_require_grad=trains)
        vocab = weight.shape[0] if shards is None else shards.total
        tokens = self._validated(tokens, vocab)
        hidden, weight = inputs.floats("hidden_states", hidden), inputs.floats("lm_weight", weight)
        source, groups = self._source(hidden, weight, shards, linear.sequence_dim), layout.ranks.tokens
        indices_N = self._product_indices(tokens, num_valid)
        call = LinearCall(kernels, tokens, vocab, shards, groups, hidden, weight, lm_bias, indices_N, source)
        found = self._loss(call)
        return layout.token_results(found, labels) if self._returns_tokens() else found

    def _source(self, hidden: Tensor, weight: Tensor, shards: Any = None, sequence_dim: int | None = None) -> Source:
        start, group = (0, None) if shards is None else (shards.start, shards.group)
        softcap = float(self.logit_softcapping)
        return Source(softcap, product_dtype(hidden, weight), start, group, sequence_dim, self.chunk_len)


def check_operands(hidden: Tensor, weight: Tensor, bias: Any, of: str = "") -> None:
    """Refuse hidden states, a weight and a bias (or None) that do not fit each other.

    Args:
        of: prefix of the names of hidden states and weight.
    """
    product_dtype(hidden, weight, of)
    inputs.not_empty(f"{of}hidden_states", "hidden dimension", hidden)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{of}lm_weight has shape {tuple(weight.shape)} but {of}hidden_states has shape {tuple(hidden.shape)}; "
            f"{of}lm_weight must be [V, H] with H = {hidden.shape[-1]}."
        )
    if bias is None:
        return
    bias = inputs.floats("lm_bias", bias)
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"lm_bias has shape {tuple(bias.shape)} but lm_weight has shape {tuple(weight.shape)} on this rank; "
            f"lm_bias must be [V] with V = {weight.shape[0]}."
        )
    if bias.device != weight.device:
        raise ValueError(f"lm_bias is on {bias.device} but lm_weight is on {weight.device}; they must match.")


def product_dtype(hidden: Tensor, weight: Tensor, of: str = "") -> torch.dtype:
    """Dtype to which the operands are rounded: that of autocast where it is on, else that of the hidden states.

    Raises:
        ValueError: hidden states and weight are on different devices.
        TypeError: their dtypes do not fit.
    """
    device = hidden.device
    if weight.device != device:
        raise ValueError(f"{of}hidden_states is on {device} but {of}lm_weight is on {weight.device}; they must match.")
    # Autocast does not accept "meta", on which the bridge computes shapes.
    autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    if autocast and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device.type)
    master_head = weight.dtype == torch.float32 and hidden.dtype in (torch.bfloat16, torch.float16)
    if hidden.dtype != weight.dtype and not master_head:
        raise TypeError(
            f"{of}hidden_states is {hidden.dtype} but {of}lm_weight is {weight.dtype}; they must match outside of "
            "torch.autocast, or be 16-bit hidden states beside a float32 weight."
        )
    return hidden.dtype
