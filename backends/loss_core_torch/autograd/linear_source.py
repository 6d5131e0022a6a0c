"""The operands of a fused loss from hidden states and weight, and the gradients of these from those of the operands."""

# T = tokens, N = tokens in products, V = vocabulary of this rank, H = hidden

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from loss_core_torch.kernels import HeadOperands, KernelSet, Linear, LinearGrads, Wanted
from loss_core_torch.parallel import collectives
from loss_core_torch.reduction import zero_where_ignored
from loss_core_torch.tracing import is_readable, is_traced


class Source(NamedTuple):
    """How logits follow from hidden states and weight: the settings that are not tensors.

    Attributes:
        softcap: 0 is off.
        product_dtype: dtype to which the operands are rounded.
        vocab_start: first class of this weight.
        group: over which the vocabulary is sharded, or None.
        sequence_dim: dimension of the hidden states that is sharded over the group, or None.
        block_tokens: as in `Linear`.
    """

    softcap: float
    product_dtype: torch.dtype
    vocab_start: int = 0
    group: Any = None
    sequence_dim: int | None = None
    block_tokens: int = 0


def unsharded(hidden: Tensor, source: Source) -> Tensor:
    """The hidden states of the full sequence, saved for the backward, which needs no second collective for them."""
    if source.sequence_dim is None:
        return hidden
    return collectives.gather_shares(hidden, source.sequence_dim, source.group)


class HeadInputs(NamedTuple):
    """Hidden states and a head, and the tokens that enter its matrix products.

    Attributes:
        hidden: hidden states of the full sequence, [..., H].
        w_VH, bias_V: the head.
        keep_T: as in `Rows`.
        indices_N: indices of the tokens in the products; None for all tokens, with zeros in ignored rows.
    """

    hidden: Tensor
    w_VH: Tensor
    bias_V: Tensor | None
    keep_T: Tensor | None
    indices_N: Tensor | None

    @property
    def keep_rows(self) -> Tensor | None:
        """[N] bool, False in ignored rows of the products; None where no row is ignored."""
        return self.keep_T if self.indices_N is None else None

    def gather(self, x_T: Tensor) -> Tensor:
        """Values of the tokens in the products, [N, ...], from those of all tokens."""
        return x_T if self.indices_N is None else x_T[self.indices_N]

    def scatter(self, x_N: Tensor) -> Tensor:
        """Values of all tokens, [T, ...], from those of the tokens in the products; 0 for the others."""
        if self.indices_N is None:
            return x_N
        num_tokens = self.hidden.shape[:-1].numel()
        return x_N.new_zeros((num_tokens, *x_N.shape[1:])).index_copy(0, self.indices_N, x_N)

    def scatter_valid(self, x_N: Tensor) -> Tensor:
        """As `scatter`, with 0 for ignored tokens as well."""
        return zero_where_ignored(self.scatter(x_N), self.keep_T)

    def rows(self) -> Tensor:
        """Hidden states of the tokens in the products, [N, H]; ignored tokens are left out, or zeros."""
        h_TH = self.hidden.reshape(-1, self.hidden.shape[-1])
        if self.indices_N is not None:
            return h_TH.index_select(0, self.indices_N)
        # Hidden states of ignored tokens may be NaN: they must not enter a product, not even times 0.
        return h_TH if self.keep_T is None else h_TH.masked_fill(~self.keep_T[:, None], 0.0)

    def head(self, source: Source) -> HeadOperands:
        """The operands of the products."""
        return HeadOperands(self.rows(), self.w_VH, source.product_dtype, self.bias_V)

    def linear(self, source: Source, labels_T: Tensor, inverse_T: Tensor | None) -> Linear:
        """The operands with targets ([N] or [N, K]) and inverse temperatures of the tokens in the products."""
        inverse_N = None if inverse_T is None else self.gather(inverse_T)
        labels_N, start = self.gather(labels_T), source.vocab_start
        return Linear(self.head(source), labels_N, start, source.softcap, inverse_N, source.block_tokens)


def take_logits(ctx: Any, logits: Tensor) -> Tensor:
    """The logits saved by the forward, in the first backward, which overwrites them; empty in later ones."""
    is_first, ctx.consumed = not ctx.consumed, True
    # `data` keeps the saved tensor's version, so that a second backward can unpack the other saved tensors.
    return logits.data if is_first else logits.new_empty(0)


def input_grads(
    found: LinearGrads, want: Wanted, inputs: HeadInputs, like: tuple[torch.Size, torch.dtype], source: Source
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden states, weight and bias in the shapes and dtypes of these; None where not wanted.

    Args:
        like: shape and dtype of this rank's hidden states.
    """
    shape, dtype = like
    by_hidden = _hidden_grad(found.hidden_TH, inputs, shape, source).to(dtype) if want.hidden else None
    by_weight = found.weight_VH.to(inputs.w_VH.dtype) if want.weight else None
    by_bias = found.bias_V.to(inputs.bias_V.dtype) if want.bias and inputs.bias_V is not None else None
    return by_hidden, by_weight, by_bias


def _hidden_grad(grad_h: Tensor, inputs: HeadInputs, shape: torch.Size, source: Source) -> Tensor:
    """The gradient of this rank's hidden states, in the dtype of the arithmetic."""
    grad_h = inputs.scatter(grad_h)
    if inputs.keep_T is not None:
        # Not a product with 0: the upstream gradient may be infinite.
        grad_h = grad_h.masked_fill(~inputs.keep_T[:, None], 0.0)
    if source.group is None:
        return grad_h.view(shape)
    if source.sequence_dim is None:
        dist.all_reduce(grad_h, group=source.group)
        return grad_h.view(shape)
    return collectives.reduce_scatter_shares(grad_h, shape, source.sequence_dim, source.group)


def scale_grads(
    kernels: KernelSet, stored: Sequence[Tensor], upstream: Tensor, coef_N: Tensor, weight_dtype: torch.dtype
) -> LinearGrads:
    """The gradients stored by the forward, times the upstream gradient."""
    if is_readable(upstream) and float(upstream) == 1.0:
        return LinearGrads(*(grad.data for grad in stored))
    # Without a valid token the gradient is 0, even for an infinite upstream gradient.
    factor = upstream.masked_fill((coef_N == 0).all(), 0.0)
    if is_traced(upstream):
        return LinearGrads(*(grad * factor for grad in stored))
    by_h, by_w, by_b = (grad.data for grad in stored)
    return LinearGrads(
        kernels.scaled(by_h, factor, by_h.dtype), kernels.scaled(by_w, factor, weight_dtype),
        kernels.scaled(by_b, factor, by_b.dtype),
    )  # fmt: skip
