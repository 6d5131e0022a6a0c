"""Distillation from K log-probabilities of a teacher as autograd functions."""

# T = tokens, N = tokens in products, K = classes of the teacher, V = vocabulary (of this rank), H = hidden

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from loss_core.row_terms import (
    RowTerms,
    Sums,
    TopK,
)
from loss_core_torch import operators
from loss_core_torch.autograd.base import LossFunction, check_upstream, gradient_of_sum, made_with_terms
from loss_core_torch.autograd.linear_source import (
    Given,
    Source,
    gathered,
    grads_from_terms,
    keep_for_backward,
    logits_once,
    put,
)
from loss_core_torch.kernels import KernelSet, Rows, Wanted
from loss_core_torch.parallel import collectives
from loss_core_torch.reduction import weighted_sum, zero_where_ignored
from loss_core_torch.second_derivative import once_differentiable


class Call(NamedTuple):
    """What a call is beside its tensors.

    Attributes:
        kernels: the set of kernels.
        tail: whether the other classes together are one more class.
        softcap: of the logits; 0 is off.
        vocab_start: first class of these logits.
        group: over which the vocabulary is sharded, or None.
        grad_in_forward: the student's gradient is made in the forward; only with coefficients, no group, no trace.
    """

    kernels: KernelSet
    tail: bool
    softcap: float = 0.0
    vocab_start: int = 0
    group: Any = None
    grad_in_forward: bool = False


class LinearCall(NamedTuple):
    """What a call over hidden states is beside its tensors.

    Attributes:
        kernels, tail: as in `Call`.
        source: where the logits come from.
        want: which gradients may be asked for.
    """

    kernels: KernelSet
    tail: bool
    source: Source
    want: Wanted


class TopKDistillation(LossFunction):
    """Divergence of each token from its teacher, or their sum with given coefficients; not times T^2.

    Inputs: logits [..., V] float; labels_TK [T, K] int64 over the whole vocabulary, ascending in each row; log_p_TK
    [T, K] of them, in the dtype of the arithmetic; keep_T [T] bool or None; inverse_T [T], inverse temperatures in that
    dtype, or None; coef_T [T] in that dtype, not differentiated, or None; the call.
    Output: with coef_T the scalar sum of coef * loss, else loss_T [T], 0 for ignored tokens; in the dtype of the
    arithmetic. Further outputs are what waits for the backward. See `CrossEntropy` on a second backward.
    """

    @staticmethod
    def forward(
        logits: Tensor,
        labels_TK: Tensor,
        log_p_TK: Tensor,
        keep_T: Tensor | None,
        inverse_T: Tensor | None,
        coef_T: Tensor | None,
        call: Call,
    ) -> tuple[Tensor, ...]:
        rows, teacher = _rows(logits, labels_TK, keep_T, inverse_T, call), TopK(log_p_TK, call.tail)
        made: list[Tensor] = []
        if call.grad_in_forward:
            assert coef_T is not None
            terms, made = made_with_terms(call.kernels, rows, coef_T, teacher)
        else:
            terms = operators.row_terms(call.kernels, rows, Sums())
        if call.group is not None:
            terms = collectives.fold(terms, call.group)
        loss_T = zero_where_ignored(teacher.values(torch, terms)[0], keep_T)
        return loss_T if coef_T is None else weighted_sum(coef_T, loss_T), *terms[:3], *made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        upstream, call = grads[0], ctx.call
        check_upstream(upstream)
        logits, labels_TK, log_p_TK, keep_T, inverse_T, coef_T, *rest = ctx.saved_tensors
        terms, made, teacher = RowTerms(*rest[:3]), rest[3:], TopK(log_p_TK, call.tail)
        rows = _rows(logits, labels_TK, keep_T, inverse_T, call)
        with torch.no_grad():
            upstream_T = upstream.to(terms.s.dtype)
            upstream_T = upstream_T.expand(terms.s.shape) if coef_T is None else coef_T * upstream_T
            by_logits = None
            if made:
                by_logits = gradient_of_sum(ctx, call.kernels, rows, terms, made, upstream)
            elif ctx.needs_input_grad[0]:
                coefficients = teacher.coefficients(torch, terms, [upstream_T])
                by_logits = operators.row_grad(call.kernels, rows, terms, coefficients, None)
            by_log_p = teacher_grad(terms, teacher, upstream_T, keep_T) if ctx.needs_input_grad[2] else None
        refusing = (once_differentiable(x, logits, log_p_TK, upstream) for x in (by_logits, by_log_p))
        by_logits, by_log_p = refusing
        return by_logits, None, by_log_p, None, None, None, None


class LinearTopKDistillation(Function):
    """Divergence of each token of softcap(hidden @ W.T + b) from its teacher, not times T^2, without the logits.

    Inputs: as of `LinearCrossEntropy`, with labels_TK and log_p_TK as of `TopKDistillation` in place of the labels, and
    inverse_T [T] or None in place of the coefficients. Output: loss_T [T], 0 for ignored tokens, in the dtype of the
    arithmetic. Further outputs are what waits for the backward, which makes the logits again: four products in all.
    """

    @staticmethod
    def forward(
        hidden: Tensor,
        w_VH: Tensor,
        bias_V: Tensor | None,
        labels_TK: Tensor,
        log_p_TK: Tensor,
        keep_T: Tensor | None,
        places_N: Tensor | None,
        inverse_T: Tensor | None,
        call: LinearCall,
    ) -> tuple[Tensor, ...]:
        whole = gathered(hidden, call.source)
        given = Given(whole, w_VH, bias_V, labels_TK, keep_T, places_N, inverse_T)
        keep_logits = call.source.group is not None and any(call.want)
        terms, logits = operators.linear_terms(call.kernels, given.linear(call.source), Sums(), keep_logits)
        if call.source.group is not None:
            terms = collectives.fold(terms, call.source.group)
        loss_T = given.of_tokens(TopK(given.of_rows(log_p_TK), call.tail).values(torch, terms)[0])
        return loss_T, *terms[:3], logits, *([] if whole is hidden else [whole])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        keep_for_backward(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        upstream, call = grads[0], ctx.call
        check_upstream(upstream)
        whole, w_VH, bias_V, labels_TK, log_p_TK, keep_T, places_N, inverse_T, *saved, logits = ctx.saved_tensors
        given = Given(whole, w_VH, bias_V, labels_TK, keep_T, places_N, inverse_T)
        want, terms = Wanted(*ctx.needs_input_grad[:3]), RowTerms(*saved)
        with torch.no_grad():
            upstream_N, teacher = given.of_rows(upstream.to(terms.s.dtype)), TopK(given.of_rows(log_p_TK), call.tail)
            coefficients = teacher.coefficients(torch, terms, [upstream_N])
            by_inputs = grads_from_terms(ctx, given, want, terms, coefficients, logits_once(ctx, logits))
            by_log_p = None
            if ctx.needs_input_grad[4]:
                of_rows = teacher_grad(terms, teacher, upstream_N, keep_T if places_N is None else None)
                by_log_p = put(of_rows, places_N, len(labels_TK))
        sources = (whole, w_VH, bias_V, log_p_TK, upstream)
        *refusing, by_log_p = (once_differentiable(x, *sources) for x in (*by_inputs, by_log_p))
        return *refusing, None, by_log_p, None, None, None, None


def teacher_grad(terms: RowTerms, teacher: TopK, upstream_T: Tensor, keep_T: Tensor | None) -> Tensor:
    """The gradient by the teacher's log-probabilities, [T, K]; 0 in ignored rows."""
    grad_TK = teacher.teacher_gradient(torch, terms) * upstream_T[:, None]
    return grad_TK if keep_T is None else grad_TK.masked_fill(~keep_T[:, None], 0.0)


def _rows(logits: Tensor, labels_TK: Tensor, keep_T: Tensor | None, inverse_T: Tensor | None, call: Call) -> Rows:
    return Rows(logits, labels_TK, keep_T, call.vocab_start, call.softcap, inverse_T)
