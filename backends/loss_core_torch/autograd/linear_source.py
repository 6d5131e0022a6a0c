"""Hidden states and weight as the source of logits: the operands of a fused loss, and the way back of its gradients."""

# T = tokens, N = tokens in products, V = vocabulary of this rank, H = hidden

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from loss_core.row_terms import Coefficients, RowTerms
from loss_core_torch import operators
from loss_core_torch.kernels import KernelSet, Linear, LinearGrads, Wanted
from loss_core_torch.kernels.terms import kept_coefficients
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


def token_rows(whole: Tensor, keep_T: Tensor | None, places_N: Tensor | None) -> Tensor:
    """Hidden states of the tokens in products, without ignored tokens or with zeros for them."""
    h_TH = whole.reshape(-1, whole.shape[-1])
    if places_N is not None:
        return h_TH.index_select(0, places_N)
    # What an ignored token holds must not reach a product, not even times 0.
    return h_TH if keep_T is None else h_TH.masked_fill(~keep_T[:, None], 0.0)


class Given(NamedTuple):
    """The tensors of a call.

    Attributes:
        whole: hidden states of the whole sequence [..., H]; w_VH, bias_V: the head.
        labels_T: [T] or [T, K]; keep_T: as in `Rows`.
        places_N: the tokens that take part in products, or None for all, ignored ones as zeros.
        inverse_T: inverse temperatures, or None.
    """

    whole: Tensor
    w_VH: Tensor
    bias_V: Tensor | None
    labels_T: Tensor
    keep_T: Tensor | None
    places_N: Tensor | None
    inverse_T: Tensor | None = None

    def of_rows(self, x_T: Tensor) -> Tensor:
        """Numbers of the tokens in products."""
        return x_T if self.places_N is None else x_T[self.places_N]

    def of_tokens(self, x_N: Tensor) -> Tensor:
        """Numbers of all tokens from those in products; 0 for ignored ones."""
        return zero_where_ignored(put(x_N, self.places_N, len(self.labels_T)), self.keep_T)

    def linear(self, source: Source) -> Linear:
        """The operands of the products, without ignored tokens or with zeros for them."""
        h_TH = token_rows(self.whole, self.keep_T, self.places_N)
        inverse_N = None if self.inverse_T is None else self.of_rows(self.inverse_T)
        return Linear(
            h_TH, self.w_VH, self.of_rows(self.labels_T), source.vocab_start, source.softcap, source.product_dtype,
            inverse_N, self.bias_V, source.block_tokens,
        )  # fmt: skip


def keep_for_backward(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...], results: int = 1, metrics: int = 0
) -> None:
    """The `setup_context` of a function of hidden states, other tensors and its call.

    Args:
        output: results, then what waits for the backward, of which the gathered hidden states are last, then metrics.
    """
    hidden, *tensors, ctx.call = inputs
    ctx.shape, ctx.dtype, ctx.spent = hidden.shape, hidden.dtype, False
    ctx.mark_non_differentiable(*output[results:])
    # Else autograd makes zeros of the weight's size for the outputs that have no gradient.
    ctx.set_materialize_grads(False)
    waiting = list(output[results : len(output) - metrics])
    whole = hidden if ctx.call.source.sequence_dim is None else waiting.pop()
    ctx.save_for_backward(whole, *tensors, *waiting)


def logits_once(ctx: Any, logits: Tensor) -> Tensor:
    """The logits that the forward has kept, for the first backward, which overwrites them; empty for another."""
    fresh, ctx.spent = not ctx.spent, True
    # `data`: the saved tensor's version must stay, for a second backward to get at the others.
    return logits.data if fresh else logits.new_empty(0)


def grads_from_terms(
    ctx: Any, given: Given, want: Wanted, terms: RowTerms, coefficients: Coefficients, logits: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden states, weight and bias, from terms and coefficients of the tokens in products."""
    if given.keep_T is not None and given.places_N is None:
        # Nothing of an ignored token, even where the weight has made its logits NaN.
        coefficients = kept_coefficients(coefficients, given.keep_T)
    call, linear = ctx.call, given.linear(ctx.call.source)
    found = operators.linear_grads(call.kernels, linear, terms, coefficients, want, logits)
    head = (given.w_VH, given.bias_V)
    return input_grads(found, want, head, given.keep_T, given.places_N, ctx.shape, ctx.dtype, call.source)


def put(x_N: Tensor, places_N: Tensor | None, num_tokens: int) -> Tensor:
    """Rows of the tokens in products among those of all tokens; 0 elsewhere."""
    if places_N is None:
        return x_N
    return x_N.new_zeros((num_tokens, *x_N.shape[1:])).index_copy(0, places_N, x_N)


def _hidden_grad(
    grad_h: Tensor, keep_T: Tensor | None, places_N: Tensor | None, shape: torch.Size, source: Source
) -> Tensor:
    """The gradient of this rank's hidden states, in the dtype of the arithmetic."""
    if places_N is not None:
        num_tokens = shape[:-1].numel() * (1 if source.sequence_dim is None else dist.get_world_size(source.group))
        grad_h = put(grad_h, places_N, num_tokens)
    if keep_T is not None:
        # Not a product with 0: the upstream gradient may be infinite.
        grad_h = grad_h.masked_fill(~keep_T[:, None], 0.0)
    if source.group is None:
        return grad_h.view(shape)
    if source.sequence_dim is None:
        dist.all_reduce(grad_h, group=source.group)
        return grad_h.view(shape)
    return collectives.reduce_scatter_shares(grad_h, shape, source.sequence_dim, source.group)


def input_grads(
    found: LinearGrads,
    want: Wanted,
    head: tuple[Tensor, Tensor | None],
    keep_T: Tensor | None,
    places_N: Tensor | None,
    shape: torch.Size,
    dtype: torch.dtype,
    source: Source,
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden states, weight and bias as their inputs have them; None where they are not wanted.

    Args:
        head: weight, and bias or None; shape, dtype: of this rank's hidden states.
    """
    by_hidden = None
    if want.hidden:
        by_hidden = _hidden_grad(found.hidden_TH, keep_T, places_N, shape, source).to(dtype)
    weight, bias = head
    by_bias = found.bias_V.to(bias.dtype) if want.bias and bias is not None else None
    return by_hidden, found.weight_VH.to(weight.dtype) if want.weight else None, by_bias


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
