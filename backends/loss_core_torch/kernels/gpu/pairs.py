"""The methods of `KernelSet` for pairs of rows, student and teacher: terms, gradients, and both in one kernel.

There are no temporaries of [chunk_size, V], so any chunk size is respected.
"""

# T = tokens (rows), V = vocabulary (of this rank)

from __future__ import annotations

import torch
from torch import Tensor

from loss_core.row_terms import EMPTY_PAIR, MixtureTerms, PairTerms, log_shares
from loss_core_torch.kernels import PairCoefficients, Pairs
from loss_core_torch.kernels.gpu import kernels
from loss_core_torch.kernels.gpu.launch import (
    Launcher,
    column_constants,
    contiguous,
    layout,
    new_grad,
    new_partials,
    piece_constants,
)
from loss_core_torch.tracing import compute_dtype


class PairKernels:
    """The methods of `KernelSet` that take pairs of rows."""

    _launcher: Launcher

    def pair_terms(self, pairs: Pairs) -> PairTerms:
        """Terms of each pair of rows, those of an empty piece for an ignored pair; see `KernelSet.pair_terms`."""
        student, teacher, keep_T = pairs.student, pairs.teacher, pairs.keep_T
        num_rows, vocab = student.shape[:-1].numel(), student.shape[-1]
        terms = _new_terms(pairs)
        if student.numel() == 0:
            # The identity of `row_terms.combine_pairs`.
            for term_T, value in zip(terms, EMPTY_PAIR, strict=True):
                term_T.fill_(value)
            return terms
        size = self._launcher.parameters(vocab, student.dtype, "pair_terms")
        self._launcher.launch(
            kernels.pair_terms_kernel, (num_rows,), student, teacher, contiguous(keep_T), *terms,
            pairs.inverse_temperature, vocab, layout(student), layout(teacher), size=size,
            **column_constants(size, student, teacher),
        )  # fmt: skip
        return terms

    def pair_mixture(self, pairs: Pairs, terms: PairTerms, beta: float) -> MixtureTerms:
        """Sums of each pair of rows against their mixture; see `KernelSet.pair_mixture`."""
        student, teacher, keep_T = pairs.student, pairs.teacher, pairs.keep_T
        num_rows, vocab = student.shape[:-1].numel(), student.shape[-1]
        if student.numel() == 0:
            return MixtureTerms(torch.zeros_like(terms.s_t), torch.zeros_like(terms.s_s))
        mixture = MixtureTerms(torch.empty_like(terms.s_t), torch.empty_like(terms.s_s))
        size = self._launcher.parameters(vocab, student.dtype, "pair_mixture")
        vectors = map(contiguous, (terms.m_t, terms.s_t, terms.m_s, terms.s_s))
        self._launcher.launch(
            kernels.pair_mixture_kernel, (num_rows,), student, teacher, contiguous(keep_T), *vectors, *mixture,
            pairs.inverse_temperature, *log_shares(beta), vocab, layout(student), layout(teacher),
            size=size, **column_constants(size, student, teacher),
        )  # fmt: skip
        return mixture

    def pair_grad(self, pairs: Pairs, terms: PairTerms, wanted: PairCoefficients, out: Tensor | None = None) -> Tensor:
        """The gradient by the student's logits, or by the teacher's; see `KernelSet.pair_grad`."""
        student, teacher, keep_T = pairs.student, pairs.teacher, pairs.keep_T
        num_rows, vocab = student.shape[:-1].numel(), student.shape[-1]
        prefilled = wanted.factor is not None and out is not None
        out = new_grad(teacher if wanted.of_teacher else student) if out is None else out
        if student.numel() == 0:
            return out
        size = self._launcher.parameters(vocab, student.dtype, "pair_grad", out.dtype)
        vectors = map(contiguous, (terms.m_t, terms.s_t, terms.m_s, terms.s_s, wanted.kl_T, wanted.coef_T))
        shares = log_shares(wanted.beta) if wanted.beta else (0.0, 0.0)
        self._launcher.launch(
            kernels.pair_grad_kernel, (num_rows,), out, student, teacher, contiguous(keep_T), *vectors, wanted.factor,
            pairs.inverse_temperature, *shares, vocab, layout(out), layout(student), layout(teacher), size=size,
            OF_TEACHER=wanted.of_teacher, MIXTURE=wanted.beta != 0, PREFILLED=prefilled,
            **column_constants(size, out, student, teacher),
        )  # fmt: skip
        return out

    def pair_terms_and_grad(self, pairs: Pairs, coef_T: Tensor, out: Tensor | None = None) -> tuple[PairTerms, Tensor]:
        """Terms and the student's gradient, as for rows; see `KernelSet.pair_terms_and_grad`."""
        student, teacher, keep_T = pairs.student, pairs.teacher, pairs.keep_T
        num_rows, vocab = student.shape[:-1].numel(), student.shape[-1]
        out = new_grad(student) if out is None else out
        if student.numel() == 0:
            return self.pair_terms(pairs), out
        terms = _new_terms(pairs)
        size = self._launcher.parameters(vocab, student.dtype, "pair_row", out.dtype)
        num_pieces = size.num_pieces(vocab)
        self._launcher.launch(
            kernels.pair_kernel, (num_rows * num_pieces,), out, student, teacher, contiguous(keep_T),
            contiguous(coef_T), *terms, new_partials(num_rows, num_pieces, terms.m_t), pairs.inverse_temperature, vocab,
            layout(out), layout(student), layout(teacher), size=size, **piece_constants(size, vocab),
            **column_constants(size, out, student, teacher),
        )  # fmt: skip
        return terms, out


def _new_terms(pairs: Pairs) -> PairTerms:
    student = pairs.student
    shape, dtype = (student.shape[:-1].numel(),), compute_dtype(student.dtype)
    m_t, s_t, a, m_s, s_s = (torch.empty(shape, dtype=dtype, device=student.device) for _ in range(5))
    return PairTerms(m_t, s_t, a, m_s, s_s)
