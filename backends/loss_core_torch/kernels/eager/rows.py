"""Terms and gradients of rows of logits in PyTorch operations; see `KernelSet`.

Formulas are in `loss_core.row_terms`, blocks in `row_blocks`.
"""

# T = tokens, B = rows of a block, V = vocabulary (of this rank)

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from loss_core.row_terms import EMPTY_ROW, IGNORED_ROW, Coefficients, Objective, RowTerms, Sums
from loss_core_torch.kernels import Rows
from loss_core_torch.kernels.eager.exponentials import (
    exponent_sums,
    finite_exponents,
    log2_exp,
    remove_offset,
    row_sums,
    softcap_slope,
    write_gradient,
)
from loss_core_torch.kernels.eager.row_blocks import Block, Buffer, blocks, zero_ignored
from loss_core_torch.kernels.eager.sizes import Sizes
from loss_core_torch.kernels.terms import Targets, filled_terms, folded, logit_coefficients, no_coefficients, with_zeros
from loss_core_torch.tracing import compute_dtype, is_readable


class RowKernels:
    """The `row_` methods of a `KernelSet`."""

    sizes: Sizes

    def row_terms(self, rows: Rows, sums: Sums) -> RowTerms:
        """Terms of each row."""
        terms, work = _initial_terms(rows, sums), _Workspace(rows, self.sizes)
        for block in work.blocks():
            _write(terms, block, work.terms(block, sums)[0])
        return terms

    def row_grad(self, rows: Rows, terms: RowTerms, coefficients: Coefficients, out: Tensor | None = None) -> Tensor:
        """Gradient of the logits."""
        out, work, coefficients = _initial_grad(rows, out), _Workspace(rows, self.sizes), folded(coefficients)
        for block in work.blocks():
            z_BV, slope_BV = work.read(block, for_gradient=True)
            exps = work.exponentials(block, z_BV, terms.m[block.rows], with_exponents=coefficients.slope is not None)
            of_block, t_B = coefficients.of_rows(block.rows), terms.t[block.rows]
            work.write_grad(block, out, exps, slope_BV, of_block, t_B, work.keep(block))
        return out

    def row_terms_and_grad(
        self, rows: Rows, coef_T: Tensor, objective: Objective, out: Tensor | None = None
    ) -> tuple[RowTerms, Tensor, Coefficients]:
        """Terms, the gradient of the sum of coef * loss, and its coefficients."""
        terms, work = _initial_terms(rows, objective.sums), _Workspace(rows, self.sizes)
        out = _initial_grad(rows, out)
        coefficients = no_coefficients(rows.labels_T, compute_dtype(rows.logits.dtype))
        for block in work.blocks():
            part, exps, slope_BV = work.terms(block, objective.sums, for_gradient=True)
            coef_B = coef_T[block.rows]
            of_block = objective.of_rows(block.rows).coefficients(torch, part, [coef_B])
            work.write_grad(block, out, exps, slope_BV, of_block, part.t, work.keep(block, coef_B))
            coefficients = with_zeros(coefficients, of_block)
            _write(terms, block, part)
            _write(coefficients, block, of_block)
        return terms, out, coefficients


class _Exponentials(NamedTuple):
    """exp(z - m) of a block as exp2 / 2^offset, in the buffer; and, if requested, its `finite_exponents`."""

    exp2_BV: Tensor
    offset_B: Tensor | None
    exponents_BV: Tensor | None


class _Workspace:
    """The blocks of a call, with the buffers that they share."""

    def __init__(self, rows: Rows, sizes: Sizes) -> None:
        vocab, self._rows = rows.logits.shape[-1], rows
        self._block_rows = min(sizes.block_rows(vocab, rows.logits.device), max(len(rows.labels_T), 1))
        self._buffer = self._new_buffer()
        # z is the result of `read` times this factor.
        self._factor = rows.softcap or 1.0
        self._targets = Targets.of(rows.labels_T, rows.vocab_start, vocab)

    def blocks(self) -> Iterator[Block]:
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
        """z / factor of a block; and, for a gradient, the derivative of the softcap if there is one."""
        raw_BV, slope_BV, rows = block.read(self._rows.logits), None, self._rows
        z_BV = self._buffer.upcast(raw_BV)
        if rows.softcap:
            z_BV = torch.div(z_BV, rows.softcap, out=self._buffer.view_as(raw_BV)).tanh_()
            slope_BV = softcap_slope(z_BV, self._slopes.view_as(z_BV)) if for_gradient else None
        if rows.inverse_temperature_T is not None:
            z_BV = torch.mul(z_BV, rows.inverse_temperature_T[block.rows, None], out=self._buffer.view_as(raw_BV))
        return z_BV, slope_BV

    def exponentials(self, block: Block, z_BV: Tensor, m_B: Tensor, with_exponents: bool) -> _Exponentials:
        """Exponentials of a block, in place of the z / factor from `read`."""
        y_BV = self._buffer.view_as(z_BV)
        offset_B = log2_exp(z_BV, self._factor, m_B, y_BV)
        exponents_BV = finite_exponents(y_BV, self._exponents.view_as(y_BV)) if with_exponents else None
        return _Exponentials(self._buffer.exp2_(y_BV), offset_B, exponents_BV)

    def terms(
        self, block: Block, sums: Sums, for_gradient: bool = False
    ) -> tuple[RowTerms, _Exponentials, Tensor | None]:
        """Terms of a block; its exponentials and, for a gradient, the derivative of the softcap."""
        z_BV, slope_BV = self.read(block, for_gradient)
        targets = self._targets.of_rows(block.rows)
        t_B = targets.read(z_BV, -torch.inf) * self._factor
        if not targets.is_one:
            z_BV = self._buffer.writable(z_BV)
            targets.write(z_BV, -torch.inf)
        m_B = z_BV.amax(-1) * self._factor
        z_sum_B = row_sums(z_BV) * self._factor if sums.z_sum else None
        exps = self.exponentials(block, z_BV, m_B, with_exponents=sums.e)
        exp2_BV, offset_B, exponents_BV = exps
        s_B = remove_offset(row_sums(exp2_BV), offset_B)
        e_B = None if exponents_BV is None else exponent_sums(exp2_BV, exponents_BV, offset_B, s_B)
        return RowTerms(m_B, s_B, t_B, z_sum_B, e_B), exps, slope_BV

    def keep(self, block: Block, coef_B: Tensor | None = None) -> Tensor | None:
        """[B] bool: rows not ignored and with a coefficient other than 0; None if all are, and this is readable."""
        keep_T = self._rows.keep_T
        # A block of gathered rows holds no ignored row.
        keep_B = keep_T[block.rows] if keep_T is not None and isinstance(block.rows, slice) else None
        if coef_B is not None and not (is_readable(coef_B) and bool(coef_B.all())):
            keep_B = coef_B != 0 if keep_B is None else keep_B & (coef_B != 0)
        return keep_B

    def write_grad(
        self,
        block: Block,
        out: Tensor,
        exps: _Exponentials,
        slope_BV: Tensor | None,
        coefficients: Coefficients,
        t_B: Tensor,
        keep_B: Tensor | None,
    ) -> None:
        """Write the gradient of a block into out, rounded once; 0 where keep_B is False.

        Args:
            t_B: z of the targets.
        """
        inverse_T = self._rows.inverse_temperature_T
        inverse_B = None if inverse_T is None else inverse_T[block.rows]
        coefficients = logit_coefficients(coefficients, t_B, self._rows.softcap, inverse_B)
        exp2_BV, offset_B, exponents_BV = exps
        view_BV = block.view(out)
        grad_BV = view_BV if view_BV is not None and view_BV.dtype == exp2_BV.dtype else exp2_BV
        write_gradient(exp2_BV, offset_B, coefficients, exponents_BV, slope_BV, grad_BV)
        self._targets.of_rows(block.rows).write(grad_BV, coefficients.target)
        if keep_B is not None:
            # Not a product with 0: such a row may hold inf or NaN.
            grad_BV.masked_fill_(~keep_B[:, None], 0.0)
        if grad_BV is not view_BV:
            block.write(out, grad_BV)


def _initial_terms(rows: Rows, sums: Sums) -> RowTerms:
    """Terms to write blocks into: those of an empty vocabulary, or finite values for rows that blocks skip."""
    dtype = compute_dtype(rows.logits.dtype)
    values = IGNORED_ROW if rows.logits.shape[-1] else EMPTY_ROW
    return filled_terms(values, sums, rows.labels_T, dtype)


def _write(out: RowTerms | Coefficients, block: Block, part: RowTerms | Coefficients) -> None:
    for out_T, part_B in zip(out, part, strict=True):
        if out_T is not None:
            out_T[block.rows] = part_B


def _initial_grad(rows: Rows, out: Tensor | None) -> Tensor:
    """`out`, or a new tensor, with zeros in ignored rows that blocks skip."""
    if out is None:
        out = torch.empty(rows.logits.shape, dtype=rows.logits.dtype, device=rows.logits.device)
    zero_ignored(out, rows.keep_T)
    return out
