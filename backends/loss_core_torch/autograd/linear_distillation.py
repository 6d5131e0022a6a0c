"""Divergence of a student's head from a teacher's as an autograd function, without the logits of either.

Over a full vocabulary, with a coefficient for each token, the forward computes loss and gradients from each block of
logits: one product for the logits of each head, and one for each wanted gradient. Otherwise the backward recomputes the
logits. Over a group: one all-gather of the pair terms in the forward, and one of the mixture terms with beta; for each
gradient of hidden states the collective of `linear_rows`.
"""

# T = tokens, N = tokens in products, V = vocabulary of this rank, H = hidden

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loss_core.row_terms import PairTerms
from loss_core_torch import operators
from loss_core_torch.autograd.base import Function, check_upstream, row_upstreams, save_context
from loss_core_torch.autograd.linear_source import HeadInputs, Source, input_grads, scale_grads, unsharded
from loss_core_torch.kernels import BothGrads, BothWanted, KernelSet, LinearPairs, Wanted
from loss_core_torch.kernels.linear_pairs import both_coefficients, divergence
from loss_core_torch.parallel import collectives
from loss_core_torch.reduction import weighted_sum
from loss_core_torch.second_derivative import once_differentiable


class Call(NamedTuple):
    """The arguments of a call that are not tensors.

    Attributes:
        kernels: the kernel set.
        temperature: divides both logits.
        beta: as in `distillation.Call`.
        want: which gradients the backward may need.
        sources: how the logits of student and teacher are computed.
    """

    kernels: KernelSet
    temperature: float
    beta: float
    want: BothWanted
    sources: Sequence[Source]


class LinearDistillation(Function):
    """Divergence of each token, or their sum weighted by coefficients; not times T^2. See `Distillation`.

    Inputs: hidden states [..., H] and weight [V, H] of the student, then of the teacher; float. keep_T, indices_N and
    coef_T as in `LinearRowLoss`; the call. Output: likewise. The outputs after it are saved for the backward.
    """

    @staticmethod
    def forward(
        student: Tensor,
        student_VH: Tensor,
        teacher: Tensor,
        teacher_VH: Tensor,
        keep_T: Tensor | None,
        indices_N: Tensor | None,
        coef_T: Tensor | None,
        call: Call,
    ) -> tuple[Tensor, ...]:
        full = [unsharded(x, source) for x, source in zip((student, teacher), call.sources, strict=True)]
        both = both_inputs(full[0], student_VH, full[1], teacher_VH, keep_T, indices_N)
        linear = linear_pairs(both, call.sources, call.temperature)
        rest: tuple[Tensor, ...]
        if coef_T is not None:
            coef_N = both[0].gather(coef_T) / call.temperature
            loss_N, stored = operators.linear_pair_loss_and_grads(call.kernels, linear, coef_N, call.beta, call.want)
            rest = (*stored.student, *stored.teacher)
        else:
            group = call.sources[0].group
            terms, mixture = collectives.fold(operators.linear_pair_terms(call.kernels, linear), group), None
            if call.beta:
                own = operators.linear_pair_mixture(call.kernels, linear, terms, call.beta)
                mixture = collectives.fold_mixture(own, group)
            loss_N, divergences = divergence(terms, mixture, call.beta)
            rest = (*terms, *divergences)
        loss_T = both[0].scatter_valid(loss_N)
        result = loss_T.clone() if coef_T is None else weighted_sum(coef_T, loss_T)
        gathered = [x for x, hidden in zip(full, (student, teacher), strict=True) if x is not hidden]
        return result, loss_T, *gathered, *rest

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        student, student_VH, teacher, teacher_VH, *of_tokens, ctx.call = inputs
        ctx.like = [(hidden.shape, hidden.dtype) for hidden in (student, teacher)]
        loss_T, *rest = output[1:]
        full = [
            hidden if source.sequence_dim is None else rest.pop(0)
            for hidden, source in zip((student, teacher), ctx.call.sources, strict=True)
        ]
        save_context(ctx, [full[0], student_VH, full[1], teacher_VH, *of_tokens, loss_T, *rest], output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        upstream, call = grads[0], ctx.call
        check_upstream(upstream)
        tensors = ctx.saved_tensors
        both, (coef_T, loss_T, *rest) = both_inputs(*tensors[:6]), tensors[6:]
        want = BothWanted(Wanted(*ctx.needs_input_grad[:2]), Wanted(*ctx.needs_input_grad[2:4]))
        is_first, ctx.consumed = not ctx.consumed, True
        with torch.no_grad():
            if coef_T is not None and is_first:
                coef_N = both[0].gather(coef_T)
                stored = zip((rest[:3], rest[3:]), both, strict=True)
                found = BothGrads(*(scale_grads(call.kernels, x, upstream, coef_N, of.w_VH.dtype) for x, of in stored))
            else:
                (upstream_T,) = row_upstreams([upstream], coef_T, loss_T.dtype)
                upstream_N = both[0].gather(upstream_T) / call.temperature
                linear = linear_pairs(both, call.sources, call.temperature)
                if coef_T is not None:
                    _, found = operators.linear_pair_loss_and_grads(call.kernels, linear, upstream_N, call.beta, want)
                else:
                    wanted = both_coefficients(rest[5:], upstream_N, call.beta)
                    found = operators.linear_pair_grads(call.kernels, linear, PairTerms(*rest[:5]), *wanted, want)
            by_inputs: list[Tensor | None] = []
            for side, source in enumerate(call.sources):
                by_inputs += input_grads(found[side], want[side], both[side], ctx.like[side], source)[:2]
            by_coef = loss_T * upstream if coef_T is not None and ctx.needs_input_grad[6] else None
        sources = (*tensors[:4], coef_T, upstream)
        refusing = (once_differentiable(x, *sources) for x in by_inputs)
        return *refusing, None, None, once_differentiable(by_coef, *sources), None


def both_inputs(
    student: Tensor, student_VH: Tensor, teacher: Tensor, teacher_VH: Tensor, *tokens: Tensor | None
) -> tuple[HeadInputs, HeadInputs]:
    """The tensors of student and teacher, with the same keep_T and indices_N."""
    return HeadInputs(student, student_VH, None, *tokens), HeadInputs(teacher, teacher_VH, None, *tokens)


def linear_pairs(both: tuple[HeadInputs, HeadInputs], sources: Sequence[Source], temperature: float) -> LinearPairs:
    """The operands of student and teacher."""
    student, teacher = (inputs.head(source) for inputs, source in zip(both, sources, strict=True))
    return LinearPairs(student, teacher, both[0].keep_rows, 1.0 / temperature)
