"""Rows of logits as compiled loops; see `KernelSet`."""

# T = tokens, B = rows of a block, V = vocabulary (of this rank)

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from loss_core.row_terms import Coefficients, Objective, RowTerms, cross_entropy_coefficients
from loss_core_torch.kernels import NEW, Into, Rows
from loss_core_torch.kernels.compiled import formulas
from loss_core_torch.kernels.compiled.approximate_maximum import applies, approximate_maximum, is_accurate
from loss_core_torch.kernels.compiled.matrices import matrices, padded_rows, write
from loss_core_torch.kernels.compiled.programs import run
from loss_core_torch.kernels.eager.row_blocks import is_one
from loss_core_torch.tracing import compute_dtype


class RowKernels:
    """The `row_` methods of a `KernelSet`."""

    def row_terms(self, rows: Rows, objective: Objective) -> RowTerms:
        """Terms of each row."""
        found, targets = [], _Targets(rows)
        for block, (z_BV,) in matrices(rows.logits):
            t_B = targets.logits(z_BV, block.at)
            m_B, s_B, z_sum_B = (x_B[: block.length()] for x_B in _terms(z_BV, padded_rows(t_B), objective))
            # A column that was added for a vocabulary of one class is no part of the sum.
            z_sum_B = t_B.clone() if rows.logits.shape[-1] == 1 else z_sum_B
            found.append((m_B, s_B, t_B, *([z_sum_B] if objective.needs_z_sum else [])))
        return _together(found, rows, objective)

    def row_grad(self, rows: Rows, terms: RowTerms, coefficients: Coefficients, into: Into = NEW) -> Tensor:
        """Gradient by the logits."""
        out = into.out
        if out is not None and is_one(into.unless_one):
            return out
        aliased = out is not None and out.data_ptr() == rows.logits.data_ptr()
        out = _result(rows) if out is None else out
        targets = _Targets(rows)
        for block, (z_BV,) in matrices(rows.logits, copied=aliased):
            of_rows = [targets.keep_T, terms.m, coefficients.scale]
            if coefficients.uniform is not None:
                of_rows.append(coefficients.uniform)
            formula: Any = formulas.row_grad if coefficients.uniform is None else formulas.row_grad_uniform
            args = [z_BV, *(padded_rows(x_T[block.at].contiguous()) for x_T in of_rows)]
            write(out, block, aliased, partial(run, formula, *args))
        targets.write(out, terms, coefficients)
        return out

    def row_terms_and_grad(self, rows: Rows, coef_T: Tensor, objective: Objective) -> tuple[RowTerms, Tensor]:
        """Terms, and the gradient of the sum of coef * loss."""
        found, out, targets = [], _result(rows), _Targets(rows)
        for block, (z_BV,) in matrices(rows.logits):
            t_B = targets.logits(z_BV, block.at)
            args = [z_BV, *map(padded_rows, (targets.keep_T[block.at], t_B, coef_T[block.at].contiguous()))]

            def program(into_BV: Tensor, args: list[Tensor] = args) -> None:
                found.append(_terms_and_grad(args, into_BV, objective))

            write(out, block, False, program)
            m_B, s_B, z_sum_B = (x_B[: block.length()] for x_B in found.pop())
            z_sum_B = t_B.clone() if rows.logits.shape[-1] == 1 else z_sum_B
            found.append((m_B, s_B, t_B, *([z_sum_B] if objective.needs_z_sum else [])))
        terms = _together(found, rows, objective)
        targets.write(out, terms, cross_entropy_coefficients(torch, terms, coef_T, objective))
        return terms, out


def _terms(z_BV: Tensor, t_B: Tensor, objective: Objective) -> tuple[Tensor, ...]:
    """m, s and z_sum of each row; the last is m where it is not needed."""
    if objective.needs_z_sum:
        return tuple(run(formulas.row_terms_and_sum, z_BV))
    if applies(z_BV):
        m_B = approximate_maximum(z_BV, t_B)
        s_B = run(formulas.row_sum_around, z_BV, m_B)
        if is_accurate(s_B):
            return m_B, s_B, m_B
    m_B, s_B = run(formulas.row_terms, z_BV)
    return m_B, s_B, m_B


def _terms_and_grad(args: list[Tensor], into_BV: Tensor, objective: Objective) -> tuple[Tensor, ...]:
    """m, s and z_sum of each row, and the gradient but for the target's column.

    Args:
        args: logits, keep, the target's logit and the coefficient of each row.
    """
    z_BV, keep_B, t_B, _ = args
    if applies(z_BV):
        m_B = approximate_maximum(z_BV, t_B)
        found = run(formulas.row_terms_and_grad_around, *args, m_B, into_BV, static=tuple(objective))
        if is_accurate(found[1], keep_B):
            return tuple(found)
    return tuple(run(formulas.row_terms_and_grad, *args, into_BV, static=tuple(objective)))


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

    def logits(self, z_BV: Tensor, at: slice | Tensor) -> Tensor:
        """The target's logit of each row of a block, in the dtype of the arithmetic; -inf where there is none."""
        column_B = self._column_T[at]
        t_B = z_BV[torch.arange(column_B.numel(), device=column_B.device), column_B].to(compute_dtype(z_BV.dtype))
        return torch.where(self._owned_T[at], t_B, -torch.inf)

    def write(self, out: Tensor, terms: RowTerms, coefficients: Coefficients) -> None:
        """The gradient at the target's column, from its logit, rounded once; 0 in ignored rows."""
        if not out.numel():
            return
        # -inf minus -inf is NaN.
        power_T = (terms.t - torch.where(terms.m == -torch.inf, 0.0, terms.m)).exp()
        grad_T = power_T * coefficients.scale + coefficients.target
        if coefficients.uniform is not None:
            grad_T = grad_T - coefficients.uniform
        grad_T = torch.where(self.keep_T, grad_T, 0.0).to(out.dtype)
        leading = torch.unravel_index(torch.arange(self._column_T.numel(), device=out.device), out.shape[:-1])
        at = (*leading, self._column_T)
        out[at] = torch.where(self._owned_T, grad_T, out[at])


def _result(rows: Rows) -> Tensor:
    return torch.empty(rows.logits.shape, dtype=rows.logits.dtype, device=rows.logits.device)


def _together(parts: list[tuple[Tensor, ...]], rows: Rows, objective: Objective) -> RowTerms:
    """Terms of all rows from those of the blocks; of no class where there is no block."""
    if parts:
        return RowTerms(*(parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))))
    dtype, device = compute_dtype(rows.logits.dtype), rows.logits.device
    empty_T = torch.full(rows.labels_T.shape, -torch.inf, dtype=dtype, device=device)
    z_sum_T = torch.zeros_like(empty_T) if objective.needs_z_sum else None
    return RowTerms(empty_T, torch.zeros_like(empty_T), empty_T.clone(), z_sum_T)
