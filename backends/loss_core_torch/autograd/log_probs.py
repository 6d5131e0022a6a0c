"""Log-probabilities and entropies as autograd functions, over logits and over hidden states and weight."""

# T = tokens, N = tokens in products, V = vocabulary (of this rank), H = hidden

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from loss_core.row_terms import (
    Coefficients,
    LogProbability,
    RowTerms,
    Sums,
    entropy,
)
from loss_core_torch import operators
from loss_core_torch.autograd.base import check_upstream
from loss_core_torch.autograd.linear_source import (
    Given,
    Source,
    gathered,
    grads_from_terms,
    keep_for_backward,
    logits_once,
)
from loss_core_torch.kernels import KernelSet, Rows, Wanted
from loss_core_torch.parallel import collectives
from loss_core_torch.reduction import zero_where_ignored
from loss_core_torch.second_derivative import once_differentiable


class Call(NamedTuple):
    """What a call over logits is beside its tensors.

    Attributes:
        kernels: the set of kernels.
        entropy: whether entropies are made.
        softcap: of the logits; 0 is off.
        vocab_start: first class of these logits.
        group: over which the vocabulary is sharded, or None.
    """

    kernels: KernelSet
    entropy: bool
    softcap: float = 0.0
    vocab_start: int = 0
    group: Any = None


class LinearCall(NamedTuple):
    """What a call over hidden states is beside its tensors.

    Attributes:
        kernels, entropy: as in `Call`.
        source: where the logits come from.
        want: which gradients may be asked for.
    """

    kernels: KernelSet
    entropy: bool
    source: Source
    want: Wanted


class LogProbabilities(Function):
    """Log-probability and entropy of each token over logits.

    Inputs: logits [..., V] float; labels_T [T] int64 over the whole vocabulary; keep_T [T] bool or None; inverse_T [T],
    inverse temperatures in the dtype of the arithmetic, or None; the call.
    Output: log-probabilities and entropies [T] (empty unless asked for), 0 for ignored tokens, in the dtype of the
    arithmetic. Further outputs are what waits for the backward.
    """

    @staticmethod
    def forward(
        logits: Tensor, labels_T: Tensor, keep_T: Tensor | None, inverse_T: Tensor | None, call: Call
    ) -> tuple[Tensor, ...]:
        rows = Rows(logits, labels_T, keep_T, call.vocab_start, call.softcap, inverse_T)
        terms = operators.row_terms(call.kernels, rows, Sums(e=call.entropy))
        if call.group is not None:
            terms = collectives.fold(terms, call.group)
        return *_results(terms, lambda x_T: zero_where_ignored(x_T, keep_T)), *_saved(terms)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.call = inputs
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        logits, labels_T, keep_T, inverse_T, *saved = ctx.saved_tensors
        with torch.no_grad():
            terms, call = _terms(saved), ctx.call
            coefficients = _coefficients(terms, grads[:2])
            rows = Rows(logits, labels_T, keep_T, call.vocab_start, call.softcap, inverse_T)
            grad = operators.row_grad(call.kernels, rows, terms, coefficients, None)
        return once_differentiable(grad, logits, *grads[:2]), None, None, None, None


class LinearLogProbabilities(Function):
    """Log-probability and entropy of each token of softcap(hidden @ W.T + b), without the logits.

    Inputs: as of `LinearCrossEntropy`, with inverse_T [T] or None in place of the coefficients. Output: as of
    `LogProbabilities`. The backward makes the logits again: four products in all.
    """

    @staticmethod
    def forward(
        hidden: Tensor,
        w_VH: Tensor,
        bias_V: Tensor | None,
        labels_T: Tensor,
        keep_T: Tensor | None,
        places_N: Tensor | None,
        inverse_T: Tensor | None,
        call: LinearCall,
    ) -> tuple[Tensor, ...]:
        whole = gathered(hidden, call.source)
        given = Given(whole, w_VH, bias_V, labels_T, keep_T, places_N, inverse_T)
        keep_logits = call.source.group is not None and any(call.want)
        sums = Sums(e=call.entropy)
        terms, logits = operators.linear_terms(call.kernels, given.linear(call.source), sums, keep_logits)
        if call.source.group is not None:
            terms = collectives.fold(terms, call.source.group)
        results = _results(terms, given.of_tokens)
        return *results, *_saved(terms), logits, *([] if whole is hidden else [whole])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        keep_for_backward(ctx, inputs, output, results=2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        *tensors, m_T, s_T, t_T, e_T, logits = ctx.saved_tensors
        given, want, terms = Given(*tensors), Wanted(*ctx.needs_input_grad[:3]), _terms([m_T, s_T, t_T, e_T])
        with torch.no_grad():
            coefficients = _coefficients(terms, [None if x_T is None else given.of_rows(x_T) for x_T in grads[:2]])
            by_inputs = grads_from_terms(ctx, given, want, terms, coefficients, logits_once(ctx, logits))
        refusing = (once_differentiable(x, given.whole, given.w_VH, given.bias_V, *grads[:2]) for x in by_inputs)
        return *refusing, None, None, None, None, None


def _results(terms: RowTerms, of_tokens: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities, and entropies or nothing, of all tokens.

    Args:
        of_tokens: numbers of all tokens from those of the rows; 0 for ignored ones.
    """
    entropies = terms.s.new_empty(0) if terms.e is None else of_tokens(entropy(torch, terms))
    return of_tokens(LogProbability().values(torch, terms)[0]), entropies


def _saved(terms: RowTerms) -> tuple[Tensor, ...]:
    """m, s, t and e, which is empty where it is not needed."""
    return *terms[:3], terms.s.new_empty(0) if terms.e is None else terms.e


def _terms(saved: list[Tensor]) -> RowTerms:
    m_T, s_T, t_T, e_T = saved
    return RowTerms(m_T, s_T, t_T, e=e_T if e_T.numel() or not s_T.numel() else None)


def _coefficients(terms: RowTerms, upstreams: Any) -> Coefficients:
    """From the upstream gradients of log-probabilities and entropies, of which one may be missing."""
    for upstream in upstreams:
        if upstream is not None:
            check_upstream(upstream)
    of_log_prob, of_entropy = (None if x_T is None else x_T.to(terms.s.dtype) for x_T in upstreams)
    return LogProbability(terms.e is not None).coefficients(torch, terms, [of_log_prob, of_entropy])
