"""A loss of softcap(hidden @ W.T + b) as an autograd function, without the logits; see `rows` for which losses.

Over a whole vocabulary, with a coefficient for each token, the forward makes loss and gradients with three matrix
products. Otherwise the backward computes the logits again: the upstream gradient of each token, or the other ranks'
part of its row, is not known before. Over a group: one all-gather of the row terms in the forward; one all-reduce of
the gradient of the hidden states in the backward, or one reduce-scatter where each rank holds a share of the sequence.
"""

# T = tokens, N = tokens in products, R = ranks, V = vocabulary of this rank, H = hidden, K = targets of a row

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from loss_core.row_terms import Objective, token_metrics
from loss_core_torch import operators
from loss_core_torch.autograd.base import (
    Function,
    check_upstream,
    keep,
    kept_terms,
    of_values,
    restored_terms,
    teacher_grad,
    with_teacher,
)
from loss_core_torch.autograd.linear_source import Given, Source, gathered, input_grads, logits_once, scaled
from loss_core_torch.kernels import KernelSet, Wanted
from loss_core_torch.kernels.terms import mask_coefficients
from loss_core_torch.parallel import collectives
from loss_core_torch.reduction import weighted_sum
from loss_core_torch.second_derivative import once_differentiable


class Call(NamedTuple):
    """What a call is beside its tensors.

    Attributes:
        kernels, objective, metrics: as in `rows.Call`.
        want: which gradients may be asked for.
        source: where the logits come from.
    """

    kernels: KernelSet
    objective: Objective
    want: Wanted
    source: Source
    metrics: tuple[str, ...] = ()


class LinearRowLoss(Function):
    """Values of an objective for each token, or the sum of its one value with given coefficients.

    Inputs: hidden [..., H] and w_VH float; bias_V float or None; keep_T as of `RowLoss`; places_N [N] int64, the tokens
    that take part in products (the others are ignored), or None for all, ignored ones as zeros; labels_T, inverse_T and
    log_p_TK as of `RowLoss`; coef_T [T] in the dtype of the arithmetic, only over a whole vocabulary, or None; the
    call.
    Output: as of `RowLoss`, on a second backward as well.
    """

    @staticmethod
    def forward(
        hidden: Tensor,
        w_VH: Tensor,
        bias_V: Tensor | None,
        keep_T: Tensor | None,
        places_N: Tensor | None,
        labels_T: Tensor,
        inverse_T: Tensor | None,
        log_p_TK: Tensor | None,
        coef_T: Tensor | None,
        call: Call,
    ) -> tuple[Tensor, ...]:
        whole = gathered(hidden, call.source)
        given = Given(whole, w_VH, bias_V, keep_T, places_N)
        linear, group = given.linear(call.source, labels_T, inverse_T), call.source.group
        objective = with_teacher(call.objective, None if log_p_TK is None else given.of_rows(log_p_TK))
        made: list[Tensor] = []
        if coef_T is not None and any(call.want):
            coef_N = given.of_rows(coef_T)
            terms, grads = operators.linear_terms_and_grads(call.kernels, linear, coef_N, objective, call.want)
            made = list(grads)
        else:
            keep_logits = group is not None and any(call.want)
            terms, logits = operators.linear_terms(call.kernels, linear, objective.sums, keep_logits)
            made = [logits] if logits.numel() else []
        terms = collectives.fold(terms, group)
        results = [given.of_tokens(x_N) for x_N in objective.values(torch, terms)]
        metrics = [given.of_tokens(x_N) for x_N in token_metrics(torch, terms, objective, call.metrics)]
        if coef_T is not None:
            # Beside the sum the loss of each token, which is the gradient by its coefficient.
            results = [weighted_sum(coef_T, *results), *results]
        return *results, *([] if whole is hidden else [whole]), *kept_terms(terms), *made, *metrics

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, *tensors, ctx.call = inputs
        ctx.like = (hidden.shape, hidden.dtype)
        results, waiting = ctx.call.objective.num_values, len(output) - len(ctx.call.metrics)
        saved = list(output[results:waiting])
        whole = hidden if ctx.call.source.sequence_dim is None else saved.pop(0)
        keep(ctx, [whole, *tensors, *saved], output, results)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        call, upstreams = ctx.call, grads[: ctx.call.objective.num_values]
        for upstream in upstreams:
            if upstream is not None:
                check_upstream(upstream)
        tensors = ctx.saved_tensors
        given, (labels_T, inverse_T, log_p_TK, coef_T, *saved), loss_T = Given(*tensors[:5]), tensors[5:], None
        if coef_T is not None:
            loss_T, *saved = saved
        objective = with_teacher(call.objective, None if log_p_TK is None else given.of_rows(log_p_TK))
        terms, made = restored_terms(saved, objective.sums)
        want = Wanted(*ctx.needs_input_grad[:3])
        by_inputs: tuple[Tensor | None, ...] = (None, None, None)
        by_log_p = by_coef = None
        with torch.no_grad():
            of_rows: list[Any] = [
                None if x_T is None else given.of_rows(x_T) for x_T in of_values(upstreams, coef_T, terms.s.dtype)
            ]
            if coef_T is not None and made and not ctx.spent:
                ctx.spent = True
                found = scaled(call.kernels, made, grads[0], given.of_rows(coef_T), given.w_VH.dtype)
                by_inputs = input_grads(found, want, given, ctx.like, call.source)
            elif any(want):
                logits = logits_once(ctx, made[0]) if coef_T is None and made else terms.s.new_empty(0)
                coefficients = objective.coefficients(torch, terms, of_rows)
                if given.keep_rows is not None:
                    # Nothing of an ignored token, even where the weight has made its logits NaN.
                    coefficients = mask_coefficients(coefficients, given.keep_rows)
                linear = given.linear(call.source, labels_T, inverse_T)
                found = operators.linear_grads(call.kernels, linear, terms, coefficients, want, logits)
                by_inputs = input_grads(found, want, given, ctx.like, call.source)
            if ctx.needs_input_grad[7]:
                by_log_p = given.put(teacher_grad(objective, terms, of_rows[0], given.keep_rows))
            if ctx.needs_input_grad[8] and loss_T is not None:
                by_coef = loss_T * grads[0]
        sources = (given.whole, given.w_VH, given.bias_V, log_p_TK, coef_T, *upstreams)
        refusing = (once_differentiable(x, *sources) for x in (*by_inputs, by_log_p, by_coef))
        *by_inputs_, by_log_p, by_coef = refusing
        return *by_inputs_, None, None, None, None, by_log_p, by_coef, None
