"""A loss of softcap(hidden @ W.T + b) as an autograd function, without the logits; see `rows` for which losses.

Over a full vocabulary, with a coefficient for each token, the forward computes loss and gradients with three matrix
products. Otherwise the backward recomputes the logits: the upstream gradients of the tokens, or the terms of the other
ranks, are not known earlier. Over a group: one all-gather of the row terms in the forward; one all-reduce of the
gradient of the hidden states in the backward, or one reduce-scatter where the sequence is sharded over the group.
"""

# T = tokens, N = tokens in products, V = vocabulary of this rank, H = hidden, K = targets of a row

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from loss_core.row_terms import Objective, token_metrics
from loss_core_torch import operators
from loss_core_torch.autograd.base import (
    Function,
    check_upstream,
    load_terms,
    row_upstreams,
    save_context,
    teacher_grad,
    terms_to_save,
    with_teacher,
)
from loss_core_torch.autograd.linear_source import (
    HeadInputs,
    Source,
    input_grads,
    scale_grads,
    take_logits,
    unsharded,
)
from loss_core_torch.kernels import KernelSet, Wanted
from loss_core_torch.kernels.terms import mask_coefficients
from loss_core_torch.parallel import collectives
from loss_core_torch.reduction import weighted_sum
from loss_core_torch.second_derivative import once_differentiable


class Call(NamedTuple):
    """The arguments of a call that are not tensors.

    Attributes:
        kernels, objective, metrics: as in `rows.Call`.
        want: which gradients the backward may need.
        source: how the logits are computed.
    """

    kernels: KernelSet
    objective: Objective
    want: Wanted
    source: Source
    metrics: tuple[str, ...] = ()


class LinearRowLoss(Function):
    """Values of an objective for each token, or the sum of its one value weighted by coefficients.

    Inputs: hidden [..., H] and w_VH float; bias_V float or None; keep_T as in `RowLoss`; indices_N [N] int64, the
    indices of the tokens in the products (all others are ignored), or None for all tokens, with zeros in ignored rows;
    labels_T, inverse_T and log_p_TK as in `RowLoss`; coef_T [T] in the dtype of the arithmetic, only over a full
    vocabulary, or None; the call.
    Output and later backwards: as in `RowLoss`.
    """

    @staticmethod
    def forward(
        hidden: Tensor,
        w_VH: Tensor,
        bias_V: Tensor | None,
        keep_T: Tensor | None,
        indices_N: Tensor | None,
        labels_T: Tensor,
        inverse_T: Tensor | None,
        log_p_TK: Tensor | None,
        coef_T: Tensor | None,
        call: Call,
    ) -> tuple[Tensor, ...]:
        full = unsharded(hidden, call.source)
        inputs = HeadInputs(full, w_VH, bias_V, keep_T, indices_N)
        linear, group = inputs.linear(call.source, labels_T, inverse_T), call.source.group
        objective = with_teacher(call.objective, None if log_p_TK is None else inputs.gather(log_p_TK))
        stored: list[Tensor] = []
        if coef_T is not None and any(call.want):
            coef_N = inputs.gather(coef_T)
            terms, grads = operators.linear_terms_and_grads(call.kernels, linear, coef_N, objective, call.want)
            stored = list(grads)
        else:
            keep_logits = group is not None and any(call.want)
            terms, logits = operators.linear_terms(call.kernels, linear, objective.sums, keep_logits)
            stored = [logits] if logits.numel() else []
        terms = collectives.fold(terms, group)
        results = [inputs.scatter_valid(x_N) for x_N in objective.values(torch, terms)]
        metrics = [inputs.scatter_valid(x_N) for x_N in token_metrics(torch, terms, objective, call.metrics)]
        if coef_T is not None:
            # After the sum the loss of each token, which is the gradient with respect to its coefficient.
            results = [weighted_sum(coef_T, *results), *results]
        return *results, *([] if full is hidden else [full]), *terms_to_save(terms), *stored, *metrics

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, *tensors, ctx.call = inputs
        ctx.like = (hidden.shape, hidden.dtype)
        results, end = ctx.call.objective.num_values, len(output) - len(ctx.call.metrics)
        saved = list(output[results:end])
        full = hidden if ctx.call.source.sequence_dim is None else saved.pop(0)
        save_context(ctx, [full, *tensors, *saved], output, results)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        call, upstreams = ctx.call, grads[: ctx.call.objective.num_values]
        for upstream in upstreams:
            if upstream is not None:
                check_upstream(upstream)
        tensors = ctx.saved_tensors
        inputs, (labels_T, inverse_T, log_p_TK, coef_T, *saved), loss_T = HeadInputs(*tensors[:5]), tensors[5:], None
        if coef_T is not None:
            loss_T, *saved = saved
        objective = with_teacher(call.objective, None if log_p_TK is None else inputs.gather(log_p_TK))
        terms, stored = load_terms(saved, objective.sums)
        want = Wanted(*ctx.needs_input_grad[:3])
        by_inputs: tuple[Tensor | None, ...] = (None, None, None)
        by_log_p = by_coef = None
        with torch.no_grad():
            upstreams_N: list[Any] = [
                None if x_T is None else inputs.gather(x_T) for x_T in row_upstreams(upstreams, coef_T, terms.s.dtype)
            ]
            if coef_T is not None and stored and not ctx.consumed:
                ctx.consumed = True
                found = scale_grads(call.kernels, stored, grads[0], inputs.gather(coef_T), inputs.w_VH.dtype)
                by_inputs = input_grads(found, want, inputs, ctx.like, call.source)
            elif any(want):
                logits = take_logits(ctx, stored[0]) if coef_T is None and stored else terms.s.new_empty(0)
                coefficients = objective.coefficients(torch, terms, upstreams_N)
                if inputs.keep_rows is not None:
                    # Ignored tokens contribute nothing, even where a NaN in the weight makes their logits NaN.
                    coefficients = mask_coefficients(coefficients, inputs.keep_rows)
                linear = inputs.linear(call.source, labels_T, inverse_T)
                found = operators.linear_grads(call.kernels, linear, terms, coefficients, want, logits)
                by_inputs = input_grads(found, want, inputs, ctx.like, call.source)
            if ctx.needs_input_grad[7]:
                by_log_p = inputs.scatter(teacher_grad(objective, terms, upstreams_N[0], inputs.keep_rows))
            if ctx.needs_input_grad[8] and loss_T is not None:
                by_coef = loss_T * grads[0]
        sources = (*inputs[:3], log_p_TK, coef_T, *upstreams)
        *by_inputs_, by_log_p, by_coef = (once_differentiable(x, *sources) for x in (*by_inputs, by_log_p, by_coef))
        return *by_inputs_, None, None, None, None, by_log_p, by_coef, None
