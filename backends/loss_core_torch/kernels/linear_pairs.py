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
    KernelSet,
    LinearGrads,
    LinearPairs,
    PairCoefficients,
    Pairs,
    Wanted,
)
from loss_core_torch.tracing import compute_dtype

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
            blocks.heads[0].add(at, e_BV)
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
        num_tokens, sizes = len(linear.student_TH), kernels.linear_blocks(linear)
        self._tokens = max(min(sizes.tokens, num_tokens), 1)
        self.heads = (
            _Head(kernels, linear.student_TH, linear.student_VH, linear.student_dtype, want.student, sizes.classes),
            _Head(kernels, linear.teacher_TH, linear.teacher_VH, linear.teacher_dtype, want.teacher, sizes.classes),
        )
        self._beside: dict[torch.dtype, Tensor] = {}

    def __iter__(self) -> Iterator[tuple[slice, Pairs]]:
        keep_T, num_tokens = self._linear.keep_T, len(self._linear.student_TH)
        logits = [head.new_logits(self._tokens, head.dtype) for head in self.heads]
        for start in range(0, max(num_tokens, 1), self._tokens):
            at = slice(start, min(start + self._tokens, num_tokens))
            student_BV, teacher_BV = (z_BV[: at.stop - at.start] for z_BV in logits)
            self.heads[0].make_logits(at, student_BV)
            self.heads[1].make_logits(at, teacher_BV)
            keep_B = None if keep_T is None else keep_T[at]
            yield at, Pairs(student_BV, teacher_BV, keep_B, self._linear.inverse_temperature)

    @property
    def grads(self) -> BothGrads:
        """The sums over all blocks so far."""
        return BothGrads(self.heads[0].grads, self.heads[1].grads)

    def out(self, side: int, pairs: Pairs, beside: bool) -> Tensor:
        """Where the gradient by one of the logits goes: over these, unless their dtype is another, or `beside`."""
        z_BV, operand = (pairs.student, pairs.teacher)[side], self.heads[side].operand
        if operand == z_BV.dtype and not beside:
            return z_BV
        if operand not in self._beside:
            self._beside[operand] = self.heads[side].new_logits(self._tokens, operand)
        return self._beside[operand][: len(z_BV)]

    def add(self, at: slice, pairs: Pairs, terms: PairTerms, wanted: tuple[PairCoefficients, PairCoefficients]) -> None:
        """What a block adds; its logits are overwritten."""
        for side, (wanted_grad, want) in enumerate(zip(wanted, self._want, strict=True)):
            if any(want) and pairs.student.numel():
                # The teacher's gradient is made of the student's logits as well.
                out = self.out(side, pairs, beside=side == 0 and any(self._want.teacher))
                self.heads[side].add(at, self._kernels.pair_grad(pairs, terms, wanted_grad, out=out))


class _Head:
    """A student or a teacher: operands as the products take them, and the gradients, to which each block adds.

    Attributes:
        dtype: of the arithmetic.
        operand: dtype in which operands enter the products.
        grads: empty where they are not wanted.
    """

    def __init__(
        self, kernels: KernelSet, h_TH: Tensor, w_VH: Tensor, product_dtype: torch.dtype, want: Wanted, classes: int
    ) -> None:
        self.dtype, device = compute_dtype(h_TH.dtype), h_TH.device
        # p (log p - log q) has no largest value, and float16 has.
        is_narrow = product_dtype == torch.float16
        self.operand = self.dtype if is_narrow else kernels.operand_dtype(product_dtype, device)
        self._products, self._product_dtype = kernels.products(self.operand, device), product_dtype
        self._want, self._classes = want, max(classes, 1)
        # A weight that is one tile is converted once.
        self._h_TH, self._w_VH = h_TH, self._operand(w_VH) if len(w_VH) <= classes else w_VH
        # Every entry is written below, unless there are none to multiply.
        new = torch.empty if len(h_TH) and len(w_VH) else torch.zeros
        by_h, by_w, by_b = (
            new(shape if wanted else (0,), dtype=self.dtype, device=device)
            for shape, wanted in zip((h_TH.shape, w_VH.shape, (0,)), want, strict=True)
        )
        self.grads = LinearGrads(by_h, by_w, by_b)

    def new_logits(self, tokens: int, dtype: torch.dtype) -> Tensor:
        """Memory of a block [B, V]."""
        return torch.empty((tokens, len(self._w_VH)), dtype=dtype, device=self._h_TH.device)

    def make_logits(self, at: slice, z_BV: Tensor) -> None:
        """h @ W.T of a block."""
        h_BH = self._operand(self._h_TH[at])
        for tile, w_CH in self._tiles():
            self._products.into(z_BV[:, tile], h_BH, w_CH.t())

    def add(self, at: slice, e_BV: Tensor) -> None:
        """What a block adds, from the gradient by its logits."""
        h_BH, first, last = self._operand(self._h_TH[at]), at.start == 0, at.stop == len(self._h_TH)
        turned = self._products.turned(h_BH)
        for tile, w_CH in self._tiles():
            e_BC = e_BV[:, tile]
            if self._want.hidden:
                multiply = self._products.add if tile.start else self._products.into
                multiply(self.grads.hidden_TH[at], e_BC, w_CH)
            if self._want.weight:
                self._products.accumulate(self.grads.weight_VH[tile], e_BC, h_BH, turned, first, last)

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight tile by tile."""
        for start in range(0, len(self._w_VH), self._classes):
            tile = slice(start, min(start + self._classes, len(self._w_VH)))
            yield tile, self._operand(self._w_VH[tile])

    def _operand(self, x: Tensor) -> Tensor:
        return x.to(self._product_dtype).to(self.operand)


def _rows(numbers: Numbers, at: slice) -> Numbers:
    """Those of some rows."""
    of_rows: Any = {name: x[at] for name, x in numbers._asdict().items() if isinstance(x, Tensor)}
    return numbers._replace(**of_rows)


def _joined(parts: Iterable[Any]) -> Iterator[Tensor]:
    """Numbers of all tokens from those of the blocks, of which there is one at least."""
    return (torch.cat(x) for x in zip(*parts, strict=True))
