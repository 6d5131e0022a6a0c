"""Logits h @ W.T of a student and a teacher that are never held whole: block of tokens by block, for any kernel set.

Of each block both logits are made, with one product each. A set's kernels of pairs make terms and gradients of them,
and two products bring each gradient back to hidden states and weight. Memory: the gradients, and the logits of a block,
in whose place comes their gradient where the dtype is the same.
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

Numbers = TypeVar("Numbers", PairTerms, MixtureTerms, PairCoefficients)

_NOTHING = BothWanted(Wanted(False, False), Wanted(False, False))


def terms(kernels: KernelSet, linear: LinearPairs) -> PairTerms:
    """Terms of each token over these rows of the weights."""
    return PairTerms(*_joined(kernels.pair_terms(pairs) for _, pairs in _Blocks(kernels, linear, _NOTHING)))


def mixture(kernels: KernelSet, linear: LinearPairs, terms: PairTerms, beta: float) -> MixtureTerms:
    """Sums against the mixture over these rows of the weights, from terms over the whole vocabulary."""
    blocks = _Blocks(kernels, linear, _NOTHING)
    return MixtureTerms(*_joined(kernels.pair_mixture(pairs, _rows(terms, at), beta) for at, pairs in blocks))


def grads(
    kernels: KernelSet,
    linear: LinearPairs,
    terms: PairTerms,
    of_student: PairCoefficients,
    of_teacher: PairCoefficients,
    want: BothWanted,
) -> BothGrads:
    """Gradients from terms and coefficients over the whole vocabulary."""
    blocks = _Blocks(kernels, linear, want)
    for at, pairs in blocks:
        blocks.add(at, pairs, _rows(terms, at), (_rows(of_student, at), _rows(of_teacher, at)))
    return blocks.grads


def loss_and_grads(
    kernels: KernelSet, linear: LinearPairs, coef_T: Tensor, beta: float, want: BothWanted
) -> tuple[Tensor, BothGrads]:
    """Divergence of each token over a whole vocabulary, and the gradients of the sum of coef * divergence.

    Args:
        coef_T: divided by the temperature.
    """
    blocks, losses = _Blocks(kernels, linear, want), []
    in_one_visit = not beta and any(want.student) and not any(want.teacher)
    for at, pairs in blocks:
        if in_one_visit and pairs.student.numel():
            terms_B, e_BV = kernels.pair_terms_and_grad(pairs, coef_T[at], blocks.out(0, pairs, beside=False))
            losses.append(kl_divergence(torch, terms_B))
            blocks.add_of(0, at, e_BV)
            continue
        terms_B = kernels.pair_terms(pairs)
        mixture_B = kernels.pair_mixture(pairs, terms_B, beta) if beta else None
        loss_B, both = divergence(terms_B, mixture_B, beta)
        losses.append(loss_B)
        blocks.add(at, pairs, terms_B, both_coefficients(both, coef_T[at], beta))
    return torch.cat(losses), blocks.grads


def divergence(terms: PairTerms, mixture: MixtureTerms | None, beta: float) -> tuple[Tensor, Sequence[Tensor]]:
    """The loss of each row, not times T^2, and the divergences of which it is made: KL; or of both from the mixture."""
    if mixture is None:
        kl_T = kl_divergence(torch, terms)
        return kl_T, (kl_T,)
    return jensen_shannon(torch, terms, mixture, beta), mixture


def both_coefficients(
    divergences: Sequence[Tensor], coef_T: Tensor, beta: float
) -> tuple[PairCoefficients, PairCoefficients]:
    """Which gradients of student and teacher are those of a loss.

    Args:
        divergences: as `divergence` gives them.
        coef_T: factor of each row's loss, divided by the temperature.
    """
    if not beta:
        of_student = PairCoefficients(divergences[0], coef_T, of_teacher=False)
        return of_student, of_student._replace(of_teacher=True)
    kl_t_T, kl_s_T = divergences
    of_student = PairCoefficients(kl_s_T, coef_T * (1.0 - beta), False, beta)
    return of_student, PairCoefficients(kl_t_T, coef_T * beta, True, beta)


class _Blocks:
    """The tokens block by block, with the logits of both heads; a single empty block if there are none."""

    def __init__(self, kernels: KernelSet, linear: LinearPairs, want: BothWanted) -> None:
        self._kernels, self._linear, self._want = kernels, linear, want
        self._heads = tuple(_head(kernels, given) for given in linear.heads)
        self._sums = [HeadGrads(kernels, head, of_head) for head, of_head in zip(self._heads, want, strict=True)]
        student = self._heads[0]
        sizes = student.sizes()
        # Memory of either logits, and of a gradient beside them.
        sizes = sizes._replace(logit_bytes=2 * sizes.logit_bytes + sizes.beside_bytes, beside_bytes=0)
        self._tokens = max(min(kernels.chunks(sizes).tokens, student.num_tokens), 1)
        self._every = slice(0, student.vocab)
        self._beside: dict[torch.dtype, Tensor] = {}

    def __iter__(self) -> Iterator[tuple[slice, Pairs]]:
        keep_T, (student, teacher) = self._linear.keep_T, self._heads
        logits = [self._new(head, head.dtype) for head in self._heads]
        for at in slices(0, student.num_tokens, self._tokens):
            student_BV, teacher_BV = (z_BV[: at.stop - at.start] for z_BV in logits)
            student.make_logits(at, student_BV)
            teacher.make_logits(at, teacher_BV)
            keep_B = None if keep_T is None else keep_T[at]
            yield at, Pairs(student_BV, teacher_BV, keep_B, self._linear.inverse_temperature)

    @property
    def grads(self) -> BothGrads:
        """The sums over all blocks, after the last."""
        return BothGrads(self._sums[0].whole(), self._sums[1].whole())

    def out(self, side: int, pairs: Pairs, beside: bool) -> Tensor:
        """Where the gradient by one of the logits goes: over these, unless their dtype is another, or `beside`."""
        z_BV, operand = (pairs.student, pairs.teacher)[side], self._heads[side].operand
        if operand == z_BV.dtype and not beside:
            return z_BV
        if operand not in self._beside:
            self._beside[operand] = self._new(self._heads[side], operand)
        return self._beside[operand][: len(z_BV)]

    def add(self, at: slice, pairs: Pairs, terms: PairTerms, wanted: tuple[PairCoefficients, PairCoefficients]) -> None:
        """What a block adds; its logits are overwritten."""
        for side, (wanted_grad, want) in enumerate(zip(wanted, self._want, strict=True)):
            if any(want) and pairs.student.numel():
                # The teacher's gradient is made of the student's logits as well.
                out = self.out(side, pairs, beside=side == 0 and any(self._want.teacher))
                self.add_of(side, at, self._kernels.pair_grad(pairs, terms, wanted_grad, out=out))

    def add_of(self, side: int, at: slice, e_BV: Tensor) -> None:
        """What a block adds to the gradients of one head."""
        self._sums[side].add(self._heads[side], self._every, at, e_BV)

    def _new(self, head: Head, dtype: torch.dtype) -> Tensor:
        """Memory of a block [B, V]."""
        return torch.empty((self._tokens, head.vocab), dtype=dtype, device=head.device)


def _head(kernels: KernelSet, given: HeadOperands) -> Head:
    # p (log p - log q) has no largest value, and float16 has.
    return Head(kernels, given, torch.float32 if given.product_dtype == torch.float16 else None)


def _rows(numbers: Numbers, at: slice) -> Numbers:
    """Those of some rows."""
    of_rows: Any = {name: x[at] for name, x in numbers._asdict().items() if isinstance(x, Tensor)}
    return numbers._replace(**of_rows)


def _joined(parts: Iterable[Any]) -> Iterator[Tensor]:
    """Numbers of all tokens from those of the blocks, of which there is one at least."""
    return (torch.cat(x) for x in zip(*parts, strict=True))
