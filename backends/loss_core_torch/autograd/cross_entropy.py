"""Cross entropy over logits as an autograd function."""

# T = tokens, V = vocabulary (of this rank)

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from loss_core.row_terms import CrossEntropy, RowTerms, token_metrics
from loss_core_torch import inplace, operators
from loss_core_torch.autograd.base import LossFunction, check_upstream, gradient_of_sum, made_with_terms
from loss_core_torch.kernels import KernelSet, Rows
from loss_core_torch.parallel import collectives
from loss_core_torch.reduction import weighted_sum, zero_where_ignored
from loss_core_torch.second_derivative import once_differentiable


class Call(NamedTuple):
    """What a call is beside its tensors.

    Attributes:
        kernels: the set of kernels.
        objective: which cross entropy.
        softcap: of the logits; 0 is off.
        vocab_start: first class of these logits.
        group: over which the vocabulary is sharded, or None.
        overwrite: the backward writes over the logits.
        grad_in_forward: the gradient is made in the forward; only with coefficients, no group, no overwrite, no trace.
        metrics: names of `row_terms.token_metrics`.
    """

    kernels: KernelSet
    objective: CrossEntropy
    softcap: float = 0.0
    vocab_start: int = 0
    group: Any = None
    overwrite: bool = False
    grad_in_forward: bool = False
    metrics: tuple[str, ...] = ()


class CrossEntropyFunction(LossFunction):
    """Cross entropy of each token, or their sum with given coefficients.

    Inputs: logits [..., V] float; labels_T [T] int64 over the whole vocabulary; keep_T [T] bool or None; coef_T [T] in
    the dtype of the arithmetic, not differentiated, or None; the call.
    Output: with coef_T the scalar sum of coef * loss, else loss_T [T], 0 for ignored tokens; in the dtype of the
    arithmetic. Further outputs are what waits for the backward; the last ones are metrics [T], 0 for ignored tokens.

    A gradient that was made in the forward is handed on by the first backward, in its own memory; another backward
    (retain_graph) computes it again.
    """

    @staticmethod
    def forward(
        logits: Tensor, labels_T: Tensor, keep_T: Tensor | None, coef_T: Tensor | None, call: Call
    ) -> tuple[Tensor, ...]:
        rows = Rows(logits, labels_T, keep_T, call.vocab_start, call.softcap)
        made: list[Tensor] = []
        if call.grad_in_forward:
            assert coef_T is not None
            terms, made = made_with_terms(call.kernels, rows, coef_T, call.objective)
        else:
            terms = operators.row_terms(call.kernels, rows, call.objective.sums)
        if call.group is not None:
            terms = collectives.fold(terms, call.group)
        loss_T = call.objective.values(torch, terms)[0]
        result = zero_where_ignored(loss_T, keep_T) if coef_T is None else weighted_sum(coef_T, loss_T)
        metrics = token_metrics(torch, terms, call.objective, call.metrics)
        return result, *terms[:3], *made, *(zero_where_ignored(x_T, keep_T) for x_T in metrics)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        upstream, call = grads[0], ctx.call
        inplace.claim(ctx)
        check_upstream(upstream)
        logits, labels_T, keep_T, coef_T, m_T, s_T, t_T, *rest = ctx.saved_tensors
        made, terms = rest[: len(rest) - len(call.metrics)], RowTerms(m_T, s_T, t_T)
        rows = Rows(logits, labels_T, keep_T, call.vocab_start, call.softcap)
        with torch.no_grad():
            if made:
                grad = gradient_of_sum(ctx, call.kernels, rows, terms, made, upstream)
            else:
                upstream_T = upstream.to(m_T.dtype) if coef_T is None else coef_T * upstream.to(m_T.dtype)
                coefficients = call.objective.coefficients(torch, terms, [upstream_T])
                out = logits.detach() if call.overwrite else None
                grad = operators.row_grad(call.kernels, rows, terms, coefficients, None, out=out)
                grad = inplace.overwritten(ctx, logits) if call.overwrite else grad
        return once_differentiable(grad, logits, upstream), None, None, None, None
