"""Logits h @ W.T of a student and a teacher, computed in blocks of tokens and never in full, for any kernel set.

Each block takes one product per head for its logits. The kernel set's pair kernels compute terms and gradients from
both, and two products per gradient add to the gradients of hidden states and weight. Memory: the gradients, and the
logits of a block, which their gradient overwrites if it has the same dtype.
"""

# T = tokens, B = tokens of a block, V = vocabulary (of this rank), C = classes of a tile, H = hidden

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from loss_core.row_terms import MixtureTerms, PairTerms, jensen_shannon, kl_divergence
from loss_core_torch.kernels import (
    BothGrads,
    BothWanted,
    HeadOperands,
    KernelSet,
    LinearPairs,
    PairCoefficients,
    Pairs,
    Wanted,
)
from loss_core_torch.kernels.heads import Head, HeadGrads, slices

PerRow = TypeVar("PerRow", PairTerms, MixtureTerms, PairCoefficients)

_NO_GRADS = BothWanted(Wanted(False, False), Wanted(False, False))


def terms(kernels: KernelSet, linear: LinearPairs) -> PairTerms:
    """Terms of each token over these rows of the weights."""
    return PairTerms(*_concatenated(kernels.pair_terms(pairs) for _, pairs in _Blocks(kernels, linear, _NO_GRADS)))


def mixture(kernels: KernelSet, linear: LinearPairs, terms: PairTerms, beta: float) -> MixtureTerms:
    """Sums against the mixture over these rows of the weights, from terms over the full vocabulary."""
    blocks = _Blocks(kernels, linear, _NO_GRADS)
    parts = (kernels.pair_mixture(pairs, _slice(terms, tokens), beta) for tokens, pairs in blocks)
    return MixtureTerms(*_concatenated(parts))


def grads(
    kernels: KernelSet,
    linear: LinearPairs,
    terms: PairTerms,
    of_student: PairCoefficients,
    of_teacher: PairCoefficients,
    want: BothWanted,
) -> BothGrads:
    """Gradients from terms and coefficients over the full vocabulary."""
    blocks = _Blocks(kernels, linear, want)
    for tokens, pairs in blocks:
        blocks.add(tokens, pairs, _slice(terms, tokens), (_slice(of_student, tokens), _slice(of_teacher, tokens)))
    return blocks.grads


def loss_and_grads(
    kernels: KernelSet, linear: LinearPairs, coef_T: Tensor, beta: float, want: BothWanted
) -> tuple[Tensor, BothGrads]:
    """Divergence of each token over a full vocabulary, and the gradients of the sum of coef * divergence.

    Args:
        coef_T: divided by the temperature.
    """
    blocks, losses = _Blocks(kernels, linear, want), []
    in_one_pass = not beta and any(want.student) and not any(want.teacher)
    for tokens, pairs in blocks:
        if in_one_pass and pairs.student.numel():
            terms_B, e_BV = kernels.pair_terms_and_grad(
                pairs, coef_T[tokens], blocks.gradient(0, pairs, separate=False)
            )
            losses.append(kl_divergence(torch, terms_B))
            blocks.add_to_head(0, tokens, e_BV)
            continue
        terms_B = kernels.pair_terms(pairs)
        mixture_B = kernels.pair_mixture(pairs, terms_B, beta) if beta else None
        loss_B, divergences = divergence(terms_B, mixture_B, beta)
        losses.append(loss_B)
        blocks.add(tokens, pairs, terms_B, both_coefficients(divergences, coef_T[tokens], beta))
    return torch.cat(losses), blocks.grads


def divergence(terms: PairTerms, mixture: MixtureTerms | None, beta: float) -> tuple[Tensor, Sequence[Tensor]]:
    """Loss of each row, not scaled by T^2, and the KL divergences in it: one; or teacher's and student's from M."""
    if mixture is None:
        kl_T = kl_divergence(torch, terms)
        return kl_T, (kl_T,)
    return jensen_shannon(torch, terms, mixture, beta), mixture


def both_coefficients(
    divergences: Sequence[Tensor], coef_T: Tensor, beta: float
) -> tuple[PairCoefficients, PairCoefficients]:
    """Coefficients of the gradients of student and teacher.

    Args:
        divergences: the second result of `divergence`.
        coef_T: factor of each row's loss, divided by the temperature.
    """
    if not beta:
        of_student = PairCoefficients(divergences[0], coef_T, of_teacher=False)
        return of_student, of_student._replace(of_teacher=True)
    kl_t_T, kl_s_T = divergences
    of_student = PairCoefficients(kl_s_T, coef_T * (1.0 - beta), False, beta)
    return of_student, PairCoefficients(kl_t_T, coef_T * beta, True, beta)


class _Blocks:
    """Iterates over blocks of tokens with the logits of both heads; one empty block if there are no tokens."""

    def __init__(self, kernels: KernelSet, linear: LinearPairs, want: BothWanted) -> None:
        self._kernels, self._linear, self._want = kernels, linear, want
        self._heads = tuple(_head(kernels, operands) for operands in linear.heads)
        self._head_grads = [HeadGrads(kernels, *of_head) for of_head in zip(self._heads, want, strict=True)]
        student = self._heads[0]
        sizes = student.sizes()
        # Both logits, and a separate gradient.
        sizes = sizes._replace(logit_bytes=2 * sizes.logit_bytes + sizes.beside_bytes, beside_bytes=0)
        self._block_tokens = max(min(kernels.chunks(sizes).tokens, student.num_tokens), 1)
        self._all_classes = slice(0, student.vocab)
        self._gradients: dict[torch.dtype, Tensor] = {}

    def __iter__(self) -> Iterator[tuple[slice, Pairs]]:
        keep_T, (student, teacher) = self._linear.keep_T, self._heads
        logits = [self._new(head, head.dtype) for head in self._heads]
        for tokens in slices(0, student.num_tokens, self._block_tokens):
            student_BV, teacher_BV = (z_BV[: tokens.stop - tokens.start] for z_BV in logits)
            student.compute_logits(tokens, student_BV)
            teacher.compute_logits(tokens, teacher_BV)
            keep_B = None if keep_T is None else keep_T[tokens]
            yield tokens, Pairs(student_BV, teacher_BV, keep_B, self._linear.inverse_temperature)

    @property
    def grads(self) -> BothGrads:
        """The gradients, after the last block."""
        return BothGrads(self._head_grads[0].result(), self._head_grads[1].result())

    def gradient(self, side: int, pairs: Pairs, separate: bool) -> Tensor:
        """Memory for the gradient of one side's logits: these logits, unless the dtype differs or `separate` is set."""
        z_BV, dtype = (pairs.student, pairs.teacher)[side], self._heads[side].operand_dtype
        if dtype == z_BV.dtype and not separate:
            return z_BV
        if dtype not in self._gradients:
            self._gradients[dtype] = self._new(self._heads[side], dtype)
        return self._gradients[dtype][: len(z_BV)]

    def add(
        self, tokens: slice, pairs: Pairs, terms: PairTerms, coefficients: tuple[PairCoefficients, PairCoefficients]
    ) -> None:
        """Add the gradients of a block to those of both heads; its logits are overwritten."""
        for side, (of_side, want) in enumerate(zip(coefficients, self._want, strict=True)):
            if any(want) and pairs.student.numel():
                # The teacher's gradient, which comes second, reads the student's logits.
                out = self.gradient(side, pairs, separate=side == 0 and any(self._want.teacher))
                self.add_to_head(side, tokens, self._kernels.pair_grad(pairs, terms, of_side, out=out))

    def add_to_head(self, side: int, tokens: slice, e_BV: Tensor) -> None:
        """Add the gradient of a block's logits to the gradients of one head."""
        self._head_grads[side].add(self._heads[side], self._all_classes, tokens, e_BV)

    def _new(self, head: Head, dtype: torch.dtype) -> Tensor:
        return torch.empty((self._block_tokens, head.vocab), dtype=dtype, device=head.device)


def _head(kernels: KernelSet, operands: HeadOperands) -> Head:
    # p (log p - log q) is unbounded, and would overflow float16.
    return Head(kernels, operands, torch.float32 if operands.product_dtype == torch.float16 else None)


def _slice(per_row: PerRow, tokens: slice) -> PerRow:
    sliced: Any = {name: x[tokens] for name, x in per_row._asdict().items() if isinstance(x, Tensor)}
    return per_row._replace(**sliced)


def _concatenated(parts: Iterable[Any]) -> Iterator[Tensor]:
    """Each field of the NamedTuples of at least one block, concatenated over blocks."""
    return (torch.cat(x) for x in zip(*parts, strict=True))
