"""Logits softcap(h @ W.T + b) that are never held whole, block by block, for any kernel set.

A block is some tokens and some classes. One product makes its logits, a set's kernels of rows make terms of them or
their gradient E, which two products bring back to hidden states and weight (`heads`).

- Terms and gradient in one visit: a block has all classes, and the gradient of the weight is a sum over blocks.
- Terms that are known, or all that is wanted: a set may choose tiles of the vocabulary, each for all tokens. Then the
  gradient of a tile's rows of the weight is whole after one product, and is written in the weight's own dtype.

Memory: the gradients; the logits of a block; and E, in the place of the logits where its dtype is theirs. Else logits
are twice as large as E, and may be of fewer tokens at a time.
"""

# T = tokens, B = some of them, V = vocabulary (of this rank), C = classes of a tile

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from loss_core.row_terms import Coefficients, Objective, RowTerms, Sums, combine
from loss_core_torch.kernels import Blocks, KernelSet, Linear, LinearGrads, Rows, Wanted
from loss_core_torch.kernels.heads import TILE_MULTIPLE, Head, HeadGrads, slices
from loss_core_torch.kernels.terms import joined_terms
from loss_core_torch.tracing import is_readable

# The largest coefficient has this exponent, or one more; see `_exponent`.
_FLOAT16_EXPONENT = 15


def terms(kernels: KernelSet, linear: Linear, sums: Sums, keep_logits: bool) -> tuple[RowTerms, Tensor]:
    """Terms over these rows of the weight; and what `grads` takes as `logits`.

    Args:
        keep_logits: whether `grads` will follow. The logits are kept if they fit the memory of one block and are no
            more than `block_tokens` rows, else (or if False) the second result is empty.
    """
    head = Head(kernels, linear.head)
    blocks = _tiles(kernels, linear, head, keep_logits)
    buffer, found = head.new(blocks.logits_tokens * blocks.classes), dict[int, RowTerms]()
    for tile in slices(0, head.vocab, blocks.classes):
        of_tile = head.of_classes(tile)
        for at in slices(0, head.num_tokens, blocks.logits_tokens):
            z_BC = _matrix(buffer, at, tile)
            of_tile.make_logits(at, z_BC)
            part = kernels.row_terms(_rows(linear, at, tile, z_BC), sums)
            found[at.start] = combine(torch, found[at.start], part) if at.start in found else part
    is_kept = keep_logits and (blocks.logits_tokens, blocks.classes) == (head.num_tokens, head.vocab)
    return joined_terms(list(found.values())), buffer if is_kept else buffer.new_empty(0)


def terms_and_grads(
    kernels: KernelSet, linear: Linear, coef_T: Tensor, objective: Objective, want: Wanted
) -> tuple[RowTerms, LinearGrads]:
    """Terms, and the gradients of the sum of coef * loss in the dtype of the arithmetic, with three products.

    A coefficient of 0 gives a gradient of 0, whatever the row holds.
    """
    head = Head(kernels, linear.head)
    every = slice(0, head.vocab)
    exponent = _exponent(head, [coef_T], room=objective.headroom)
    coef_T = _times_power(coef_T, exponent)
    memory = _Memory(head, _chunks(kernels, linear, head, want))
    found, grads = list[RowTerms](), HeadGrads(kernels, head, want, factor=_undone(head, exponent))
    for chunk in memory.chunks():
        e_CV = memory.gradient(chunk, every)
        for at, z_BV, e_BV in memory.parts(chunk, e_CV):
            head.make_logits(at, z_BV)
            rows = _rows(linear, at, every, z_BV)
            part, *_ = kernels.row_terms_and_grad(rows, coef_T[at], objective.of_rows(at), out=e_BV)
            found.append(part)
        grads.add(head, every, chunk, e_CV)
    return joined_terms(found), grads.whole()


def grads(
    kernels: KernelSet, linear: Linear, terms: RowTerms, coefficients: Coefficients, want: Wanted, logits: Tensor
) -> LinearGrads:
    """Gradients by h in the dtype of the arithmetic, by W and b in their own.

    Args:
        terms, coefficients: over the whole vocabulary; coefficients of 0 give a gradient of 0, whatever the row holds.
        want: which of them are made; another is empty.
        logits: of `terms`, overwritten; empty: they are computed again.
    """
    head, is_kept = Head(kernels, linear.head), logits.numel() > 0
    exponent = _exponent(head, coefficients)
    coefficients = Coefficients(*(None if c_T is None else _times_power(c_T, exponent) for c_T in coefficients[:4]))
    whole = Blocks(head.num_tokens, head.num_tokens, head.vocab)
    blocks = whole if is_kept else _tiles(kernels, linear, head, together=False)
    memory = _Memory(head, blocks, logits if is_kept else None)
    known = {at.start: _known(at, terms, coefficients) for chunk in memory.chunks() for at in memory.slices(chunk)}
    at_once, factor = blocks.tokens >= head.num_tokens, _undone(head, exponent)
    found = HeadGrads(kernels, head, want, rounded=True, at_once=at_once, factor=factor)
    for tile in slices(0, head.vocab, blocks.classes):
        of_tile = head.of_classes(tile)
        for chunk in memory.chunks():
            e_BC = memory.gradient(chunk, tile)
            for at, z_BC, out_BC in memory.parts(chunk, e_BC):
                if not is_kept:
                    of_tile.make_logits(at, z_BC)
                rows, of_part = _rows(linear, at, tile, z_BC), known[at.start]
                kernels.row_grad(rows._replace(keep_T=of_part.keep), of_part.terms, of_part.coefficients, out=out_BC)
            found.add(of_tile, tile, chunk, e_BC)
    return found.whole()


def _rows(linear: Linear, at: slice, tile: slice, z_BC: Tensor) -> Rows:
    """Logits of some tokens and a tile, and what is known of them."""
    inverse_T = linear.inverse_temperature_T
    inverse_B = None if inverse_T is None else inverse_T[at]
    return Rows(z_BC, linear.labels_T[at], None, linear.vocab_start + tile.start, linear.softcap, inverse_B)


class _Known(NamedTuple):
    """What is known of some tokens before their logits are made.

    Attributes:
        keep: [B] bool, the rows of which a coefficient is not 0; None where the host can see that it is all of them.
    """

    terms: RowTerms
    coefficients: Coefficients
    keep: Tensor | None


def _known(at: slice, terms: RowTerms, coefficients: Coefficients) -> _Known:
    of_part = coefficients.of_rows(at)
    has_B = [(c_B if c_B.dim() == 1 else c_B.any(-1)) != 0 for c_B in of_part[:4] if c_B is not None]
    keep_B = reduce(torch.logical_or, has_B)
    is_all = is_readable(keep_B) and bool(keep_B.all())
    return _Known(RowTerms(terms.m[at], terms.s[at], terms.t[at]), of_part, None if is_all else keep_B)


def _chunks(kernels: KernelSet, linear: Linear, head: Head, want: Wanted) -> Blocks:
    """Blocks of all classes, within what the call allows."""
    is_rounded = want.weight and head.weight_dtype != head.dtype
    rounded_bytes = linear.head.w_VH.numel() * head.weight_dtype.itemsize if is_rounded else 0
    blocks = kernels.chunks(head.sizes(rounded_bytes))
    return Blocks(linear.block(blocks.tokens), linear.block(blocks.logits_tokens), head.vocab)


def _tiles(kernels: KernelSet, linear: Linear, head: Head, together: bool) -> Blocks:
    """Blocks of all tokens or of all classes or of neither, within what the call allows.

    Args:
        together: all logits are to exist at a time, if they fit the memory of one block.
    """
    is_free = linear.block(head.num_tokens) == head.num_tokens
    tokens, logits_tokens, classes = kernels.tiles(head.sizes(), together and is_free)
    tokens = min(tokens, head.num_tokens)
    if linear.block(tokens) < tokens:
        # E takes as many entries of a tile as the rows that may exist have in the whole vocabulary.
        most = linear.block_tokens * head.vocab // tokens
        classes = max(min(classes, most // TILE_MULTIPLE * TILE_MULTIPLE or most), 1)
    return Blocks(tokens, min(linear.block(logits_tokens), tokens), classes)


class _Memory:
    """Logits of a block, and their gradient E.

    Args:
        logits: those of all tokens and classes, where they are kept; overwritten.
    """

    def __init__(self, head: Head, blocks: Blocks, logits: Tensor | None = None) -> None:
        self._num_tokens, self._blocks, self._is_over = head.num_tokens, blocks, head.operand == head.dtype
        tokens = min(blocks.tokens if self._is_over else blocks.logits_tokens, max(head.num_tokens, 1))
        self._logits = head.new(tokens * blocks.classes) if logits is None else logits
        e_size = min(blocks.tokens, head.num_tokens) * blocks.classes
        self._e = self._logits if self._is_over else head.new(e_size, dtype=head.operand)

    def chunks(self) -> Iterator[slice]:
        """Tokens whose E exists at a time."""
        return slices(0, self._num_tokens, self._blocks.tokens)

    def slices(self, chunk: slice) -> Iterator[slice]:
        """Those of a chunk whose logits exist at a time."""
        return slices(chunk.start, chunk.stop, self._blocks.logits_tokens)

    def gradient(self, chunk: slice, tile: slice) -> Tensor:
        """Memory of E."""
        return _matrix(self._e, chunk, tile)

    def parts(self, chunk: slice, e_BC: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Tokens of a chunk whose logits exist at a time, with memory for these, and for their E."""
        for at in self.slices(chunk):
            part = e_BC[at.start - chunk.start : at.stop - chunk.start]
            yield at, part if self._is_over else self._logits[: part.numel()].view(part.shape), part


def _matrix(buffer: Tensor, at: slice, tile: slice) -> Tensor:
    """[B, C] side by side at the start of a buffer."""
    shape = at.stop - at.start, tile.stop - tile.start
    return buffer[: shape[0] * shape[1]].view(shape)


def _exponent(head: Head, factors: Sequence[Tensor | None], room: int = 0) -> Tensor | None:
    """n of the power 2^n by which to multiply coefficients so that operands in float16 can hold the gradient.

    A mean over 8192 tokens would put every probability below 2e-4 beneath what float16 can hold. The largest factor
    becomes at least 2^14 (float16 ends at 2^16): then a probability of 2^-28 is still a normal number.

    Args:
        factors: of rows, of their exponentials among them.
        room: binary digits by which the gradient may be larger than they are.
    """
    if head.operand != torch.float16 or head.num_tokens == 0:
        return None
    # A NaN is the mark of one token; it must not reach the others.
    largest = [factor.nan_to_num(nan=0.0).abs().amax() for factor in factors if factor is not None]
    _, exponent = torch.frexp(torch.stack(largest).amax())
    return _FLOAT16_EXPONENT - room - exponent.clamp(-100, 100)


def _times_power(x_T: Tensor, exponent: Tensor | None) -> Tensor:
    return x_T if exponent is None else torch.ldexp(x_T, exponent)


def _undone(head: Head, exponent: Tensor | None) -> Tensor | None:
    """2^-n, a scalar in the dtype of the arithmetic."""
    return None if exponent is None else torch.ldexp(torch.ones_like(exponent, dtype=head.dtype), -exponent)
