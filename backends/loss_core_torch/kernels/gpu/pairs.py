"""Pairs of rows, student and teacher: their terms, their gradients, and both in one kernel; see `KernelSet`.

There are no temporaries of [chunk_size, V], so that any chunk size is kept to.
"""

# T = tokens (rows), V = vocabulary (of this rank)

from __future__ import annotations

import torch
from torch import Tensor

from loss_core.row_terms import EMPTY_PAIR, MixtureTerms, PairTerms, log_shares
from loss_core_torch.kernels import PairCoefficients, Pairs
from loss_core_torch.kernels.gpu import kernels
from loss_core_torch.kernels.gpu.launch import Launcher, columns, dense, layout, pieces, untold
from loss_core_torch.tracing import compute_dtype


class PairKernels:
    """The methods of a `KernelSet` that take pairs of rows."""

    _launcher: Launcher

    def pair_terms(self, pairs: Pairs) -> PairTerms:
        """Terms of each pair of rows; of an ignored one those of an empty piece. See `KernelSet.pair_terms`."""
        student, teacher, keep_T = pairs.student, pairs.teacher, pairs.keep_T
        num_rows, vocab = student.shape[:-1].numel(), student.shape[-1]
        found = _new_terms(pairs)
        if student.numel() == 0:
            # The identity of `row_terms.combine_pairs`.
            for term_T, value in zip(found, EMPTY_PAIR, strict=True):
                term_T.fill_(value)
            return found
        size = self._launcher.parameters(vocab, student.dtype, "pair_terms")
        self._launcher.start(
            kernels.pair_terms_kernel, (num_rows,), student, teacher, dense(keep_T), *found, pairs.inverse_temperature,
            vocab, layout(student), layout(teacher), size=size, **columns(size, student, teacher),
        )  # fmt: skip
        return found

    def pair_mixture(self, pairs: Pairs, terms: PairTerms, beta: float) -> MixtureTerms:
        """Sums of each pair of rows against their mixture; see `KernelSet.pair_mixture`."""
        student, teacher, keep_T = pairs.student, pairs.teacher, pairs.keep_T
        num_rows, vocab = student.shape[:-1].numel(), student.shape[-1]
        if student.numel() == 0:
            return MixtureTerms(torch.zeros_like(terms.s_t), torch.zeros_like(terms.s_s))
        found = MixtureTerms(torch.empty_like(terms.s_t), torch.empty_like(terms.s_s))
        size = self._launcher.parameters(vocab, student.dtype, "pair_mixture")
        vectors = map(dense, (terms.m_t, terms.s_t, terms.m_s, terms.s_s))
        self._launcher.start(
            kernels.pair_mixture_kernel, (num_rows,), student, teacher, dense(keep_T), *vectors, *found,
            pairs.inverse_temperature, *log_shares(beta), vocab, layout(student), layout(teacher),
            size=size, **columns(size, student, teacher),
        )  # fmt: skip
        return found

    def pair_grad(self, pairs: Pairs, terms: PairTerms, wanted: PairCoefficients, out: Tensor | None = None) -> Tensor:
        """The gradient by the student's logits, or by the teacher's; see `KernelSet.pair_grad`."""
        student, teacher, keep_T = pairs.student, pairs.teacher, pairs.keep_T
        num_rows, vocab = student.shape[:-1].numel(), student.shape[-1]
        held = wanted.factor is not None and out is not None
        out = _new_grad(teacher if wanted.of_teacher else student) if out is None else out
        if student.numel() == 0:
            return out
        size = self._launcher.parameters(vocab, student.dtype, "pair_grad", out.dtype)
        vectors = map(dense, (terms.m_t, terms.s_t, terms.m_s, terms.s_s, wanted.kl_T, wanted.coef_T))
        shares = log_shares(wanted.beta) if wanted.beta else (0.0, 0.0)
        self._launcher.start(
            kernels.pair_grad_kernel, (num_rows,), out, student, teacher, dense(keep_T), *vectors, wanted.factor,
            pairs.inverse_temperature, *shares, vocab, layout(out), layout(student), layout(teacher), size=size,
            OF_TEACHER=wanted.of_teacher, MIXTURE=wanted.beta != 0, HELD=held, **columns(size, out, student, teacher),
        )  # fmt: skip
        return out

    def pair_terms_and_grad(self, pairs: Pairs, coef_T: Tensor, out: Tensor | None = None) -> tuple[PairTerms, Tensor]:
        """Terms and the student's gradient, as of rows; see `KernelSet.pair_terms_and_grad`."""
        student, teacher, keep_T = pairs.student, pairs.teacher, pairs.keep_T
        num_rows, vocab = student.shape[:-1].numel(), student.shape[-1]
        out = _new_grad(student) if out is None else out
        if student.numel() == 0:
            return self.pair_terms(pairs), out
        found = _new_terms(pairs)
        size = self._launcher.parameters(vocab, student.dtype, "pair_row", out.dtype)
        programs = size.pieces(vocab)
        self._launcher.start(
            kernels.pair_kernel, (num_rows * programs,), out, student, teacher, dense(keep_T), dense(coef_T), *found,
            untold(num_rows, programs, found.m_t), pairs.inverse_temperature, vocab, layout(out), layout(student),
            layout(teacher), size=size, **pieces(size, vocab), **columns(size, out, student, teacher),
        )  # fmt: skip
        return found, out


def _new_terms(pairs: Pairs) -> PairTerms:
    student = pairs.student
    shape, dtype = (student.shape[:-1].numel(),), compute_dtype(student.dtype)
    m_t, s_t, a, m_s, s_s = (torch.empty(shape, dtype=dtype, device=student.device) for _ in range(5))
    return PairTerms(m_t, s_t, a, m_s, s_s)


def _new_grad(logits: Tensor) -> Tensor:
    # Not empty_like, which would keep the strides.
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
