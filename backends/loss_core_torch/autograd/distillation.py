"""Divergence of a student from a teacher as an autograd function."""

# T = tokens, V = vocabulary (of this rank)

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from loss_core.row_terms import PairTerms
from loss_core_torch import operators
from loss_core_torch.autograd.base import Function, check_upstream, save_context, take_gradient
from loss_core_torch.kernels import KernelSet, Pairs
from loss_core_torch.kernels.linear_pairs import both_coefficients, divergence
from loss_core_torch.parallel import collectives
from loss_core_torch.reduction import weighted_sum, zero_where_ignored
from loss_core_torch.second_derivative import once_differentiable


class Call(NamedTuple):
    """The arguments of a call that are not tensors.

    Attributes:
        kernels: the kernel set.
        temperature: divides both logits.
        chunk_size: maximum number of rows of a temporary; 0: the kernels choose.
        group: over which the vocabulary is sharded, or None.
        grad_in_forward: compute the student's gradient in the forward; requires coef_T, no group, no trace and no beta.
        beta: weight of the teacher in the mixture, in (0, 1), or 0 for KL(teacher || student).
    """

    kernels: KernelSet
    temperature: float
    chunk_size: int = 0
    group: Any = None
    grad_in_forward: bool = False
    beta: float = 0.0


class Distillation(Function):
    """Divergence of each token at a temperature, or their sum weighted by coefficients; not times T^2.

    KL(teacher || student), or with beta the generalized Jensen-Shannon divergence; see `KDLossConfig`.

    Inputs: student, teacher [..., V] float; keep_T [T] bool or None; coef_T [T] in the dtype of the arithmetic, not
    differentiated, or None; the call.
    Output: with coef_T the scalar sum of coef * loss, else loss_T [T], 0 for ignored tokens; in the dtype of the
    arithmetic. The outputs after it are saved for the backward. With grad_in_forward only the student's gradient is
    computed in the forward. See `RowLoss` on a second backward.
    """

    @staticmethod
    def forward(
        student: Tensor, teacher: Tensor, keep_T: Tensor | None, coef_T: Tensor | None, call: Call
    ) -> tuple[Tensor, ...]:
        pairs = Pairs(student, teacher, keep_T, 1.0 / call.temperature, call.chunk_size)
        stored: list[Tensor] = []
        if call.grad_in_forward:
            assert coef_T is not None
            terms, *stored = operators.pair_terms_and_grad(call.kernels, pairs, coef_T / call.temperature)
        else:
            terms = operators.pair_terms(call.kernels, pairs)
        terms, mixture = collectives.fold(terms, call.group), None
        if call.beta:
            own = operators.pair_mixture(call.kernels, pairs, terms, call.beta)
            mixture = collectives.fold_mixture(own, call.group)
        loss_T, divergences = divergence(terms, mixture, call.beta)
        loss_T = zero_where_ignored(loss_T, keep_T)
        result = loss_T.clone() if coef_T is None else weighted_sum(coef_T, loss_T)
        return result, *divergences, *terms, *stored

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.call = inputs
        save_context(ctx, [*tensors, *output[1:]], output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        upstream, call = grads[0], ctx.call
        check_upstream(upstream)
        student, teacher, keep_T, coef_T, *rest = ctx.saved_tensors
        first = 2 if call.beta else 1
        divergences, terms, stored = rest[:first], PairTerms(*rest[first : first + 5]), rest[first + 5 :]
        want_student, want_teacher = ctx.needs_input_grad[:2]
        found: list[Tensor | None] = [None, None]
        with torch.no_grad():
            # A sum has a scalar upstream gradient: one factor for all coefficients.
            coef_T, factor = (upstream.to(terms.s_t.dtype), None) if coef_T is None else (coef_T, upstream)
            of_student, of_teacher = both_coefficients(divergences, coef_T / call.temperature, call.beta)
            pairs = Pairs(student, teacher, keep_T, 1.0 / call.temperature, call.chunk_size)
            args = (call.kernels, pairs, terms)
            found[0], out = take_gradient(ctx, stored[0], upstream) if stored else (None, None)
            if found[0] is None and want_student:
                found[0] = operators.pair_grad(*args, of_student._replace(factor=factor), out=out)
            if want_teacher:
                found[1] = operators.pair_grad(*args, of_teacher._replace(factor=factor))
        return (*(once_differentiable(grad, student, teacher, upstream) for grad in found), None, None, None)
