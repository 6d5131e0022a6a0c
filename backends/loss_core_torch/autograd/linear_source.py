"""Hidden states and weight as the source of logits: the operands of a fused loss, and the way back of its gradients."""

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
from loss_core_torch.tracing import is_traced, may_read


class Source(NamedTuple):
    """What the logits of a fused loss are, beside its tensors.

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


def gathered(hidden: Tensor, source: Source) -> Tensor:
    """The hidden states of the whole sequence, to be kept: to gather again would be a collective in the backward."""
    if source.sequence_dim is None:
        return hidden
    return collectives.gather_shares(hidden, source.sequence_dim, source.group)


class Given(NamedTuple):
    """The tensors of a head, and which tokens take part in its products.

    Attributes:
        whole: hidden states of the whole sequence [..., H]; w_VH, bias_V: the head.
        keep_T: as in `Rows`.
        places_N: the tokens that take part, or None for all, ignored ones as zeros.
    """

    whole: Tensor
    w_VH: Tensor
    bias_V: Tensor | None
    keep_T: Tensor | None
    places_N: Tensor | None

    @property
    def keep_rows(self) -> Tensor | None:
        """[N] bool, False for `rows` to ignore; None: there are none."""
        return self.keep_T if self.places_N is None else None

    def of_rows(self, x_T: Tensor) -> Tensor:
        """Numbers of the tokens in products."""
        return x_T if self.places_N is None else x_T[self.places_N]

    def put(self, x_N: Tensor) -> Tensor:
        """Rows of the tokens in products among those of all tokens; 0 elsewhere."""
        if self.places_N is None:
            return x_N
        num_tokens = self.whole.shape[:-1].numel()
        return x_N.new_zeros((num_tokens, *x_N.shape[1:])).index_copy(0, self.places_N, x_N)

    def of_tokens(self, x_N: Tensor) -> Tensor:
        """Numbers of all tokens from those in products; 0 for ignored ones."""
        return zero_where_ignored(self.put(x_N), self.keep_T)

    def rows(self) -> Tensor:
        """Hidden states of the tokens in products, without ignored tokens or with zeros for them."""
        h_TH = self.whole.reshape(-1, self.whole.shape[-1])
        if self.places_N is not None:
            return h_TH.index_select(0, self.places_N)
        # What an ignored token holds must not reach a product, not even times 0.
        return h_TH if self.keep_T is None else h_TH.masked_fill(~self.keep_T[:, None], 0.0)

    def head(self, source: Source) -> HeadOperands:
        """The operands of the products."""
        return HeadOperands(self.rows(), self.w_VH, source.product_dtype, self.bias_V)

    def linear(self, source: Source, labels_T: Tensor, inverse_T: Tensor | None) -> Linear:
        """The operands, and targets ([T] or [T, K]) and inverse temperatures of the tokens in products."""
        inverse_N = None if inverse_T is None else self.of_rows(inverse_T)
        labels_N, start = self.of_rows(labels_T), source.vocab_start
        return Linear(self.head(source), labels_N, start, source.softcap, inverse_N, source.block_tokens)


def logits_once(ctx: Any, logits: Tensor) -> Tensor:
    """The logits that the forward has kept, for the first backward, which overwrites them; empty for another."""
    fresh, ctx.spent = not ctx.spent, True
    # `data`: the saved tensor's version must stay, for a second backward to get at the others.
    return logits.data if fresh else logits.new_empty(0)


def input_grads(
    found: LinearGrads, want: Wanted, given: Given, like: tuple[torch.Size, torch.dtype], source: Source
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden states, weight and bias as their inputs have them; None where they are not wanted.

    Args:
        like: shape and dtype of this rank's hidden states.
    """
    shape, dtype = like
    by_hidden = _hidden_grad(found.hidden_TH, given, shape, source).to(dtype) if want.hidden else None
    by_weight = found.weight_VH.to(given.w_VH.dtype) if want.weight else None
    by_bias = found.bias_V.to(given.bias_V.dtype) if want.bias and given.bias_V is not None else None
    return by_hidden, by_weight, by_bias


def _hidden_grad(grad_h: Tensor, given: Given, shape: torch.Size, source: Source) -> Tensor:
    """The gradient of this rank's hidden states, in the dtype of the arithmetic."""
    grad_h = given.put(grad_h)
    if given.keep_T is not None:
        # Not a product with 0: the upstream gradient may be infinite.
        grad_h = grad_h.masked_fill(~given.keep_T[:, None], 0.0)
    if source.group is None:
        return grad_h.view(shape)
    if source.sequence_dim is None:
        dist.all_reduce(grad_h, group=source.group)
        return grad_h.view(shape)
    return collectives.reduce_scatter_shares(grad_h, shape, source.sequence_dim, source.group)


def scaled(
    kernels: KernelSet, made: Sequence[Tensor], upstream: Tensor, coef_N: Tensor, weight_dtype: torch.dtype
) -> LinearGrads:
    """The gradients that were made in the forward, times the upstream gradient."""
    if may_read(upstream) and float(upstream) == 1.0:
        return LinearGrads(*(grad.data for grad in made))
    # Where no token counts the gradient is 0, even for an infinite upstream.
    factor = upstream.masked_fill((coef_N == 0).all(), 0.0)
    if is_traced(upstream):
        return LinearGrads(*(grad * factor for grad in made))
    by_h, by_w, by_b = (grad.data for grad in made)
    return LinearGrads(
        kernels.scaled(by_h, factor, by_h.dtype), kernels.scaled(by_w, factor, weight_dtype),
        kernels.scaled(by_b, factor, by_b.dtype),
    )  # fmt: skip
