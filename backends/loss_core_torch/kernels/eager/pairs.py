"""Pairs of logits, a student's and a teacher's, in PyTorch operations; see `KernelSet`.

The laws stand in `loss_core.row_terms`, the blocks in `row_blocks`. Exponents of a block are binary logarithms where
that is exact enough and finite, else natural ones: log2(e) times a mask of the lowest finite number would be infinite,
and so would a divergence that is not.
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
from loss_core_torch.kernels.eager.exponentials import log2_exp, row_dots, row_sums, shifted, without
from loss_core_torch.kernels.eager.row_blocks import Block, Buffer, blocks, clear_ignored
from loss_core_torch.kernels.eager.sizes import Sizes
from loss_core_torch.tracing import compute_dtype, is_readable

_LN_2 = math.log(2.0)

# A pair that takes part in nothing has a divergence of 0.
_IGNORED_PAIR = PairTerms(m_t=0.0, s_t=1.0, a=0.0, m_s=0.0, s_s=1.0)


class PairKernels:
    """The `pair_` methods of a `KernelSet`."""

    sizes: Sizes

    def pair_terms(self, pairs: Pairs) -> PairTerms:
        """Terms of each pair of rows."""
        found, walk = _empty_terms(pairs), _Walk(pairs, self.sizes)
        for block in walk:
            _put_terms(found, block, walk.block_terms(block)[0])
        return found

    def pair_terms_and_grad(self, pairs: Pairs, coef_T: Tensor, out: Tensor | None = None) -> tuple[PairTerms, Tensor]:
        """Terms, and the student's gradient of the sum of coef * KL."""
        found, out, walk = _empty_terms(pairs), _result(pairs.student, pairs, out), _Walk(pairs, self.sizes)
        for block in walk:
            part, (e_s_BV, e_t_BV, sum_s_B, sum_t_B) = walk.block_terms(block)
            _put_terms(found, block, part)
            coef_B = coef_T[block.at]
            walk.store_difference(block, out, e_s_BV, coef_B / sum_s_B, e_t_BV, coef_B / sum_t_B)
        return found, out

    def pair_mixture(self, pairs: Pairs, terms: PairTerms, beta: float) -> MixtureTerms:
        """Sums of both distributions against their mixture."""
        dtype, walk = compute_dtype(pairs.student.dtype), _Walk(pairs, self.sizes)
        found = MixtureTerms(*(torch.zeros_like(terms.s_t, dtype=dtype) for _ in range(2)))
        for block in walk:
            for kl_T, (e_BV, scale_B, log_BV) in zip(found, walk.mixture(block, terms, beta), strict=True):
                kl_T[block.at] = row_sums(log_BV.mul_(e_BV)) * scale_B
        return found

    def pair_grad(self, pairs: Pairs, terms: PairTerms, wanted: PairCoefficients, out: Tensor | None = None) -> Tensor:
        """Gradient by the student's logits, p_s - p_t, or by the teacher's, p_t (log p_t - log p_s - KL).

        With beta: p (log(p / M) - KL) of either.
        """
        wanted, of_teacher = wanted.folded(), wanted.of_teacher
        like = pairs.teacher if of_teacher else pairs.student
        out, walk = _result(like, pairs, out), _Walk(pairs, self.sizes)
        if wanted.beta:
            for block in walk:
                e_BV, scale_B, log_BV = walk.mixture(block, terms, wanted.beta)[0 if of_teacher else 1]
                excess_BV = log_BV.sub_(wanted.kl_T[block.at][:, None])
                walk.store(block, out, excess_BV.mul_(e_BV).mul_((scale_B * wanted.coef_T[block.at])[:, None]))
            return out
        centre_T = kl_centre(torch, terms, wanted.kl_T)
        for block in walk:
            part, coef_B = PairTerms(*(term[block.at] for term in terms)), wanted.coef_T[block.at]
            s, t = walk.base_2(*walk.logits(block), part.m_s, part.m_t)
            e_s_BV, e_t_BV = walk.powers(s, t)
            scale_t_B = without(t.number_B, coef_B / part.s_t)
            if of_teacher:
                gap_BV = walk.natural_gap(block, part.m_s, part.m_t).sub_(centre_T[block.at][:, None])
                walk.store(block, out, gap_BV.masked_fill_(e_t_BV == 0, 0.0).mul_(e_t_BV).mul_(scale_t_B[:, None]))
            else:
                walk.store_difference(block, out, e_s_BV, without(s.number_B, coef_B / part.s_s), e_t_BV, scale_t_B)
        return out


class _Exponent(NamedTuple):
    """Exponents y of a block: exp(z / temperature - m) = base^(y - n).

    Attributes:
        number_B: n; None where it is 0, and where the base is e.
    """

    y_BV: Tensor
    number_B: Tensor | None


class _Walk:
    """The blocks of a call, and buffers that each uses again."""

    def __init__(self, pairs: Pairs, sizes: Sizes) -> None:
        student, num_tokens = pairs.student, pairs.student.shape[:-1].numel()
        rows = pairs.chunk_size or sizes.block_rows(2 * student.shape[-1], student.device)
        self._pairs, self._rows = pairs, min(rows, max(num_tokens, 1))
        dtype = compute_dtype(student.dtype)
        self._of_s, self._of_t, self._of_gap = (Buffer(self._rows, student, dtype) for _ in range(3))

    def __iter__(self) -> Iterator[Block]:
        return blocks(self._rows, self._pairs.keep_T, self._pairs.student, self._pairs.teacher)

    def logits(self, block: Block) -> tuple[Tensor, Tensor]:
        """Student's and teacher's logits of a block, in the dtype of the arithmetic."""
        s_BV, t_BV = block.take(self._pairs.student), block.take(self._pairs.teacher)
        return self._of_s.widened(s_BV), self._of_t.widened(t_BV)

    def largest(self, z_BV: Tensor) -> Tensor:
        """The largest logit over the temperature of each row."""
        return z_BV.amax(-1).mul_(self._pairs.inverse_temperature)

    def base_2(self, s_BV: Tensor, t_BV: Tensor, m_s_B: Tensor, m_t_B: Tensor) -> tuple[_Exponent, _Exponent]:
        """Binary logarithms of both, in the buffers."""
        factor, found = self._pairs.inverse_temperature, []
        for z_BV, m_B, buffer in ((s_BV, m_s_B, self._of_s), (t_BV, m_t_B, self._of_t)):
            y_BV = buffer.take(z_BV)
            found.append(_Exponent(y_BV, log2_exp(z_BV, factor, m_B, y_BV)))
        return found[0], found[1]

    def gap(self, t: _Exponent, s: _Exponent) -> Tensor:
        """y_t - y_s, in the third buffer."""
        return torch.sub(t.y_BV, s.y_BV, out=self._of_gap.take(t.y_BV))

    def natural_gap(self, block: Block, m_s_B: Tensor, m_t_B: Tensor) -> Tensor:
        """(z_t - m_t) - (z_s - m_s), in the third buffer."""
        factor = self._pairs.inverse_temperature
        s_BV, t_BV = (block.take(x) for x in (self._pairs.student, self._pairs.teacher))
        dtype = m_s_B.dtype
        gap_BV = shifted(t_BV.to(dtype), factor, m_t_B, self._of_gap.take(t_BV))
        return gap_BV.sub_(shifted(s_BV.to(dtype), factor, m_s_B, torch.empty_like(gap_BV)))

    def powers(self, s: _Exponent, t: _Exponent) -> tuple[Tensor, Tensor]:
        """2^y of both, in place."""
        return self._of_s.exp2(s.y_BV), self._of_t.exp2(t.y_BV)

    def block_terms(self, block: Block) -> tuple[PairTerms, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Terms of a block; and 2^y of student and teacher in the buffers, with their sums."""
        s_BV, t_BV = self.logits(block)
        m_s_B, m_t_B = self.largest(s_BV), self.largest(t_BV)
        s, t = self.base_2(s_BV, t_BV, m_s_B, m_t_B)
        gap_BV = self.gap(t, s)
        e_s_BV, e_t_BV = self.powers(s, t)
        sum_s_B, sum_t_B = row_sums(e_s_BV), row_sums(e_t_BV)
        a_B = row_dots(e_t_BV, gap_BV)
        finite_B = torch.isfinite(a_B) if is_readable(a_B) else torch.zeros_like(a_B, dtype=torch.bool)
        a_B += sum_t_B * ((0.0 if s.number_B is None else s.number_B) - (0.0 if t.number_B is None else t.number_B))
        a_B *= _LN_2 / GAP_UNIT
        if not (is_readable(a_B) and bool(finite_B.all())):
            gap_BV = self.natural_gap(block, m_s_B, m_t_B)
            # A probability of 0 weighs nothing, even if its gap is inf or NaN.
            natural_B = row_sums(gap_BV.masked_fill_(e_t_BV == 0, 0.0).mul_(1.0 / GAP_UNIT).mul_(e_t_BV))
            # Each row by its own sum: its rounding must not depend on the rows beside it.
            a_B = torch.where(finite_B, a_B, natural_B)
        s_s_B, s_t_B = without(s.number_B, sum_s_B), without(t.number_B, sum_t_B)
        found = PairTerms(m_t_B, s_t_B, without(t.number_B, a_B), m_s_B, s_s_B)
        return found, (e_s_BV, e_t_BV, sum_s_B, sum_t_B)

    def mixture(
        self, block: Block, terms: PairTerms, beta: float
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """Of teacher and student: e^(z - m) in the buffer times a scale [B] is p, and log(p / M), 0 where p is 0."""
        part = PairTerms(*(term[block.at] for term in terms))
        gap_BV = self.natural_gap(block, part.m_s, part.m_t)
        ratio_BV = gap_BV.sub_(log_ratio_offset(torch, part)[:, None])
        log_t_BV, log_s_BV = mixture_logs(torch, ratio_BV, *log_shares(beta))
        s, t = self.base_2(*self.logits(block), part.m_s, part.m_t)
        e_s_BV, e_t_BV = self.powers(s, t)
        of_teacher = e_t_BV, without(t.number_B, 1.0 / part.s_t), log_t_BV.masked_fill_(e_t_BV == 0, 0.0)
        return of_teacher, (e_s_BV, without(s.number_B, 1.0 / part.s_s), log_s_BV.masked_fill_(e_s_BV == 0, 0.0))

    def store(self, block: Block, out: Tensor, grad_BV: Tensor) -> None:
        """A block of a gradient into `out`; 0 in ignored rows, rounded once."""
        self.clear_ignored(block, grad_BV)
        block.put(out, grad_BV)

    def clear_ignored(self, block: Block, grad_BV: Tensor) -> None:
        """Zeros in the ignored rows of a block. Not a product with 0: they may hold inf or NaN."""
        keep_T = self._pairs.keep_T
        if keep_T is not None and isinstance(block.at, slice):
            grad_BV.masked_fill_(~keep_T[block.at, None], 0.0)

    def store_difference(
        self, block: Block, out: Tensor, e_s_BV: Tensor, scale_s_B: Tensor, e_t_BV: Tensor, scale_t_B: Tensor
    ) -> None:
        """scale_s e_s - scale_t e_t into `out`; the powers are overwritten."""
        e_s_BV.mul_(scale_s_B[:, None])
        e_t_BV.mul_(scale_t_B[:, None])
        into_BV = block.view(out)
        if into_BV is None or into_BV.dtype != e_s_BV.dtype:
            self.store(block, out, e_s_BV.sub_(e_t_BV))
            return
        torch.sub(e_s_BV, e_t_BV, out=into_BV)
        self.clear_ignored(block, into_BV)


def _empty_terms(pairs: Pairs) -> PairTerms:
    """Terms to be filled in; of no class where there is none, of a divergence of 0 for rows that no block holds."""
    values = _IGNORED_PAIR if pairs.student.shape[-1] else EMPTY_PAIR
    like: dict[str, Any] = {"dtype": compute_dtype(pairs.student.dtype), "device": pairs.student.device}
    return PairTerms(*(torch.full((pairs.student.shape[:-1].numel(),), value, **like) for value in values))


def _put_terms(found: PairTerms, block: Block, part: PairTerms) -> None:
    for whole_T, part_B in zip(found, part, strict=True):
        whole_T[block.at] = part_B


def _result(like: Tensor, pairs: Pairs, out: Tensor | None) -> Tensor:
    """Where a gradient goes, with zeros in ignored rows that no block may hold."""
    if out is None:
        out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    clear_ignored(out, pairs.keep_T)
    return out
