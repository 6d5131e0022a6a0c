"""Rows of logits as compiled loops; see `KernelSet`."""

# T = tokens, B = rows of a block, K = targets of a row, V = vocabulary (of this rank)

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loss_core.row_terms import (
    EMPTY_ROW,
    Coefficients,
    CrossEntropy,
    Objective,
    RowTerms,
    Sums,
)
from loss_core_torch.kernels import Rows
from loss_core_torch.kernels.compiled import formulas, one_column
from loss_core_torch.kernels.compiled.approximate_maximum import applies, approximate_maximum, is_accurate
from loss_core_torch.kernels.compiled.matrices import COPIED_ELEMENTS, matrices, padded_rows, write
from loss_core_torch.kernels.compiled.programs import run
from loss_core_torch.kernels.eager.row_blocks import Block
from loss_core_torch.kernels.eager.sizes import SIZES
from loss_core_torch.kernels.terms import Targets, by_logits, filled_terms, folded, joined_terms, per_row
from loss_core_torch.tracing import compute_dtype


class RowKernels:
    """The `row_` methods of a `KernelSet`."""

    def row_terms(self, rows: Rows, sums: Sums) -> RowTerms:
        """Terms of each row."""
        if one_column.applies(rows):
            return self.row_terms(one_column.uncapped(rows)[0], sums)
        found, targets = [], _Targets(rows)
        if rows.labels_T.dim() == 2:
            parts = [_others(z_BV, block, rows, targets, sums) for block, z_BV in _blocks(rows, keeps=True)]
            return _together(parts, rows, sums)
        for block, z_BV in _blocks(rows, keeps=rows.softcap != 0):
            t_B = targets.logits(z_BV, block.at)
            inverse_B = _padded(rows.inverse_temperature_T, block)
            found.append(_found(block, rows, t_B, _terms(z_BV, inverse_B, padded_rows(t_B), rows.softcap, sums), sums))
        return _together(found, rows, sums)

    def row_grad(self, rows: Rows, terms: RowTerms, coefficients: Coefficients, out: Tensor | None = None) -> Tensor:
        """Gradient by the logits."""
        if one_column.applies(rows):
            uncapped, slope_TV = one_column.uncapped(rows)
            return one_column.through_softcap(self.row_grad(uncapped, terms, coefficients), slope_TV, rows, out)
        aliased = out is not None and out.data_ptr() == rows.logits.data_ptr()
        out = _result(rows) if out is None else out
        targets, inverse_T = _Targets(rows), rows.inverse_temperature_T
        coefficients = by_logits(folded(coefficients), terms.t, rows.softcap, inverse_T)
        of_rows = (targets.keep_T, terms.m, coefficients.scale, coefficients.uniform, coefficients.slope)
        for block, z_BV in _blocks(rows, keeps=rows.softcap != 0, aliased=aliased):
            args = [z_BV, _padded(inverse_T, block), *(_padded(x_T, block) for x_T in of_rows)]
            write(out, block, aliased, partial(_run_into, formulas.row_grad, args, None, (rows.softcap,)))
        targets.write(out, coefficients.target)
        return out

    def row_terms_and_grad(
        self, rows: Rows, coef_T: Tensor, objective: Objective
    ) -> tuple[RowTerms, Tensor, Coefficients]:
        """Terms, the gradient of the sum of coef * loss, and its coefficients."""
        if rows.labels_T.dim() == 2:
            return _terms_and_grad_of_others(rows, coef_T, objective)
        if not isinstance(objective, CrossEntropy):
            # No compiled program has another in it.
            terms = self.row_terms(rows, objective.sums)
            coefficients = objective.coefficients(torch, terms, [coef_T])
            return terms, self.row_grad(rows, terms, coefficients), coefficients
        if one_column.applies(rows):
            uncapped, slope_TV = one_column.uncapped(rows)
            terms, grad_TV, coefficients = self.row_terms_and_grad(uncapped, coef_T, objective)
            return terms, one_column.through_softcap(grad_TV, slope_TV, rows), coefficients
        parts, found = list[RowTerms](), list[tuple[Tensor, ...]]()
        out, targets = _result(rows), _Targets(rows)
        for block, z_BV in _blocks(rows, keeps=rows.softcap != 0 or objective.z_loss != 0):
            t_B = targets.logits(z_BV, block.at)
            of_rows = (rows.inverse_temperature_T, targets.keep_T, None, coef_T)
            args = [z_BV, *(_padded(x_T, block) for x_T in of_rows)]
            args[3] = padded_rows(t_B)

            def program(into_BV: Tensor, args: list[Any] = args) -> None:
                found.append(_terms_and_grad(args, into_BV, rows.softcap, objective))

            write(out, block, False, program)
            parts.append(_found(block, rows, t_B, found.pop(), objective.sums))
        terms = _together(parts, rows, objective.sums)
        coefficients = objective.coefficients(torch, terms, [coef_T])
        target_T = by_logits(coefficients, terms.t, rows.softcap, rows.inverse_temperature_T).target
        targets.write(out, target_T)
        return terms, out, coefficients


def _blocks(rows: Rows, keeps: bool, aliased: bool = False) -> Iterator[tuple[Block, Tensor]]:
    """Blocks of rows, as few as possible.

    Args:
        keeps: there will be another matrix of each, so that blocks are those that stay in cache. TorchInductor makes
            one of what a heavy function gives for two uses (tanh; exp, where the row's sum has a logarithm).
        aliased: the gradient is written over the logits, and a block of it is copied.
    """
    most = COPIED_ELEMENTS if aliased else None
    if keeps:
        in_cache = SIZES.elements_cpu if rows.logits.device.type == "cpu" else SIZES.elements
        most = min(in_cache, most or in_cache)
    for block, (z_BV,) in matrices(rows.logits, most=most):
        yield block, z_BV


def _others(z_BV: Tensor, block: Block, rows: Rows, targets: _Targets, sums: Sums) -> RowTerms:
    """Terms of rows with K targets, from a copy of their z with -inf there."""
    z_BV, slope_BV = formulas.read(z_BV, _padded(rows.inverse_temperature_T, block), rows.softcap)
    z_BV = z_BV.clone() if slope_BV is None else z_BV
    # A softcap makes a number of a column that was added.
    z_BV[:, rows.logits.shape[-1] :] = -torch.inf
    t_B = targets.take_out(z_BV, block.at)
    return _found(block, rows, t_B, run(formulas.row_terms, z_BV, None, static=(0.0, *sums)), sums)


def _terms_and_grad_of_others(
    rows: Rows, coef_T: Tensor, objective: Objective
) -> tuple[RowTerms, Tensor, Coefficients]:
    """Terms, gradient and its coefficients of rows with K targets, by two programs while a block is in cache."""
    out, targets, inverse_T = _result(rows), _Targets(rows), rows.inverse_temperature_T
    parts, of_targets = list[RowTerms](), list[Tensor]()
    for block, z_BV in _blocks(rows, keeps=True):
        part = _others(z_BV, block, rows, targets, objective.sums)
        coefficients = objective.of_rows(block.at).coefficients(torch, part, [coef_T[block.at]])
        inverse_B = None if inverse_T is None else inverse_T[block.at]
        coefficients = by_logits(coefficients, part.t, rows.softcap, inverse_B)
        of_rows = (targets.keep_T[block.at], part.m, coefficients.scale, coefficients.uniform, coefficients.slope)
        args = [z_BV, _padded(inverse_T, block), *(None if x_B is None else padded_rows(x_B) for x_B in of_rows)]
        write(out, block, False, partial(_run_into, formulas.row_grad, args, None, (rows.softcap,)))
        parts.append(part)
        of_targets.append(coefficients.target)
    if parts:
        targets.write(out, torch.cat(of_targets))
    terms = _together(parts, rows, objective.sums)
    return terms, out, objective.coefficients(torch, terms, [coef_T])


def _terms(z_BV: Tensor, inverse_B: Tensor | None, t_B: Tensor, softcap: float, sums: Sums) -> tuple[Tensor, ...]:
    """m and s of each row, and what else is wanted."""
    if not (softcap or any(sums)) and inverse_B is None and applies(z_BV):
        m_B = approximate_maximum(z_BV, t_B)
        s_B = run(formulas.row_sum_around, z_BV, m_B)
        if is_accurate(s_B):
            return m_B, s_B
    return tuple(run(formulas.row_terms, z_BV, inverse_B, static=(softcap, *sums)))


def _terms_and_grad(args: list[Any], into_BV: Tensor, softcap: float, objective: CrossEntropy) -> tuple[Tensor, ...]:
    """m and s of each row and what else is wanted, and the gradient but for the target's column.

    Args:
        args: logits; the inverse temperature or None, keep, the target's logit and the coefficient of each row.
    """
    z_BV, inverse_B, keep_B, t_B, _ = args
    vocab, *options = objective
    static = (softcap, *options)
    if not (softcap or objective.metrics) and inverse_B is None and applies(z_BV):
        m_B = approximate_maximum(z_BV, t_B)
        found = run(formulas.row_terms_and_grad, *args, m_B, into_BV, vocab=vocab, static=static)
        if is_accurate(found[1], keep_B):
            return tuple(found)
    return tuple(run(formulas.row_terms_and_grad, *args, None, into_BV, vocab=vocab, static=static))


def _run_into(formula: Any, args: list[Any], vocab: int | None, static: tuple[Any, ...], into_BV: Tensor) -> None:
    run(formula, *args, into_BV, vocab=vocab, static=static)


def _padded(x_T: Tensor | None, block: Block) -> Tensor | None:
    """Numbers of the rows of a block."""
    return None if x_T is None else padded_rows(x_T[block.at].contiguous())


def _found(block: Block, rows: Rows, t_B: Tensor, found: tuple[Tensor, ...], sums: Sums) -> RowTerms:
    """Terms of a block from what a program has given: m, s, and of the other sums those that are wanted."""
    m_B, s_B, *rest = (x_B[: block.length()] for x_B in found)
    z_sum_B = rest.pop(0) if sums.z_sum else None
    if z_sum_B is not None and rows.logits.shape[-1] == 1:
        # A column that was added for a vocabulary of one class is no part of the sum.
        z_sum_B = t_B.clone()
    return RowTerms(m_B, s_B, t_B, z_sum_B, rest.pop() if sums.e else None)


class _Targets:
    """The columns of the targets in each row, where these columns hold them.

    Attributes:
        keep_T: [T] bool.
    """

    def __init__(self, rows: Rows) -> None:
        self._targets = Targets.of(rows.labels_T, rows.vocab_start, rows.logits.shape[-1])
        first_T = self._targets.column_TK[:, 0]
        self.keep_T = torch.ones_like(first_T, dtype=torch.bool) if rows.keep_T is None else rows.keep_T
        self._softcap, self._inverse_T = rows.softcap, rows.inverse_temperature_T

    def logits(self, z_BV: Tensor, at: slice | Tensor) -> Tensor:
        """z of the target of each row of a block, in the dtype of the arithmetic; -inf where there is none."""
        targets = self._targets.at(at)
        t_B = targets.read(z_BV[: len(targets.column_TK)], 0.0).to(compute_dtype(z_BV.dtype))
        if self._softcap:
            t_B = self._softcap * (t_B / self._softcap).tanh()
        if self._inverse_T is not None:
            t_B = t_B * self._inverse_T[at]
        # After the softcap, which makes a number of a logit of -inf.
        return targets.here(t_B, -torch.inf)

    def take_out(self, z_BV: Tensor, at: slice | Tensor) -> Tensor:
        """z of the targets of each row of a block, where -inf is left."""
        targets = self._targets.at(at)
        z_BV = z_BV[: len(targets.column_TK)]
        t_B = targets.read(z_BV, -torch.inf)
        targets.write(z_BV, -torch.inf)
        return t_B

    def write(self, out: Tensor, target_T: Tensor) -> None:
        """The gradient at the columns of the targets, rounded once; 0 in ignored rows."""
        if not out.numel():
            return
        target_T, column_TK = torch.where(per_row(self.keep_T, target_T), target_T, 0.0), self._targets.column_TK
        leading = torch.unravel_index(torch.arange(len(column_TK), device=out.device)[:, None], out.shape[:-1])
        at = (*leading, column_TK)
        out[at] = self._targets.placed(out[at], target_T)


def _result(rows: Rows) -> Tensor:
    return torch.empty(rows.logits.shape, dtype=rows.logits.dtype, device=rows.logits.device)


def _together(parts: list[RowTerms], rows: Rows, sums: Sums) -> RowTerms:
    """Terms of all rows from those of the blocks; of no class where there is no block."""
    if not parts:
        dtype = compute_dtype(rows.logits.dtype)
        return filled_terms(EMPTY_ROW, sums, rows.labels_T, dtype)
    return joined_terms(parts)
