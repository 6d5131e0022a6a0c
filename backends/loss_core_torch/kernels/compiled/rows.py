"""Rows of logits as compiled loops; see `KernelSet`."""

# T = tokens, B = rows of a block, V = vocabulary (of this rank)

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from loss_core.row_terms import EMPTY_ROW, Coefficients, Objective, RowTerms, Sums, cross_entropy_coefficients
from loss_core_torch.kernels import NEW, Into, Rows
from loss_core_torch.kernels.compiled import formulas
from loss_core_torch.kernels.compiled.approximate_maximum import applies, approximate_maximum, is_accurate
from loss_core_torch.kernels.compiled.matrices import matrices, padded_rows, write
from loss_core_torch.kernels.compiled.programs import run
from loss_core_torch.kernels.eager.row_blocks import Block, is_one
from loss_core_torch.kernels.terms import filled_terms, joined_terms, times
from loss_core_torch.tracing import compute_dtype


class RowKernels:
    """The `row_` methods of a `KernelSet`."""

    def row_terms(self, rows: Rows, sums: Sums) -> RowTerms:
        """Terms of each row."""
        found, targets = [], _Targets(rows)
        for block, (z_BV,) in matrices(rows.logits):
            t_B = targets.logits(z_BV, block.at)
            inverse_B = _padded(rows.inverse_temperature_T, block)
            found.append(_found(block, rows, t_B, _terms(z_BV, inverse_B, padded_rows(t_B), rows.softcap, sums), sums))
        return _together(found, rows, sums)

    def row_grad(self, rows: Rows, terms: RowTerms, coefficients: Coefficients, into: Into = NEW) -> Tensor:
        """Gradient by the logits."""
        out = into.out
        if out is not None and is_one(into.unless_one):
            return out
        aliased = out is not None and out.data_ptr() == rows.logits.data_ptr()
        out = _result(rows) if out is None else out
        targets, inverse_T = _Targets(rows), rows.inverse_temperature_T
        coefficients = coefficients if inverse_T is None else times(coefficients, inverse_T)
        of_rows = (targets.keep_T, terms.m, coefficients.scale, coefficients.uniform, coefficients.slope)
        for block, (z_BV,) in matrices(rows.logits, copied=aliased):
            args = [z_BV, _padded(inverse_T, block), *(_padded(x_T, block) for x_T in of_rows)]
            write(out, block, aliased, partial(_run_into, formulas.row_grad, args, None, (rows.softcap,)))
        targets.write(out, terms, coefficients)
        return out

    def row_terms_and_grad(self, rows: Rows, coef_T: Tensor, objective: Objective) -> tuple[RowTerms, Tensor]:
        """Terms, and the gradient of the sum of coef * loss."""
        parts, found = list[RowTerms](), list[tuple[Tensor, ...]]()
        out, targets = _result(rows), _Targets(rows)
        for block, (z_BV,) in matrices(rows.logits):
            t_B = targets.logits(z_BV, block.at)
            of_rows = (rows.inverse_temperature_T, targets.keep_T, None, coef_T)
            args = [z_BV, *(_padded(x_T, block) for x_T in of_rows)]
            args[3] = padded_rows(t_B)

            def program(into_BV: Tensor, args: list[Any] = args) -> None:
                found.append(_terms_and_grad(args, into_BV, rows.softcap, objective))

            write(out, block, False, program)
            parts.append(_found(block, rows, t_B, found.pop(), objective.sums))
        terms = _together(parts, rows, objective.sums)
        coefficients = cross_entropy_coefficients(torch, terms, coef_T, objective)
        inverse_T = rows.inverse_temperature_T
        targets.write(out, terms, coefficients if inverse_T is None else times(coefficients, inverse_T))
        return terms, out


def _terms(z_BV: Tensor, inverse_B: Tensor | None, t_B: Tensor, softcap: float, sums: Sums) -> tuple[Tensor, ...]:
    """m and s of each row, and what else is wanted."""
    if not (softcap or any(sums)) and inverse_B is None and applies(z_BV):
        m_B = approximate_maximum(z_BV, t_B)
        s_B = run(formulas.row_sum_around, z_BV, m_B)
        if is_accurate(s_B):
            return m_B, s_B
    return tuple(run(formulas.row_terms, z_BV, inverse_B, static=(softcap, *sums)))


def _terms_and_grad(args: list[Any], into_BV: Tensor, softcap: float, objective: Objective) -> tuple[Tensor, ...]:
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
    """The target's column in each row, where these columns hold it.

    Attributes:
        keep_T: [T] bool.
    """

    def __init__(self, rows: Rows) -> None:
        column_T, vocab = rows.labels_T - rows.vocab_start, rows.logits.shape[-1]
        self._owned_T = (column_T >= 0) & (column_T < vocab)
        self._column_T = torch.where(self._owned_T, column_T, 0)
        self.keep_T = torch.ones_like(self._owned_T) if rows.keep_T is None else rows.keep_T
        self._softcap, self._inverse_T = rows.softcap, rows.inverse_temperature_T

    def logits(self, z_BV: Tensor, at: slice | Tensor) -> Tensor:
        """z of the target of each row of a block, in the dtype of the arithmetic; -inf where there is none."""
        column_B = self._column_T[at]
        t_B = z_BV[torch.arange(column_B.numel(), device=column_B.device), column_B].to(compute_dtype(z_BV.dtype))
        if self._softcap:
            t_B = self._softcap * (t_B / self._softcap).tanh()
        if self._inverse_T is not None:
            t_B = t_B * self._inverse_T[at]
        return torch.where(self._owned_T[at], t_B, -torch.inf)

    def write(self, out: Tensor, terms: RowTerms, coefficients: Coefficients) -> None:
        """The gradient at the target's column, from its logit, rounded once; 0 in ignored rows.

        Args:
            coefficients: times the inverse temperature.
        """
        if not out.numel():
            return
        # -inf minus -inf is NaN.
        x_T = terms.t - torch.where(terms.m == -torch.inf, 0.0, terms.m)
        power_T = x_T.exp()
        grad_T = power_T * coefficients.scale + coefficients.target
        if coefficients.slope is not None:
            grad_T = grad_T + torch.where(power_T == 0, 0.0, power_T * x_T) * coefficients.slope
        if coefficients.uniform is not None:
            grad_T = grad_T - coefficients.uniform
        if self._softcap:
            capped_T = terms.t if self._inverse_T is None else terms.t / self._inverse_T
            grad_T = grad_T * (1.0 - (capped_T / self._softcap).square())
        grad_T = torch.where(self.keep_T, grad_T, 0.0).to(out.dtype)
        leading = torch.unravel_index(torch.arange(self._column_T.numel(), device=out.device), out.shape[:-1])
        at = (*leading, self._column_T)
        out[at] = torch.where(self._owned_T, grad_T, out[at])


def _result(rows: Rows) -> Tensor:
    return torch.empty(rows.logits.shape, dtype=rows.logits.dtype, device=rows.logits.device)


def _together(parts: list[RowTerms], rows: Rows, sums: Sums) -> RowTerms:
    """Terms of all rows from those of the blocks; of no class where there is no block."""
    if not parts:
        dtype = compute_dtype(rows.logits.dtype)
        return filled_terms(EMPTY_ROW, sums, rows.labels_T.new_empty(rows.labels_T.shape, dtype=dtype))
    return joined_terms(parts)
