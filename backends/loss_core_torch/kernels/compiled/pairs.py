"""Terms and gradients of pairs of rows in compiled loops; see `KernelSet`."""

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

    `Pairs.chunk_size` limits temporaries of [chunk_size, V]; there are none here.
    """

    def pair_terms(self, pairs: Pairs) -> PairTerms:
        """Terms of each pair of rows."""
        factor, parts = _factor(pairs), []
        for block, logits in matrices(pairs.student, pairs.teacher):
            parts.append(tuple(x_B[: block.num_rows] for x_B in run(formulas.pair_terms, *logits, factor)))
        return _concatenated(parts, pairs)

    def pair_mixture(self, pairs: Pairs, terms: PairTerms, beta: float) -> MixtureTerms:
        """Sums of both distributions against their mixture."""
        dtype = compute_dtype(pairs.student.dtype)
        result = MixtureTerms(*(torch.zeros_like(terms.s_t, dtype=dtype) for _ in range(2)))
        scalars = [_factor(pairs), *_log_shares(beta, terms)]
        for block, logits in matrices(pairs.student, pairs.teacher):
            args = [*logits, *scalars, *(padded_rows(x_T[block.rows].contiguous()) for x_T in terms)]
            for kl_T, part_B in zip(result, run(formulas.pair_mixture, *args), strict=True):
                kl_T[block.rows] = part_B[: block.num_rows]
        return result

    def pair_grad(self, pairs: Pairs, terms: PairTerms, wanted: PairCoefficients, out: Tensor | None = None) -> Tensor:
        """Gradient of the student's logits, p_s - p_t, or of the teacher's, p_t (log p_t - log p_s - KL).

        With beta: p (log(p / M) - KL) for either.
        """
        wanted, of_teacher = wanted.folded(), wanted.of_teacher
        like = pairs.teacher if of_teacher else pairs.student
        out = torch.empty(like.shape, dtype=like.dtype, device=like.device) if out is None else out
        program: Callable[..., None] = formulas.pair_teacher_grad if of_teacher else formulas.pair_student_grad
        scalars, keep_T = [_factor(pairs)], _keep(pairs)
        if wanted.beta:
            program = formulas.mixture_teacher_grad if of_teacher else formulas.mixture_student_grad
            scalars += _log_shares(wanted.beta, terms)
        per_row = (keep_T, *terms, wanted.kl_T, wanted.coef_T)
        for block, logits in matrices(pairs.student, pairs.teacher):
            args = [*logits, *scalars, *(padded_rows(x_T[block.rows].contiguous()) for x_T in per_row)]
            write(out, block, _is_aliased(out, pairs), partial(run, program, *args))
        return out

    def pair_terms_and_grad(self, pairs: Pairs, coef_T: Tensor, out: Tensor | None = None) -> tuple[PairTerms, Tensor]:
        """Terms, and the gradient of the sum of coef * KL with respect to the student's logits."""
        student = pairs.student
        out = torch.empty(student.shape, dtype=student.dtype, device=student.device) if out is None else out
        factor, keep_T, parts = _factor(pairs), _keep(pairs), []
        for block, logits in matrices(pairs.student, pairs.teacher):
            args = [*logits, factor, *(padded_rows(x_T[block.rows].contiguous()) for x_T in (keep_T, coef_T))]

            def program(grad_BV: Tensor, args: list[Tensor] = args) -> None:
                parts.append(run(formulas.pair_terms_and_grad, *args, grad_BV))

            write(out, block, _is_aliased(out, pairs), program)
            parts.append(tuple(x_B[: block.num_rows] for x_B in parts.pop()))
        return _concatenated(parts, pairs), out


def _is_aliased(out: Tensor, pairs: Pairs) -> bool:
    """Whether out is one of the logits from which the gradient is computed."""
    return out is pairs.student or out is pairs.teacher


def _factor(pairs: Pairs) -> Tensor:
    student = pairs.student
    return torch.tensor(pairs.inverse_temperature, dtype=compute_dtype(student.dtype), device=student.device)


def _log_shares(beta: float, terms: PairTerms) -> list[Tensor]:
    return [torch.tensor(share, dtype=terms.s_t.dtype, device=terms.s_t.device) for share in log_shares(beta)]


def _keep(pairs: Pairs) -> Tensor:
    if pairs.keep_T is not None:
        return pairs.keep_T
    return torch.ones(pairs.student.shape[:-1].numel(), dtype=torch.bool, device=pairs.student.device)


def _concatenated(parts: list[tuple[Tensor, ...]], pairs: Pairs) -> PairTerms:
    """Terms of all pairs, from those of the blocks; terms of an empty vocabulary if there is no block."""
    if parts:
        return PairTerms(*(parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))))
    shape, dtype, device = pairs.student.shape[:-1], compute_dtype(pairs.student.dtype), pairs.student.device
    return PairTerms(*(torch.full((shape.numel(),), value, dtype=dtype, device=device) for value in EMPTY_PAIR))
