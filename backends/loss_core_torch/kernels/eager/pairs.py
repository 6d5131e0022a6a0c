"""Terms and gradients of pairs of rows, a student's and a teacher's, in PyTorch operations; see `KernelSet`.

Formulas are in `loss_core.row_terms`, blocks in `row_blocks`. Exponents of a block are binary logarithms where these
are accurate and finite, else natural ones: log2(e) times a mask value near the lowest finite number is infinite, which
would make a finite divergence infinite.
"""

# T = tokens, B = rows of a block, V = vocabulary (of this rank)

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loss_core.row_terms import (
    EMPTY_PAIR,
    GAP_UNIT,
    MixtureTerms,
    PairTerms,
    kl_centre,
    log_ratio_offset,
    log_shares,
    mixture_logs,
)
from loss_core_torch.kernels import PairCoefficients, Pairs
from loss_core_torch.kernels.eager.exponentials import log2_exp, remove_offset, row_dots, row_sums, shifted
from loss_core_torch.kernels.eager.row_blocks import Block, Buffer, blocks, zero_ignored
from loss_core_torch.kernels.eager.sizes import Sizes
from loss_core_torch.tracing import compute_dtype, is_readable

_LN_2 = math.log(2.0)

# Terms of an ignored pair, with a divergence of 0.
_IGNORED_PAIR = PairTerms(m_t=0.0, s_t=1.0, a=0.0, m_s=0.0, s_s=1.0)


class PairKernels:
    """The `pair_` methods of a `KernelSet`."""

    sizes: Sizes

    def pair_terms(self, pairs: Pairs) -> PairTerms:
        """Terms of each pair of rows."""
        terms, work = _initial_terms(pairs), _Workspace(pairs, self.sizes)
        for block in work.blocks():
            _write(terms, block, work.block_terms(block)[0])
        return terms

    def pair_terms_and_grad(self, pairs: Pairs, coef_T: Tensor, out: Tensor | None = None) -> tuple[PairTerms, Tensor]:
        """Terms, and the gradient of the sum of coef * KL with respect to the student's logits."""
        terms, work = _initial_terms(pairs), _Workspace(pairs, self.sizes)
        out = _initial_grad(pairs.student, pairs, out)
        for block in work.blocks():
            part, (e_s_BV, e_t_BV, sum_s_B, sum_t_B) = work.block_terms(block)
            _write(terms, block, part)
            coef_B = coef_T[block.rows]
            work.write_difference(block, out, e_s_BV, coef_B / sum_s_B, e_t_BV, coef_B / sum_t_B)
        return terms, out

    def pair_mixture(self, pairs: Pairs, terms: PairTerms, beta: float) -> MixtureTerms:
        """Sums of both distributions against their mixture."""
        dtype, work = compute_dtype(pairs.student.dtype), _Workspace(pairs, self.sizes)
        result = MixtureTerms(*(torch.zeros_like(terms.s_t, dtype=dtype) for _ in range(2)))
        for block in work.blocks():
            for kl_T, (e_BV, scale_B, log_BV) in zip(result, work.mixture(block, terms, beta), strict=True):
                kl_T[block.rows] = row_sums(log_BV.mul_(e_BV)) * scale_B
        return result

    def pair_grad(self, pairs: Pairs, terms: PairTerms, wanted: PairCoefficients, out: Tensor | None = None) -> Tensor:
        """Gradient of the student's logits, p_s - p_t, or of the teacher's, p_t (log p_t - log p_s - KL).

        With beta: p (log(p / M) - KL) for either.
        """
        wanted, of_teacher = wanted.folded(), wanted.of_teacher
        like = pairs.teacher if of_teacher else pairs.student
        out, work = _initial_grad(like, pairs, out), _Workspace(pairs, self.sizes)
        if wanted.beta:
            for block in work.blocks():
                e_BV, scale_B, log_BV = work.mixture(block, terms, wanted.beta)[0 if of_teacher else 1]
                excess_BV = log_BV.sub_(wanted.kl_T[block.rows][:, None])
                work.write(block, out, excess_BV.mul_(e_BV).mul_((scale_B * wanted.coef_T[block.rows])[:, None]))
            return out
        centre_T = kl_centre(torch, terms, wanted.kl_T)
        for block in work.blocks():
            part, coef_B = PairTerms(*(term[block.rows] for term in terms)), wanted.coef_T[block.rows]
            s, t = work.log2_exps(*work.logits(block), part.m_s, part.m_t)
            e_s_BV, e_t_BV = work.exponentials(s, t)
            scale_t_B = remove_offset(coef_B / part.s_t, t.offset_B)
            if of_teacher:
                gap_BV = work.natural_gap(block, part.m_s, part.m_t).sub_(centre_T[block.rows][:, None])
                work.write(block, out, gap_BV.masked_fill_(e_t_BV == 0, 0.0).mul_(e_t_BV).mul_(scale_t_B[:, None]))
            else:
                scale_s_B = remove_offset(coef_B / part.s_s, s.offset_B)
                work.write_difference(block, out, e_s_BV, scale_s_B, e_t_BV, scale_t_B)
        return out


class _Exponent(NamedTuple):
    """Binary logarithms y of a block, up to an offset n per row: exp(z / temperature - m) = 2^(y - n).

    Attributes:
        offset_B: n; None if it is 0 in all rows.
    """

    y_BV: Tensor
    offset_B: Tensor | None


class _Workspace:
    """The blocks of a call, with the buffers that they share."""

    def __init__(self, pairs: Pairs, sizes: Sizes) -> None:
        student, num_tokens = pairs.student, pairs.student.shape[:-1].numel()
        max_rows = pairs.chunk_size or sizes.block_rows(2 * student.shape[-1], student.device)
        self._pairs, self._block_rows = pairs, min(max_rows, max(num_tokens, 1))
        dtype = compute_dtype(student.dtype)
        self._s_buffer, self._t_buffer, self._gap_buffer = (Buffer(self._block_rows, student, dtype) for _ in range(3))

    def blocks(self) -> Iterator[Block]:
        return blocks(self._block_rows, self._pairs.keep_T, self._pairs.student, self._pairs.teacher)

    def logits(self, block: Block) -> tuple[Tensor, Tensor]:
        """Student's and teacher's logits of a block, in the dtype of the arithmetic."""
        s_BV, t_BV = block.read(self._pairs.student), block.read(self._pairs.teacher)
        return self._s_buffer.upcast(s_BV), self._t_buffer.upcast(t_BV)

    def maximum(self, z_BV: Tensor) -> Tensor:
        """m, the maximum of z / temperature in each row."""
        return z_BV.amax(-1).mul_(self._pairs.inverse_temperature)

    def log2_exps(self, s_BV: Tensor, t_BV: Tensor, m_s_B: Tensor, m_t_B: Tensor) -> tuple[_Exponent, _Exponent]:
        """Exponents of student and teacher, in their buffers."""
        factor, exponents = self._pairs.inverse_temperature, []
        for z_BV, m_B, buffer in ((s_BV, m_s_B, self._s_buffer), (t_BV, m_t_B, self._t_buffer)):
            y_BV = buffer.view_as(z_BV)
            exponents.append(_Exponent(y_BV, log2_exp(z_BV, factor, m_B, y_BV)))
        return exponents[0], exponents[1]

    def gap(self, t: _Exponent, s: _Exponent) -> Tensor:
        """y_t - y_s, in the gap buffer."""
        return torch.sub(t.y_BV, s.y_BV, out=self._gap_buffer.view_as(t.y_BV))

    def natural_gap(self, block: Block, m_s_B: Tensor, m_t_B: Tensor) -> Tensor:
        """(z_t / temperature - m_t) - (z_s / temperature - m_s), in the gap buffer."""
        factor = self._pairs.inverse_temperature
        s_BV, t_BV = (block.read(x) for x in (self._pairs.student, self._pairs.teacher))
        dtype = m_s_B.dtype
        gap_BV = shifted(t_BV.to(dtype), factor, m_t_B, self._gap_buffer.view_as(t_BV))
        return gap_BV.sub_(shifted(s_BV.to(dtype), factor, m_s_B, torch.empty_like(gap_BV)))

    def exponentials(self, s: _Exponent, t: _Exponent) -> tuple[Tensor, Tensor]:
        """2^y of student and teacher, in place."""
        return self._s_buffer.exp2_(s.y_BV), self._t_buffer.exp2_(t.y_BV)

    def block_terms(self, block: Block) -> tuple[PairTerms, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Terms of a block; and 2^y of student and teacher, in their buffers, with the sums of their rows."""
        s_BV, t_BV = self.logits(block)
        m_s_B, m_t_B = self.maximum(s_BV), self.maximum(t_BV)
        s, t = self.log2_exps(s_BV, t_BV, m_s_B, m_t_B)
        gap_BV = self.gap(t, s)
        e_s_BV, e_t_BV = self.exponentials(s, t)
        sum_s_B, sum_t_B = row_sums(e_s_BV), row_sums(e_t_BV)
        a_B = row_dots(e_t_BV, gap_BV)
        finite_B = torch.isfinite(a_B) if is_readable(a_B) else torch.zeros_like(a_B, dtype=torch.bool)
        a_B += sum_t_B * ((0.0 if s.offset_B is None else s.offset_B) - (0.0 if t.offset_B is None else t.offset_B))
        a_B *= _LN_2 / GAP_UNIT
        if not (is_readable(a_B) and bool(finite_B.all())):
            gap_BV = self.natural_gap(block, m_s_B, m_t_B)
            # A class of probability 0 adds 0, even if its gap is inf or NaN.
            natural_B = row_sums(gap_BV.masked_fill_(e_t_BV == 0, 0.0).mul_(1.0 / GAP_UNIT).mul_(e_t_BV))
            # Chosen for each row by its own sum: the rounding of a row must not depend on the other rows.
            a_B = torch.where(finite_B, a_B, natural_B)
        s_s_B, s_t_B = remove_offset(sum_s_B, s.offset_B), remove_offset(sum_t_B, t.offset_B)
        terms = PairTerms(m_t_B, s_t_B, remove_offset(a_B, t.offset_B), m_s_B, s_s_B)
        return terms, (e_s_BV, e_t_BV, sum_s_B, sum_t_B)

    def mixture(
        self, block: Block, terms: PairTerms, beta: float
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """For teacher and student: e [B, V], scale [B] with p = e * scale, and log(p / M) [B, V], 0 where p is 0."""
        part = PairTerms(*(term[block.rows] for term in terms))
        gap_BV = self.natural_gap(block, part.m_s, part.m_t)
        ratio_BV = gap_BV.sub_(log_ratio_offset(torch, part)[:, None])
        log_t_BV, log_s_BV = mixture_logs(torch, ratio_BV, *log_shares(beta))
        s, t = self.log2_exps(*self.logits(block), part.m_s, part.m_t)
        e_s_BV, e_t_BV = self.exponentials(s, t)
        of_teacher = e_t_BV, remove_offset(1.0 / part.s_t, t.offset_B), log_t_BV.masked_fill_(e_t_BV == 0, 0.0)
        return of_teacher, (e_s_BV, remove_offset(1.0 / part.s_s, s.offset_B), log_s_BV.masked_fill_(e_s_BV == 0, 0.0))

    def write(self, block: Block, out: Tensor, grad_BV: Tensor) -> None:
        """Write the gradient of a block into out, rounded once; 0 in ignored rows."""
        self.zero_ignored(block, grad_BV)
        block.write(out, grad_BV)

    def zero_ignored(self, block: Block, grad_BV: Tensor) -> None:
        """Zero the ignored rows of a block. Not by a product with 0: they may hold inf or NaN."""
        keep_T = self._pairs.keep_T
        if keep_T is not None and isinstance(block.rows, slice):
            grad_BV.masked_fill_(~keep_T[block.rows, None], 0.0)

    def write_difference(
        self, block: Block, out: Tensor, e_s_BV: Tensor, scale_s_B: Tensor, e_t_BV: Tensor, scale_t_B: Tensor
    ) -> None:
        """Write scale_s e_s - scale_t e_t into out; e_s and e_t are overwritten."""
        e_s_BV.mul_(scale_s_B[:, None])
        e_t_BV.mul_(scale_t_B[:, None])
        view_BV = block.view(out)
        if view_BV is None or view_BV.dtype != e_s_BV.dtype:
            self.write(block, out, e_s_BV.sub_(e_t_BV))
            return
        torch.sub(e_s_BV, e_t_BV, out=view_BV)
        self.zero_ignored(block, view_BV)


def _initial_terms(pairs: Pairs) -> PairTerms:
    """Terms to write blocks into: those of an empty vocabulary, or of a divergence of 0 for rows that blocks skip."""
    values = _IGNORED_PAIR if pairs.student.shape[-1] else EMPTY_PAIR
    options: dict[str, Any] = {"dtype": compute_dtype(pairs.student.dtype), "device": pairs.student.device}
    return PairTerms(*(torch.full((pairs.student.shape[:-1].numel(),), value, **options) for value in values))


def _write(out: PairTerms, block: Block, part: PairTerms) -> None:
    for out_T, part_B in zip(out, part, strict=True):
        out_T[block.rows] = part_B


def _initial_grad(like: Tensor, pairs: Pairs, out: Tensor | None) -> Tensor:
    """`out`, or a new tensor, with zeros in ignored rows that blocks skip."""
    if out is None:
        out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    zero_ignored(out, pairs.keep_T)
    return out
