"""Logits softcap(h @ W.T + b), computed in blocks and never materialized in full, for any kernel set.

A block is a range of tokens and a range of classes. One product computes its logits, the kernel set's row kernels
compute their terms or their gradient E, and two products with E add to the gradients of h and W (`heads`).

- Terms and gradient in one pass: a block has all classes, and the weight's gradient is accumulated over blocks.
- Terms alone, or a gradient from known terms: a kernel set may choose tiles of the vocabulary with all tokens. The
  gradient of a tile's rows of the weight then takes one product, and is written in the weight's own dtype.

Memory: the gradients, the logits of a block, and E, which overwrites the logits if it has their dtype. Otherwise a
logit takes twice the bytes of an entry of E, and logits may exist for fewer tokens at a time.
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
from loss_core_torch.kernels.terms import concatenate_terms
from loss_core_torch.tracing import is_readable

# Scaling brings the largest coefficient to this exponent of frexp; see `_scale_exponent`.
_FLOAT16_EXPONENT = 15


def terms(kernels: KernelSet, linear: Linear, sums: Sums, keep_logits: bool) -> tuple[RowTerms, Tensor]:
    """Terms over these rows of the weight, and the logits to pass to `grads`.

    Args:
        keep_logits: whether `grads` will follow. If False, or if the logits exceed the memory of one block or
            `block_tokens` rows, the second result is empty.
    """
    head = Head(kernels, linear.head)
    blocks = _tiles(kernels, linear, head, keep_logits)
    buffer, parts = head.empty(blocks.logits_tokens * blocks.classes), dict[int, RowTerms]()
    for tile in slices(0, head.vocab, blocks.classes):
        tile_head = head.slice_classes(tile)
        for tokens in slices(0, head.num_tokens, blocks.logits_tokens):
            z_BC = _matrix(buffer, tokens, tile)
            tile_head.compute_logits(tokens, z_BC)
            part, first = kernels.row_terms(_rows(linear, tokens, tile, z_BC), sums), tokens.start
            parts[first] = combine(torch, parts[first], part) if first in parts else part
    is_kept = keep_logits and (blocks.logits_tokens, blocks.classes) == (head.num_tokens, head.vocab)
    return concatenate_terms(list(parts.values())), buffer if is_kept else buffer.new_empty(0)


def terms_and_grads(
    kernels: KernelSet, linear: Linear, coef_T: Tensor, objective: Objective, want: Wanted
) -> tuple[RowTerms, LinearGrads]:
    """Terms, and the gradients of the sum of coef * loss in the dtype of the arithmetic, with three products.

    A coefficient of 0 gives a gradient of 0, whatever the row holds.
    """
    head = Head(kernels, linear.head)
    all_classes = slice(0, head.vocab)
    exponent = _scale_exponent(head, [coef_T], headroom=objective.headroom)
    coef_T = _scaled(coef_T, exponent)
    memory = _Memory(head, _chunks(kernels, linear, head, want))
    parts, head_grads = list[RowTerms](), HeadGrads(kernels, head, want, factor=_inverse_scale(head, exponent))
    for chunk in memory.chunks():
        e_chunk_BV = memory.gradient(chunk, all_classes)
        for tokens, z_BV, e_BV in memory.parts(chunk, e_chunk_BV):
            head.compute_logits(tokens, z_BV)
            rows = _rows(linear, tokens, all_classes, z_BV)
            part, *_ = kernels.row_terms_and_grad(rows, coef_T[tokens], objective.of_rows(tokens), out=e_BV)
            parts.append(part)
        head_grads.add(head, all_classes, chunk, e_chunk_BV)
    return concatenate_terms(parts), head_grads.result()


def grads(
    kernels: KernelSet, linear: Linear, terms: RowTerms, coefficients: Coefficients, want: Wanted, logits: Tensor
) -> LinearGrads:
    """Gradients of h in the dtype of the arithmetic, and of W and b in their own dtypes.

    Args:
        terms, coefficients: over the full vocabulary; coefficients of 0 give a gradient of 0, whatever the row holds.
        want: which gradients are computed; the others are empty.
        logits: from `terms`, overwritten; empty: they are recomputed.
    """
    head, is_kept = Head(kernels, linear.head), logits.numel() > 0
    exponent = _scale_exponent(head, coefficients)
    coefficients = Coefficients(*(None if c_T is None else _scaled(c_T, exponent) for c_T in coefficients[:4]))
    one_block = Blocks(head.num_tokens, head.num_tokens, head.vocab)
    blocks = one_block if is_kept else _tiles(kernels, linear, head, together=False)
    memory = _Memory(head, blocks, logits if is_kept else None)
    parts = {x.start: _block_terms(x, terms, coefficients) for chunk in memory.chunks() for x in memory.slices(chunk)}
    all_tokens, factor = blocks.tokens >= head.num_tokens, _inverse_scale(head, exponent)
    head_grads = HeadGrads(kernels, head, want, rounded=True, all_tokens=all_tokens, factor=factor)
    for tile in slices(0, head.vocab, blocks.classes):
        tile_head = head.slice_classes(tile)
        for chunk in memory.chunks():
            e_BC = memory.gradient(chunk, tile)
            for tokens, z_BC, out_BC in memory.parts(chunk, e_BC):
                if not is_kept:
                    tile_head.compute_logits(tokens, z_BC)
                rows, part = _rows(linear, tokens, tile, z_BC), parts[tokens.start]
                kernels.row_grad(rows._replace(keep_T=part.keep_B), part.terms, part.coefficients, out=out_BC)
            head_grads.add(tile_head, tile, chunk, e_BC)
    return head_grads.result()


def _rows(linear: Linear, tokens: slice, tile: slice, z_BC: Tensor) -> Rows:
    """The logits of a block, with its targets and options."""
    inverse_T = linear.inverse_temperature_T
    inverse_B = None if inverse_T is None else inverse_T[tokens]
    return Rows(z_BC, linear.labels_T[tokens], None, linear.vocab_start + tile.start, linear.softcap, inverse_B)


class _BlockTerms(NamedTuple):
    """Terms and coefficients of the tokens of a block.

    Attributes:
        keep_B: [B] bool, True where a coefficient is not 0; None if all are True and may be read without a sync.
    """

    terms: RowTerms
    coefficients: Coefficients
    keep_B: Tensor | None


def _block_terms(tokens: slice, terms: RowTerms, coefficients: Coefficients) -> _BlockTerms:
    coefficients, terms = coefficients.of_rows(tokens), RowTerms(terms.m[tokens], terms.s[tokens], terms.t[tokens])
    nonzero_B = [(c_B if c_B.dim() == 1 else c_B.any(-1)) != 0 for c_B in coefficients[:4] if c_B is not None]
    keep_B = reduce(torch.logical_or, nonzero_B)
    is_all = is_readable(keep_B) and bool(keep_B.all())
    return _BlockTerms(terms, coefficients, None if is_all else keep_B)


def _chunks(kernels: KernelSet, linear: Linear, head: Head, want: Wanted) -> Blocks:
    """Block sizes with all classes, within `block_tokens`."""
    is_rounded = want.weight and head.weight_dtype != head.dtype
    rounded_bytes = linear.head.w_VH.numel() * head.weight_dtype.itemsize if is_rounded else 0
    blocks = kernels.chunks(head.sizes(rounded_bytes))
    return Blocks(linear.block(blocks.tokens), linear.block(blocks.logits_tokens), head.vocab)


def _tiles(kernels: KernelSet, linear: Linear, head: Head, together: bool) -> Blocks:
    """Block sizes with all or some of the tokens and of the classes, within `block_tokens`.

    Args:
        together: put all logits into one block if they fit its memory.
    """
    is_unlimited = linear.block(head.num_tokens) == head.num_tokens
    num_tokens, logits_tokens, classes = kernels.tiles(head.sizes(), together and is_unlimited)
    num_tokens = min(num_tokens, head.num_tokens)
    if linear.block(num_tokens) < num_tokens:
        # E of a tile may have as many entries as `block_tokens` rows of the full vocabulary.
        limit = linear.block_tokens * head.vocab // num_tokens
        classes = max(min(classes, limit // TILE_MULTIPLE * TILE_MULTIPLE or limit), 1)
    return Blocks(num_tokens, min(linear.block(logits_tokens), num_tokens), classes)


class _Memory:
    """Memory for the logits of a block and for their gradient E, reused by all blocks.

    Args:
        logits: the logits of all tokens and classes if they were kept; overwritten.
    """

    def __init__(self, head: Head, blocks: Blocks, logits: Tensor | None = None) -> None:
        self._num_tokens, self._blocks, self._is_aliased = head.num_tokens, blocks, head.operand_dtype == head.dtype
        num_tokens = min(blocks.tokens if self._is_aliased else blocks.logits_tokens, max(head.num_tokens, 1))
        self._logits = head.empty(num_tokens * blocks.classes) if logits is None else logits
        e_size = min(blocks.tokens, head.num_tokens) * blocks.classes
        self._e = self._logits if self._is_aliased else head.empty(e_size, dtype=head.operand_dtype)

    def chunks(self) -> Iterator[slice]:
        """Ranges of tokens whose E exists at a time."""
        return slices(0, self._num_tokens, self._blocks.tokens)

    def slices(self, chunk: slice) -> Iterator[slice]:
        """Ranges of a chunk's tokens whose logits exist at a time."""
        return slices(chunk.start, chunk.stop, self._blocks.logits_tokens)

    def gradient(self, chunk: slice, tile: slice) -> Tensor:
        """Memory for E of a chunk and a tile."""
        return _matrix(self._e, chunk, tile)

    def parts(self, chunk: slice, e_BC: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The `slices` of a chunk, each with memory for its logits and with its rows of E."""
        for tokens in self.slices(chunk):
            part = e_BC[tokens.start - chunk.start : tokens.stop - chunk.start]
            yield tokens, part if self._is_aliased else self._logits[: part.numel()].view(part.shape), part


def _matrix(buffer: Tensor, tokens: slice, tile: slice) -> Tensor:
    """[B, C], contiguous, at the start of a buffer."""
    shape = tokens.stop - tokens.start, tile.stop - tile.start
    return buffer[: shape[0] * shape[1]].view(shape)


def _scale_exponent(head: Head, factors: Sequence[Tensor | None], headroom: int = 0) -> Tensor | None:
    """n of the factor 2^n that keeps the gradient in the range of float16 operands; None for operands of other dtypes.

    Unscaled, a mean over 8192 tokens would make the gradient of every probability below 2e-4 too small for float16. The
    largest factor becomes at least 2^14 (float16 ends at 2^16): then a probability of 2^-28 is still a normal number.

    Args:
        factors: per row, those of exponentials among them.
        headroom: binary digits by which the gradient may be larger than the factors.
    """
    if head.operand_dtype != torch.float16 or head.num_tokens == 0:
        return None
    # NaN marks a single token; it must not reach the others.
    largest = [factor.nan_to_num(nan=0.0).abs().amax() for factor in factors if factor is not None]
    _, exponent = torch.frexp(torch.stack(largest).amax())
    return _FLOAT16_EXPONENT - headroom - exponent.clamp(-100, 100)


def _scaled(x_T: Tensor, exponent: Tensor | None) -> Tensor:
    return x_T if exponent is None else torch.ldexp(x_T, exponent)


def _inverse_scale(head: Head, exponent: Tensor | None) -> Tensor | None:
    """2^-n, a scalar in the dtype of the arithmetic."""
    return None if exponent is None else torch.ldexp(torch.ones_like(exponent, dtype=head.dtype), -exponent)
