"""Cross entropy of softcap(hidden @ W.T + b) as an autograd function, without the logits.

Over a whole vocabulary, with a coefficient for each token, the forward makes loss and gradients with three matrix
products. Otherwise the backward computes the logits again: the upstream gradient of each token, or the other ranks'
part of its row, is not known before. Over a group: one all-gather of the row terms in the forward; one all-reduce of
the gradient of the hidden states in the backward, or one reduce-scatter where each rank holds a share of the sequence.
"""

# T = tokens, N = tokens in products, R = ranks, V = vocabulary of this rank, H = hidden

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from loss_core.row_terms import CrossEntropy, RowTerms, token_metrics
from loss_core_torch import operators
from loss_core_torch.autograd.base import check_upstream
from loss_core_torch.autograd.linear_source import (
    Given,
    Source,
    gathered,
    grads_from_terms,
    input_grads,
    keep_for_backward,
    logits_once,
    scaled,
)
from loss_core_torch.kernels import KernelSet, Wanted
from loss_core_torch.parallel import collectives
from loss_core_torch.reduction import weighted_sum
from loss_core_torch.second_derivative import once_differentiable


class Call(NamedTuple):
    """What a call is beside its tensors.

    Attributes:
        kernels: the set of kernels.
        objective: which cross entropy.
        want: which gradients may be asked for.
        source: where the logits come from.
        metrics: names of `row_terms.token_metrics`.
    """

    kernels: KernelSet
    objective: CrossEntropy
    want: Wanted
    source: Source
    metrics: tuple[str, ...] = ()


class LinearCrossEntropy(Function):
    """Cross entropy of each token, or their sum with given coefficients.

    Inputs: hidden [..., H] and w_VH float; bias_V float or None; labels_T [T] int64 over the whole vocabulary; keep_T
    [T] bool or None; places_N [N] int64, the tokens that take part in products (the others are ignored), or None for
    all, ignored ones as zeros; coef_T [T] in the dtype of the arithmetic, or None; the call.
    Output: with coef_T the scalar sum of coef * loss, else loss_T [T], 0 for ignored tokens; in the dtype of the
    arithmetic. Further outputs are what waits for the backward; the last ones are metrics [T], 0 for ignored tokens.
    See `CrossEntropy` on a second backward.
    """

    @staticmethod
    def forward(
        hidden: Tensor,
        w_VH: Tensor,
        bias_V: Tensor | None,
        labels_T: Tensor,
        keep_T: Tensor | None,
        places_N: Tensor | None,
        coef_T: Tensor | None,
        call: Call,
    ) -> tuple[Tensor, ...]:
        whole = gathered(hidden, call.source)
        given = Given(whole, w_VH, bias_V, labels_T, keep_T, places_N)
        linear = given.linear(call.source)
        made: list[Tensor] = []
        if coef_T is not None and call.source.group is None and any(call.want):
            coef_N = given.of_rows(coef_T)
            terms, grads = operators.linear_terms_and_grads(call.kernels, linear, coef_N, call.objective, call.want)
            made = list(grads)
        else:
            keep_logits = call.source.group is not None and any(call.want)
            terms, logits = operators.linear_terms(call.kernels, linear, call.objective.sums, keep_logits)
            made = [logits] if logits.numel() else []
        if call.source.group is not None:
            terms = collectives.fold(terms, call.source.group)
        loss_T = given.of_tokens(call.objective.values(torch, terms)[0])
        result = loss_T.clone() if coef_T is None else weighted_sum(coef_T, loss_T)
        metrics = [given.of_tokens(x_N) for x_N in token_metrics(torch, terms, call.objective, call.metrics)]
        return result, loss_T, *terms[:3], *made, *([] if whole is hidden else [whole]), *metrics

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        keep_for_backward(ctx, inputs, output, metrics=len(inputs[-1].metrics))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        upstream, call = grads[0], ctx.call
        check_upstream(upstream)
        whole, w_VH, bias_V, labels_T, keep_T, places_N, coef_T, loss_T, m_T, s_T, t_T, *made = ctx.saved_tensors
        given, want = Given(whole, w_VH, bias_V, labels_T, keep_T, places_N), Wanted(*ctx.needs_input_grad[:3])
        with torch.no_grad():
            if made and call.source.group is None and not ctx.spent:
                ctx.spent = True
                found = scaled(call.kernels, made, upstream, given.of_rows(coef_T), w_VH.dtype)
                head = (w_VH, bias_V)
                by_inputs = input_grads(found, want, head, keep_T, places_N, ctx.shape, ctx.dtype, call.source)
            else:
                upstream_T = upstream.to(m_T.dtype) if coef_T is None else coef_T * upstream.to(m_T.dtype)
                terms = RowTerms(m_T, s_T, t_T)
                coefficients = call.objective.coefficients(torch, terms, [given.of_rows(upstream_T)])
                kept = made and call.source.group is not None
                logits = logits_once(ctx, made[0]) if kept else m_T.new_empty(0)
                by_inputs = grads_from_terms(ctx, given, want, terms, coefficients, logits)
            by_coef = loss_T * upstream if coef_T is not None and ctx.needs_input_grad[6] else None
        sources = (whole, w_VH, bias_V, coef_T, upstream)
        refusing = (once_differentiable(x, *sources) for x in by_inputs)
        return *refusing, None, None, None, once_differentiable(by_coef, *sources), None
