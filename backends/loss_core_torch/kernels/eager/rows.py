"""Rows of logits in PyTorch operations: terms, and a gradient from coefficients; see `KernelSet`.

The laws stand in `loss_core.row_terms`, the blocks in `row_blocks`.
"""

# T = tokens, B = rows of a block, V = vocabulary (of this rank)

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from loss_core.row_terms import (
    EMPTY_ROW,
    IGNORED_ROW,
    Coefficients,
    Objective,
    RowTerms,
    Sums,
)
from loss_core_torch.kernels import Rows
from loss_core_torch.kernels.eager.exponentials import (
    exponents,
    log2_exp,
    row_dots,
    row_sums,
    softcap_slope,
    to_gradient,
    without,
)
from loss_core_torch.kernels.eager.row_blocks import Block, Buffer, blocks, clear_ignored
from loss_core_torch.kernels.eager.sizes import Sizes
from loss_core_torch.kernels.terms import Targets, by_logits, filled_terms, folded, no_coefficients, with_zeros
from loss_core_torch.tracing import compute_dtype, is_readable


class RowKernels:
    """The `row_` methods of a `KernelSet`."""

    sizes: Sizes

    def row_terms(self, rows: Rows, sums: Sums) -> RowTerms:
        """Terms of each row."""
        found, walk = _empty_terms(rows, sums), _Walk(rows, self.sizes)
        for block in walk:
            _put(found, block, walk.terms(block, sums)[0])
        return found

    def row_grad(self, rows: Rows, terms: RowTerms, coefficients: Coefficients, out: Tensor | None = None) -> Tensor:
        """Gradient by the logits."""
        out, walk, coefficients = _result(rows, out), _Walk(rows, self.sizes), folded(coefficients)
        for block in walk:
            kept_BV, slope_BV = walk.read(block, for_gradient=True)
            powers = walk.powers(block, kept_BV, terms.m[block.at], with_x=coefficients.slope is not None)
            keep_B = walk.kept(block)
            walk.store(block, out, powers, slope_BV, coefficients.of_rows(block.at), terms.t[block.at], keep_B)
        return out

    def row_terms_and_grad(
        self, rows: Rows, coef_T: Tensor, objective: Objective, out: Tensor | None = None
    ) -> tuple[RowTerms, Tensor, Coefficients]:
        """Terms, the gradient of the sum of coef * loss, and its coefficients."""
        found, out, walk = _empty_terms(rows, objective.sums), _result(rows, out), _Walk(rows, self.sizes)
        coefficients = no_coefficients(rows.labels_T, compute_dtype(rows.logits.dtype))
        for block in walk:
            part, powers, slope_BV = walk.terms(block, objective.sums, for_gradient=True)
            coef_B = coef_T[block.at]
            of_block = objective.of_rows(block.at).coefficients(torch, part, [coef_B])
            walk.store(block, out, powers, slope_BV, of_block, part.t, walk.kept(block, coef_B))
            coefficients = with_zeros(coefficients, of_block)
            _put(found, block, part)
            _put(coefficients, block, of_block)
        return found, out, coefficients


class _Powers(NamedTuple):
    """exp(z - m) of a block as powers / 2^number, in the buffer; and z - m where it was asked for."""

    powers_BV: Tensor
    number_B: Tensor | None
    x_BV: Tensor | None


class _Walk:
    """The blocks of a call, and what is the same in all of them."""

    def __init__(self, rows: Rows, sizes: Sizes) -> None:
        vocab, self._rows = rows.logits.shape[-1], rows
        self._block_rows = min(sizes.block_rows(vocab, rows.logits.device), max(len(rows.labels_T), 1))
        self._buffer = self._new_buffer()
        # A logit is what `read` gives times this.
        self._factor = rows.softcap or 1.0
        self._targets = Targets.of(rows.labels_T, rows.vocab_start, vocab)

    def __iter__(self) -> Iterator[Block]:
        return blocks(self._block_rows, self._rows.keep_T, self._rows.logits)

    @cached_property
    def _slopes(self) -> Buffer:
        return self._new_buffer()

    @cached_property
    def _exponents(self) -> Buffer:
        return self._new_buffer()

    def _new_buffer(self) -> Buffer:
        return Buffer(self._block_rows, self._rows.logits, compute_dtype(self._rows.logits.dtype))

    def read(self, block: Block, for_gradient: bool = False) -> tuple[Tensor, Tensor | None]:
        """Logits z of a block but for a factor, and the slope of the softcap where there is one, for a gradient."""
        raw_BV, slope_BV, rows = block.take(self._rows.logits), None, self._rows
        z_BV = self._buffer.widened(raw_BV)
        if rows.softcap:
            z_BV = torch.div(z_BV, rows.softcap, out=self._buffer.take(raw_BV)).tanh_()
            slope_BV = softcap_slope(z_BV, self._slopes.take(z_BV)) if for_gradient else None
        if rows.inverse_temperature_T is not None:
            z_BV = torch.mul(z_BV, rows.inverse_temperature_T[block.at, None], out=self._buffer.take(raw_BV))
        return z_BV, slope_BV

    def powers(self, block: Block, z_BV: Tensor, m_B: Tensor, with_x: bool) -> _Powers:
        """Exponentials of a block, in the place of what `read` has given."""
        y_BV = self._buffer.take(z_BV)
        number_B = log2_exp(z_BV, self._factor, m_B, y_BV)
        x_BV = exponents(y_BV, number_B, self._exponents.take(y_BV)) if with_x else None
        return _Powers(self._buffer.exp2(y_BV), number_B, x_BV)

    def terms(self, block: Block, sums: Sums, for_gradient: bool = False) -> tuple[RowTerms, _Powers, Tensor | None]:
        """Terms of a block, and what its gradient is made of."""
        z_BV, slope_BV = self.read(block, for_gradient)
        targets = self._targets.at(block.at)
        t_B = targets.read(z_BV, -torch.inf) * self._factor
        if not targets.is_one:
            z_BV = self._buffer.own(z_BV)
            targets.write(z_BV, -torch.inf)
        m_B = z_BV.amax(-1) * self._factor
        z_sum_B = row_sums(z_BV) * self._factor if sums.z_sum else None
        powers = self.powers(block, z_BV, m_B, with_x=sums.e)
        s_B = without(powers.number_B, row_sums(powers.powers_BV))
        e_B = None if powers.x_BV is None else without(powers.number_B, row_dots(powers.powers_BV, powers.x_BV))
        return RowTerms(m_B, s_B, t_B, z_sum_B, e_B), powers, slope_BV

    def kept(self, block: Block, coef_B: Tensor | None = None) -> Tensor | None:
        """[B] bool: rows of a block that are not ignored and have a coefficient; None where the host can see it."""
        keep_T = self._rows.keep_T
        # A block that is no slice holds no ignored row.
        keep_B = keep_T[block.at] if keep_T is not None and isinstance(block.at, slice) else None
        if coef_B is not None and not (is_readable(coef_B) and bool(coef_B.all())):
            keep_B = coef_B != 0 if keep_B is None else keep_B & (coef_B != 0)
        return keep_B

    def store(
        self,
        block: Block,
        out: Tensor,
        powers: _Powers,
        slope_BV: Tensor | None,
        coefficients: Coefficients,
        t_B: Tensor,
        keep_B: Tensor | None,
    ) -> None:
        """The gradient of a block, given z of its targets; 0 in rows not to keep; rounded once."""
        inverse_T = self._rows.inverse_temperature_T
        inverse_B = None if inverse_T is None else inverse_T[block.at]
        coefficients = by_logits(coefficients, t_B, self._rows.softcap, inverse_B)
        powers_BV, number_B, x_BV = powers
        view_BV = block.view(out)
        into_BV = view_BV if view_BV is not None and view_BV.dtype == powers_BV.dtype else powers_BV
        to_gradient(powers_BV, number_B, coefficients, x_BV, slope_BV, into_BV)
        self._targets.at(block.at).write(into_BV, coefficients.target)
        if keep_B is not None:
            # Not a product with 0: such a row may hold inf or NaN.
            into_BV.masked_fill_(~keep_B[:, None], 0.0)
        if into_BV is not view_BV:
            block.put(out, into_BV)


def _empty_terms(rows: Rows, sums: Sums) -> RowTerms:
    """Terms to be filled in; of no class where there is none, finite numbers for rows that no block holds."""
    dtype = compute_dtype(rows.logits.dtype)
    values = IGNORED_ROW if rows.logits.shape[-1] else EMPTY_ROW
    return filled_terms(values, sums, rows.labels_T, dtype)


def _put(found: RowTerms | Coefficients, block: Block, part: RowTerms | Coefficients) -> None:
    for whole_T, part_B in zip(found, part, strict=True):
        if whole_T is not None:
            whole_T[block.at] = part_B


def _result(rows: Rows, out: Tensor | None) -> Tensor:
    """Where a gradient goes, with zeros in ignored rows that no block may hold."""
    if out is None:
        out = torch.empty(rows.logits.shape, dtype=rows.logits.dtype, device=rows.logits.device)
    clear_ignored(out, rows.keep_T)
    return out
