"""Pairs of logits as compiled loops; see `KernelSet`."""

# T = tokens, B = rows of a block, V = vocabulary (of this rank)

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from loss_core.row_terms import EMPTY_PAIR, MixtureTerms, PairTerms, log_shares
from loss_core_torch.kernels import PairCoefficients, Pairs
from loss_core_torch.kernels.compiled import formulas
from loss_core_torch.kernels.compiled.matrices import matrices, padded_rows, write
from loss_core_torch.kernels.compiled.programs import run
from loss_core_torch.tracing import compute_dtype


class PairKernels:
    """The `pair_` methods of a `KernelSet`.

    `Pairs.chunk_size` bounds temporaries of [chunk_size, V]; there are none here, so that any value is kept to.
    """

    def pair_terms(self, pairs: Pairs) -> PairTerms:
        """Terms of each pair of rows."""
        factor, found = _factor(pairs), []
        for block, both in matrices(pairs.student, pairs.teacher):
            found.append(tuple(x_B[: block.length()] for x_B in run(formulas.pair_terms, *both, factor)))
        return _together(found, pairs)

    def pair_mixture(self, pairs: Pairs, terms: PairTerms, beta: float) -> MixtureTerms:
        """Sums of both distributions against their mixture."""
        dtype = compute_dtype(pairs.student.dtype)
        found = MixtureTerms(*(torch.zeros_like(terms.s_t, dtype=dtype) for _ in range(2)))
        numbers = [_factor(pairs), *_shares(beta, terms)]
        for block, both in matrices(pairs.student, pairs.teacher):
            args = [*both, *numbers, *(padded_rows(x_T[block.at].contiguous()) for x_T in terms)]
            for kl_T, part_B in zip(found, run(formulas.pair_mixture, *args), strict=True):
                kl_T[block.at] = part_B[: block.length()]
        return found

    def pair_grad(self, pairs: Pairs, terms: PairTerms, wanted: PairCoefficients, out: Tensor | None = None) -> Tensor:
        """Gradient by the student's logits, p_s - p_t, or by the teacher's, p_t (log p_t - log p_s - KL).

        With beta: p (log(p / M) - KL) of either.
        """
        wanted, of_teacher = wanted.folded(), wanted.of_teacher
        like = pairs.teacher if of_teacher else pairs.student
        out = torch.empty(like.shape, dtype=like.dtype, device=like.device) if out is None else out
        program: Callable[..., None] = formulas.pair_teacher_grad if of_teacher else formulas.pair_student_grad
        numbers, keep_T = [_factor(pairs)], _keep(pairs)
        if wanted.beta:
            program = formulas.mixture_teacher_grad if of_teacher else formulas.mixture_student_grad
            numbers += _shares(wanted.beta, terms)
        for block, both in matrices(pairs.student, pairs.teacher):
            rows = (keep_T, *terms, wanted.kl_T, wanted.coef_T)
            args = [*both, *numbers, *(padded_rows(x_T[block.at].contiguous()) for x_T in rows)]
            write(out, block, _is_read(out, pairs), partial(run, program, *args))
        return out

    def pair_terms_and_grad(self, pairs: Pairs, coef_T: Tensor, out: Tensor | None = None) -> tuple[PairTerms, Tensor]:
        """Terms, and the student's gradient of the sum of coef * KL."""
        student = pairs.student
        out = torch.empty(student.shape, dtype=student.dtype, device=student.device) if out is None else out
        factor, keep_T, found = _factor(pairs), _keep(pairs), []
        for block, both in matrices(pairs.student, pairs.teacher):
            args = [*both, factor, *(padded_rows(x_T[block.at].contiguous()) for x_T in (keep_T, coef_T))]

            def program(into_BV: Tensor, args: list[Tensor] = args) -> None:
                found.append(run(formulas.pair_terms_and_grad, *args, into_BV))

            write(out, block, _is_read(out, pairs), program)
            found.append(tuple(x_B[: block.length()] for x_B in found.pop()))
        return _together(found, pairs), out


def _is_read(out: Tensor, pairs: Pairs) -> bool:
    """Whether a gradient goes over the logits that it is made of."""
    return out is pairs.student or out is pairs.teacher


def _factor(pairs: Pairs) -> Tensor:
    student = pairs.student
    return torch.tensor(pairs.inverse_temperature, dtype=compute_dtype(student.dtype), device=student.device)


def _shares(beta: float, terms: PairTerms) -> list[Tensor]:
    return [torch.tensor(share, dtype=terms.s_t.dtype, device=terms.s_t.device) for share in log_shares(beta)]


def _keep(pairs: Pairs) -> Tensor:
    if pairs.keep_T is not None:
        return pairs.keep_T
    return torch.ones(pairs.student.shape[:-1].numel(), dtype=torch.bool, device=pairs.student.device)


def _together(parts: list[tuple[Tensor, ...]], pairs: Pairs) -> PairTerms:
    """Terms of all pairs from those of the blocks; of no class where there is no block."""
    if parts:
        return PairTerms(*(parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))))
    shape, dtype, device = pairs.student.shape[:-1], compute_dtype(pairs.student.dtype), pairs.student.device
    return PairTerms(*(torch.full((shape.numel(),), value, dtype=dtype, device=device) for value in EMPTY_PAIR))
