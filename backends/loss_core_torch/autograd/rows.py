"""A loss over logits as an autograd function: cross entropy, log-probability, top-k distillation.

The forward computes row terms, the backward a gradient from coefficients; an `Objective` defines the loss.
"""

# T = tokens, V = vocabulary (of this rank), K = targets of a row

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from loss_core.row_terms import Coefficients, Objective, token_metrics
from loss_core_torch import inplace, operators
from loss_core_torch.autograd.base import (
    Function,
    check_upstream,
    load_terms,
    row_upstreams,
    save_context,
    take_gradient,
    teacher_grad,
    terms_to_save,
    with_teacher,
)
from loss_core_torch.kernels import KernelSet, Rows
from loss_core_torch.parallel import collectives
from loss_core_torch.reduction import weighted_sum, zero_where_ignored
from loss_core_torch.second_derivative import once_differentiable


class Call(NamedTuple):
    """The arguments of a call that are not tensors.

    Attributes:
        kernels: the kernel set.
        objective: the loss; a `TopK` without its log-probabilities, which are an input of the function.
        softcap: of the logits; 0 is off.
        vocab_start: first class of these logits.
        group: over which the vocabulary is sharded, or None.
        overwrite: the backward writes over the logits.
        grad_in_forward: compute the gradient in the forward; requires coef_T, no group, no overwrite and no trace.
        metrics: names for `row_terms.token_metrics`, of a cross entropy.
    """

    kernels: KernelSet
    objective: Objective
    softcap: float = 0.0
    vocab_start: int = 0
    group: Any = None
    overwrite: bool = False
    grad_in_forward: bool = False
    metrics: tuple[str, ...] = ()


class RowLoss(Function):
    """Values of an objective for each token, or the sum of its one value weighted by coefficients.

    Inputs: logits [..., V] float; labels_T [T] int64 over the full vocabulary, or [T, K], ascending in each row;
    keep_T [T] bool or None; inverse_T [T], inverse temperatures in the dtype of the arithmetic, or None; log_p_TK
    [T, K] in that dtype, of a `TopK`, or None; coef_T [T] in that dtype, not differentiated, or None; the call.
    Output: with coef_T the scalar sum of coef * value, else each value [T], 0 for ignored tokens; in the dtype of the
    arithmetic. Then tensors saved for the backward, and metrics [T], 0 for ignored tokens.

    The first backward returns a gradient computed in the forward without a copy; later ones (retain_graph) recompute
    it.
    """

    @staticmethod
    def forward(
        logits: Tensor,
        labels_T: Tensor,
        keep_T: Tensor | None,
        inverse_T: Tensor | None,
        log_p_TK: Tensor | None,
        coef_T: Tensor | None,
        call: Call,
    ) -> tuple[Tensor, ...]:
        rows = Rows(logits, labels_T, keep_T, call.vocab_start, call.softcap, inverse_T)
        objective = with_teacher(call.objective, log_p_TK)
        stored: list[Tensor] = []
        if call.grad_in_forward:
            assert coef_T is not None
            terms, grad, coefficients = operators.row_terms_and_grad(call.kernels, rows, coef_T, objective)
            # Outputs must be tensors: an empty one stands for None.
            stored = [grad, *(grad.new_empty(0) if c_T is None else c_T for c_T in coefficients[:4])]
        else:
            terms = operators.row_terms(call.kernels, rows, objective.sums)
        terms = collectives.fold(terms, call.group)
        values = objective.values(torch, terms)
        metrics = token_metrics(torch, terms, objective, call.metrics)
        if coef_T is not None:
            results = [weighted_sum(coef_T, *values)]
        else:
            results = [zero_where_ignored(x_T, keep_T) for x_T in values]
        return *results, *terms_to_save(terms), *stored, *(zero_where_ignored(x_T, keep_T) for x_T in metrics)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.call = inputs
        results, end = ctx.call.objective.num_values, len(output) - len(ctx.call.metrics)
        save_context(ctx, [*tensors, *output[results:end]], output, results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        call = ctx.call
        upstreams = grads[: call.objective.num_values]
        inplace.check_not_overwritten(ctx)
        for upstream in upstreams:
            if upstream is not None:
                check_upstream(upstream)
        logits, labels_T, keep_T, inverse_T, log_p_TK, coef_T, *saved = ctx.saved_tensors
        objective = with_teacher(call.objective, log_p_TK)
        terms, stored = load_terms(saved, objective.sums)
        rows = Rows(logits, labels_T, keep_T, call.vocab_start, call.softcap, inverse_T)
        by_logits = by_log_p = out = None
        with torch.no_grad():
            if stored and upstreams[0] is not None:
                by_logits, out = take_gradient(ctx, stored[0], upstreams[0])
            if by_logits is None and ctx.needs_input_grad[0]:
                if stored:
                    scale_T, target_T, *rest = stored[1:]
                    uniform_T, slope_T = (c_T if c_T.numel() else None for c_T in rest)
                    coefficients = Coefficients(scale_T, target_T, uniform_T, slope_T, factor=upstreams[0])
                else:
                    coefficients = objective.coefficients(torch, terms, row_upstreams(upstreams, coef_T, terms.s.dtype))
                    out = logits.detach() if call.overwrite else None
                by_logits = operators.row_grad(call.kernels, rows, terms, coefficients, out=out)
                by_logits = inplace.mark_overwritten(ctx, logits) if call.overwrite else by_logits
            if ctx.needs_input_grad[4]:
                (upstream_T,) = row_upstreams(upstreams, coef_T, terms.s.dtype)
                by_log_p = teacher_grad(objective, terms, upstream_T, keep_T)
        by_logits, by_log_p = (once_differentiable(x, logits, log_p_TK, *upstreams) for x in (by_logits, by_log_p))
        return by_logits, None, None, None, by_log_p, None, None
