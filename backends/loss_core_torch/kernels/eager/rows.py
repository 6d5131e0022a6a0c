"""Rows of logits in PyTorch operations: terms, and a gradient from coefficients; see `KernelSet`.

The laws stand in `loss_core.row_terms`, the blocks in `row_blocks`.
"""

# T = tokens, B = rows of a block, V = vocabulary (of this rank)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from loss_core.row_terms import Coefficients, Objective, RowTerms, cross_entropy_coefficients
from loss_core_torch.kernels import NEW, Into, Rows
from loss_core_torch.kernels.eager.row_blocks import (
    Block,
    Buffer,
    blocks,
    clear_ignored,
    is_one,
    log2_exp,
    row_sums,
    without,
)
from loss_core_torch.kernels.eager.sizes import Sizes
from loss_core_torch.tracing import compute_dtype


class RowKernels:
    """The `row_` methods of a `KernelSet`."""

    sizes: Sizes

    def row_terms(self, rows: Rows, objective: Objective) -> RowTerms:
        """Terms of each row."""
        found, walk = _empty_terms(rows, objective), _Walk(rows, self.sizes)
        for block in walk:
            part, _ = walk.block_terms(block, objective)
            _put_terms(found, block, part)
        return found

    def row_grad(self, rows: Rows, terms: RowTerms, coefficients: Coefficients, into: Into = NEW) -> Tensor:
        """Gradient by the logits."""
        out = into.out
        if out is not None and is_one(into.unless_one):
            return out
        out, walk = _result(rows, out), _Walk(rows, self.sizes)
        for block in walk:
            z_BV = block.take(rows.logits)
            y_BV = walk.buffer.take(z_BV)
            number_B = log2_exp(walk.buffer.widened(z_BV), 1.0, terms.m[block.at], y_BV)
            part = Coefficients(*(None if c_T is None else c_T[block.at] for c_T in coefficients))
            walk.store(block, out, walk.buffer.exp2(y_BV), number_B, part)
        return out

    def row_terms_and_grad(self, rows: Rows, coef_T: Tensor, objective: Objective) -> tuple[RowTerms, Tensor]:
        """Terms, and the gradient of the sum of coef * loss."""
        found, out, walk = _empty_terms(rows, objective), _result(rows, None), _Walk(rows, self.sizes)
        for block in walk:
            part, (powers_BV, number_B) = walk.block_terms(block, objective)
            _put_terms(found, block, part)
            coefficients = cross_entropy_coefficients(torch, part, coef_T[block.at], objective)
            walk.store(block, out, powers_BV, number_B, coefficients)
        return found, out


class _Walk:
    """The blocks of a call, and what is the same in all of them."""

    def __init__(self, rows: Rows, sizes: Sizes) -> None:
        vocab, self._rows = rows.logits.shape[-1], rows
        self._block_rows = min(sizes.block_rows(vocab, rows.logits.device), max(rows.labels_T.numel(), 1))
        self.buffer = Buffer(self._block_rows, rows.logits, compute_dtype(rows.logits.dtype))
        local_T = rows.labels_T - rows.vocab_start
        self._owned_T = (local_T >= 0) & (local_T < vocab)
        self._column_T = torch.where(self._owned_T, local_T, 0)

    def __iter__(self) -> Iterator[Block]:
        return blocks(self._block_rows, self._rows.keep_T, self._rows.logits)

    def block_terms(self, block: Block, objective: Objective) -> tuple[RowTerms, tuple[Tensor, Tensor | None]]:
        """Terms of a block; and 2^y with the row's number, as `log2_exp` has them, in the buffer."""
        z_BV = block.take(self._rows.logits)
        y_BV = self.buffer.take(z_BV)
        z_BV = self.buffer.widened(z_BV)
        m_B = z_BV.amax(-1)
        t_B = z_BV.gather(1, self._column_T[block.at, None])[:, 0].masked_fill_(~self._owned_T[block.at], -torch.inf)
        z_sum_B = row_sums(z_BV) if objective.needs_z_sum else None
        number_B = log2_exp(z_BV, 1.0, m_B, y_BV)
        powers_BV = self.buffer.exp2(y_BV)
        return RowTerms(m_B, without(number_B, row_sums(powers_BV)), t_B, z_sum_B), (powers_BV, number_B)

    def store(
        self, block: Block, out: Tensor, powers_BV: Tensor, number_B: Tensor | None, coefficients: Coefficients
    ) -> None:
        """scale * powers - uniform, plus `target` at the target's column; 0 in ignored rows; rounded once."""
        view_BV = block.view(out)
        into_BV = view_BV if view_BV is not None and view_BV.dtype == powers_BV.dtype else powers_BV
        torch.mul(powers_BV, without(number_B, coefficients.scale)[:, None], out=into_BV)
        if coefficients.uniform is not None:
            into_BV -= coefficients.uniform[:, None]
        target_B = torch.where(self._owned_T[block.at], coefficients.target, 0.0)
        into_BV.scatter_add_(1, self._column_T[block.at, None], target_B[:, None])
        keep_T = self._rows.keep_T
        if keep_T is not None and isinstance(block.at, slice):
            # Not a product with 0: an ignored row may hold inf or NaN.
            into_BV.masked_fill_(~keep_T[block.at, None], 0.0)
        if into_BV is not view_BV:
            block.put(out, into_BV)


def _empty_terms(rows: Rows, objective: Objective) -> RowTerms:
    """Terms to be filled in; of no class where there is none, finite numbers for rows that no block holds."""
    like: dict[str, Any] = {"dtype": compute_dtype(rows.logits.dtype), "device": rows.logits.device}
    shape = rows.labels_T.shape
    z_sum_T = torch.zeros(shape, **like) if objective.needs_z_sum else None
    if rows.logits.shape[-1] == 0:
        empty_T = torch.full(shape, -torch.inf, **like)
        return RowTerms(empty_T, torch.zeros(shape, **like), empty_T.clone(), z_sum_T)
    return RowTerms(torch.zeros(shape, **like), torch.ones(shape, **like), torch.zeros(shape, **like), z_sum_T)


def _put_terms(found: RowTerms, block: Block, part: RowTerms) -> None:
    for whole_T, part_B in zip(found, part, strict=True):
        if whole_T is not None:
            whole_T[block.at] = part_B


def _result(rows: Rows, out: Tensor | None) -> Tensor:
    """Where a gradient goes, with zeros in ignored rows that no block may hold."""
    if out is None:
        out = torch.empty(rows.logits.shape, dtype=rows.logits.dtype, device=rows.logits.device)
    clear_ignored(out, rows.keep_T)
    return out
