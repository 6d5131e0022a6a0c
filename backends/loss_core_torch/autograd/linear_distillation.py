"""Divergence of a student's head from a teacher's as an autograd function, without the logits of either.

Over a whole vocabulary, with a coefficient for each token, the forward makes loss and gradients while a block's logits
are at hand: one product for the logits of each head, and one for each gradient that is wanted. Otherwise the backward
computes the logits again. Over a group: an all-gather of the terms of pairs in the forward, another one of their sums
against a mixture; for each gradient of hidden states what `linear_rows` has.
"""

# T = tokens, N = tokens in products, V = vocabulary of this rank, H = hidden

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loss_core.row_terms import PairTerms
from loss_core_torch import operators
from loss_core_torch.autograd.base import Function, check_upstream, keep, of_values
from loss_core_torch.autograd.linear_source import Given, Source, gathered, input_grads, scaled
from loss_core_torch.kernels import BothGrads, BothWanted, KernelSet, LinearPairs, Wanted
from loss_core_torch.kernels.linear_pairs import both_coefficients, divergence
from loss_core_torch.parallel import collectives
from loss_core_torch.reduction import weighted_sum
from loss_core_torch.second_derivative import once_differentiable


class Call(NamedTuple):
    """What a call is beside its tensors.

    Attributes:
        kernels: the set of kernels.
        temperature: divides both logits.
        beta: as in `distillation.Call`.
        want: which gradients may be asked for.
        sources: where the logits of student and teacher come from.
    """

    kernels: KernelSet
    temperature: float
    beta: float
    want: BothWanted
    sources: Sequence[Source]


class LinearDistillation(Function):
    """Divergence of each token, or their sum with given coefficients; not times T^2. See `Distillation`.

    Inputs: hidden states [..., H] and weight [V, H] of the student, then of the teacher; float. keep_T, places_N and
    coef_T as of `LinearRowLoss`; the call. Output: likewise. Further outputs are what waits for the backward.
    """

    @staticmethod
    def forward(
        student: Tensor,
        student_VH: Tensor,
        teacher: Tensor,
        teacher_VH: Tensor,
        keep_T: Tensor | None,
        places_N: Tensor | None,
        coef_T: Tensor | None,
        call: Call,
    ) -> tuple[Tensor, ...]:
        whole = [gathered(hidden, source) for hidden, source in zip((student, teacher), call.sources, strict=True)]
        both = both_given(whole[0], student_VH, whole[1], teacher_VH, keep_T, places_N)
        linear = linear_pairs(both, call.sources, call.temperature)
        rest: tuple[Tensor, ...]
        if coef_T is not None:
            coef_N = both[0].of_rows(coef_T) / call.temperature
            loss_N, made = operators.linear_pair_loss_and_grads(call.kernels, linear, coef_N, call.beta, call.want)
            rest = (*made.student, *made.teacher)
        else:
            group = call.sources[0].group
            terms, mixture = collectives.fold(operators.linear_pair_terms(call.kernels, linear), group), None
            if call.beta:
                own = operators.linear_pair_mixture(call.kernels, linear, terms, call.beta)
                mixture = collectives.added(own, group)
            loss_N, divergences = divergence(terms, mixture, call.beta)
            rest = (*terms, *divergences)
        loss_T = both[0].of_tokens(loss_N)
        result = loss_T.clone() if coef_T is None else weighted_sum(coef_T, loss_T)
        gathered_now = [x for x, hidden in zip(whole, (student, teacher), strict=True) if x is not hidden]
        return result, loss_T, *gathered_now, *rest

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        student, student_VH, teacher, teacher_VH, *numbers, ctx.call = inputs
        ctx.like = [(hidden.shape, hidden.dtype) for hidden in (student, teacher)]
        loss_T, *rest = output[1:]
        whole = [
            hidden if source.sequence_dim is None else rest.pop(0)
            for hidden, source in zip((student, teacher), ctx.call.sources, strict=True)
        ]
        keep(ctx, [whole[0], student_VH, whole[1], teacher_VH, *numbers, loss_T, *rest], output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        upstream, call = grads[0], ctx.call
        check_upstream(upstream)
        tensors = ctx.saved_tensors
        both, (coef_T, loss_T, *rest) = both_given(*tensors[:6]), tensors[6:]
        want = BothWanted(Wanted(*ctx.needs_input_grad[:2]), Wanted(*ctx.needs_input_grad[2:4]))
        fresh, ctx.spent = not ctx.spent, True
        with torch.no_grad():
            if coef_T is not None and fresh:
                coef_N = both[0].of_rows(coef_T)
                made = zip((rest[:3], rest[3:]), both, strict=True)
                found = BothGrads(*(scaled(call.kernels, x, upstream, coef_N, given.w_VH.dtype) for x, given in made))
            else:
                (upstream_T,) = of_values([upstream], coef_T, loss_T.dtype)
                upstream_N = both[0].of_rows(upstream_T) / call.temperature
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


def both_given(
    student: Tensor, student_VH: Tensor, teacher: Tensor, teacher_VH: Tensor, *tokens: Tensor | None
) -> tuple[Given, Given]:
    """The tensors of student and teacher, with the same keep_T and places_N."""
    return Given(student, student_VH, None, *tokens), Given(teacher, teacher_VH, None, *tokens)


def linear_pairs(both: tuple[Given, Given], sources: Sequence[Source], temperature: float) -> LinearPairs:
    """The operands of student and teacher."""
    student, teacher = (given.head(source) for given, source in zip(both, sources, strict=True))
    return LinearPairs(student, teacher, both[0].keep_rows, 1.0 / temperature)
