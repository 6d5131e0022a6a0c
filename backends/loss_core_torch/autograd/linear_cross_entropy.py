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

from loss_core.row_terms import Objective, RowTerms, cross_entropy, cross_entropy_coefficients, token_metrics
from loss_core_torch import operators
from loss_core_torch.autograd.base import check_upstream
from loss_core_torch.autograd.linear_source import Source, gathered, input_grads, operands, put, scaled
from loss_core_torch.kernels import KernelSet, Wanted
from loss_core_torch.kernels.terms import kept_coefficients
from loss_core_torch.parallel import collectives
from loss_core_torch.reduction import weighted_sum, zero_where_ignored
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
    objective: Objective
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
        linear = operands(whole, w_VH, labels_T, keep_T, places_N, call.source, bias_V=bias_V)
        made: list[Tensor] = []
        if coef_T is not None and call.source.group is None and any(call.want):
            coef_N = coef_T if places_N is None else coef_T[places_N]
            terms, grads = operators.linear_terms_and_grads(call.kernels, linear, coef_N, call.objective, call.want)
            made = list(grads)
        else:
            keep_logits = call.source.group is not None and any(call.want)
            terms, logits = operators.linear_terms(call.kernels, linear, call.objective.sums, keep_logits)
            made = [logits] if logits.numel() else []
        if call.source.group is not None:
            terms = collectives.fold(terms, call.source.group)
        loss_N = cross_entropy(torch, terms, call.objective)
        loss_T = zero_where_ignored(put(loss_N, places_N, labels_T.numel()), keep_T)
        result = loss_T.clone() if coef_T is None else weighted_sum(coef_T, loss_T)
        metrics = token_metrics(torch, terms, call.objective, call.metrics)
        metrics = [zero_where_ignored(put(x_N, places_N, labels_T.numel()), keep_T) for x_N in metrics]
        return result, loss_T, *terms[:3], *([] if whole is hidden else [whole]), *made, *metrics

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, *tensors, ctx.call = inputs
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        ctx.mark_non_differentiable(*output[1:])
        # Else autograd makes zeros of the weight's size for the outputs that have no gradient.
        ctx.set_materialize_grads(False)
        rest = list(output[1 : len(output) - len(ctx.call.metrics)])
        whole = hidden if ctx.call.source.sequence_dim is None else rest.pop(4)
        ctx.save_for_backward(whole, *tensors, *rest)
        ctx.spent = False

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        upstream, call = grads[0], ctx.call
        check_upstream(upstream)
        whole, w_VH, bias_V, labels_T, keep_T, places_N, coef_T, loss_T, m_T, s_T, t_T, *made = ctx.saved_tensors
        want = Wanted(*ctx.needs_input_grad[:3])
        fresh, ctx.spent = made and not ctx.spent, True
        with torch.no_grad():
            if fresh and call.source.group is None:
                coef_N = coef_T if places_N is None else coef_T[places_N]
                found = scaled(call.kernels, made, upstream, coef_N, w_VH.dtype)
            else:
                upstream_T = upstream.to(m_T.dtype) if coef_T is None else coef_T * upstream.to(m_T.dtype)
                upstream_N = upstream_T if places_N is None else upstream_T[places_N]
                # `data`: the saved tensor's version must stay, for a second backward to get at the others.
                logits = made[0].data if fresh else m_T.new_empty(0)
                linear = operands(whole, w_VH, labels_T, keep_T, places_N, call.source, bias_V=bias_V)
                terms = RowTerms(m_T, s_T, t_T)
                coefficients = cross_entropy_coefficients(torch, terms, upstream_N, call.objective)
                if keep_T is not None and places_N is None:
                    # Nothing of an ignored token, even where the weight has made its logits NaN.
                    coefficients = kept_coefficients(coefficients, keep_T)
                found = operators.linear_grads(call.kernels, linear, terms, coefficients, want, logits)
            by_inputs = input_grads(found, want, (w_VH, bias_V), keep_T, places_N, ctx.shape, ctx.dtype, call.source)
            by_coef = loss_T * upstream if coef_T is not None and ctx.needs_input_grad[6] else None
        sources = (whole, w_VH, bias_V, coef_T, upstream)
        refusing = (once_differentiable(x, *sources) for x in by_inputs)
        return *refusing, None, None, None, once_differentiable(by_coef, *sources), None
