"""Terms and gradients of rows of logits in compiled loops; see `KernelSet`."""

# T = tokens, B = rows of a block, K = targets of a row, V = vocabulary (of this rank)

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loss_core.row_terms import EMPTY_ROW, Coefficients, CrossEntropy, Objective, RowTerms, Sums
from loss_core_torch.kernels import Rows
from loss_core_torch.kernels.compiled import approximate_maximum, formulas, one_column
from loss_core_torch.kernels.compiled.matrices import MAX_COPIED_ELEMENTS, matrices, padded_rows, write
from loss_core_torch.kernels.compiled.programs import run
from loss_core_torch.kernels.eager.row_blocks import Block, Buffer
from loss_core_torch.kernels.eager.sizes import SIZES
from loss_core_torch.kernels.terms import Targets, concatenate_terms, filled_terms, folded, logit_coefficients, per_row
from loss_core_torch.tracing import compute_dtype


class RowKernels:
    """The `row_` methods of a `KernelSet`."""

    def row_terms(self, rows: Rows, sums: Sums) -> RowTerms:
        """Terms of each row."""
        if one_column.applies(rows):
            return self.row_terms(one_column.apply_softcap(rows)[0], sums)
        parts, targets = [], _Targets(rows)
        if rows.labels_T.dim() == 2:
            parts = [part for part, *_ in _non_target_terms(rows, targets, sums)]
            return _concatenated(parts, rows, sums)
        # z is used twice, so that TorchInductor may store it.
        max_elements = _elements_in_cache(rows) if rows.softcap and any(sums) else None
        for block, z_BV in _blocks(rows, max_elements):
            t_B = targets.logits(z_BV, block.rows)
            inverse_B = _padded(rows.inverse_temperature_T, block)
            results = _terms(z_BV, inverse_B, padded_rows(t_B), rows.softcap, sums)
            parts.append(_block_terms(block, rows, t_B, results, sums))
        return _concatenated(parts, rows, sums)

    def row_grad(self, rows: Rows, terms: RowTerms, coefficients: Coefficients, out: Tensor | None = None) -> Tensor:
        """Gradient of the logits."""
        if one_column.applies(rows):
            capped, slope_TV = one_column.apply_softcap(rows)
            return one_column.softcap_backward(self.row_grad(capped, terms, coefficients), slope_TV, rows, out)
        aliased = out is not None and out.data_ptr() == rows.logits.data_ptr()
        out = _new_grad(rows) if out is None else out
        targets, inverse_T = _Targets(rows), rows.inverse_temperature_T
        coefficients = logit_coefficients(folded(coefficients), terms.t, rows.softcap, inverse_T)
        row_args = (targets.keep_T, terms.m, coefficients.scale, coefficients.uniform, coefficients.slope)
        for block, z_BV in _blocks(rows, max_elements=MAX_COPIED_ELEMENTS if aliased else None):
            args: list[Any] = [z_BV, _padded(inverse_T, block), *(_padded(x_T, block) for x_T in row_args)]
            write(out, block, aliased, partial(run, formulas.row_grad, *args, static=(rows.softcap,)))
        targets.write(out, coefficients.target)
        return out

    def row_terms_and_grad(
        self, rows: Rows, coef_T: Tensor, objective: Objective
    ) -> tuple[RowTerms, Tensor, Coefficients]:
        """Terms, the gradient of the sum of coef * loss, and its coefficients."""
        if rows.labels_T.dim() == 2:
            return _multi_target_terms_and_grad(rows, coef_T, objective)
        if not isinstance(objective, CrossEntropy) or objective.z_loss or rows.softcap:
            # One program for both would store [T, V]: TorchInductor stores the result of an expensive function with
            # two uses (tanh; exp, if the loss has a logarithm of the row's sum) that it can't keep in a row's buffer.
            terms = self.row_terms(rows, objective.sums)
            coefficients = objective.coefficients(torch, terms, [coef_T])
            return terms, self.row_grad(rows, terms, coefficients), coefficients
        parts, results = list[RowTerms](), list[tuple[Tensor, ...]]()
        out, targets = _new_grad(rows), _Targets(rows)
        for block, z_BV in _blocks(rows):
            t_B = targets.logits(z_BV, block.rows)
            row_args = (rows.inverse_temperature_T, targets.keep_T, coef_T)
            inverse_B, keep_B, coef_B = (_padded(x_T, block) for x_T in row_args)
            args = [z_BV, inverse_B, keep_B, padded_rows(t_B), coef_B]

            def program(grad_BV: Tensor, args: list[Any] = args) -> None:
                results.append(_terms_and_grad(args, grad_BV, objective))

            write(out, block, False, program)
            parts.append(_block_terms(block, rows, t_B, results.pop(), objective.sums))
        terms = _concatenated(parts, rows, objective.sums)
        coefficients = objective.coefficients(torch, terms, [coef_T])
        targets.write(out, logit_coefficients(coefficients, terms.t, 0.0, rows.inverse_temperature_T).target)
        return terms, out, coefficients


def _blocks(rows: Rows, max_elements: int | None = None) -> Iterator[tuple[Block, Tensor]]:
    """Blocks of rows, as few as possible; `max_elements` as in `matrices`."""
    for block, (z_BV,) in matrices(rows.logits, max_elements=max_elements):
        yield block, z_BV


def _elements_in_cache(rows: Rows) -> int:
    """Logits of a block for which a second matrix is allocated."""
    return SIZES.elements_cpu if rows.logits.device.type == "cpu" else SIZES.elements


def _non_target_terms(rows: Rows, targets: _Targets, sums: Sums) -> Iterator[tuple[RowTerms, Block, Tensor]]:
    """Terms of rows with K targets, which exclude the targets' columns: these are -inf in a copy of z.

    Yields:
        Terms of a block that is in cache, the block, and its logits.
    """
    buffer: Buffer | None = None
    for block, logits_BV in _blocks(rows, _elements_in_cache(rows)):
        buffer = buffer or Buffer(len(logits_BV), logits_BV, compute_dtype(logits_BV.dtype))
        z_BV = buffer.view_as(logits_BV).copy_(logits_BV)
        if rows.softcap:
            z_BV.div_(rows.softcap).tanh_().mul_(rows.softcap)
        inverse_B = _padded(rows.inverse_temperature_T, block)
        if inverse_B is not None:
            z_BV.mul_(inverse_B[:, None])
        # A softcap has made the column added by `matrices` finite.
        z_BV[:, rows.logits.shape[-1] :] = -torch.inf
        t_B = targets.extract(z_BV, block.rows)
        results = run(formulas.row_terms, z_BV, None, None, static=(0.0, *sums))
        yield _block_terms(block, rows, t_B, results, sums), block, logits_BV


def _multi_target_terms_and_grad(
    rows: Rows, coef_T: Tensor, objective: Objective
) -> tuple[RowTerms, Tensor, Coefficients]:
    """Terms, gradient and its coefficients of rows with K targets, by two programs while a block is in cache."""
    out, targets, inverse_T = _new_grad(rows), _Targets(rows), rows.inverse_temperature_T
    parts, target_grads = list[RowTerms](), list[Tensor]()
    for part, block, logits_BV in _non_target_terms(rows, targets, objective.sums):
        coefficients = objective.of_rows(block.rows).coefficients(torch, part, [coef_T[block.rows]])
        inverse_B = None if inverse_T is None else inverse_T[block.rows]
        coefficients = logit_coefficients(coefficients, part.t, rows.softcap, inverse_B)
        row_args = (targets.keep_T[block.rows], part.m, coefficients.scale, coefficients.uniform, coefficients.slope)
        padded = [None if x_B is None else padded_rows(x_B) for x_B in row_args]
        args: list[Any] = [logits_BV, _padded(inverse_T, block), *padded]
        write(out, block, False, partial(run, formulas.row_grad, *args, static=(rows.softcap,)))
        parts.append(part)
        target_grads.append(coefficients.target)
    if parts:
        targets.write(out, torch.cat(target_grads))
    terms = _concatenated(parts, rows, objective.sums)
    return terms, out, objective.coefficients(torch, terms, [coef_T])


def _terms(z_BV: Tensor, inverse_B: Tensor | None, t_B: Tensor, softcap: float, sums: Sums) -> tuple[Tensor, ...]:
    """m, s, and the other sums that are needed."""
    if not (softcap or any(sums)) and inverse_B is None and approximate_maximum.applies(z_BV):
        m_B = approximate_maximum.compute(z_BV, t_B)
        s_B = run(formulas.row_sum_around, z_BV, m_B)
        if approximate_maximum.is_accurate(s_B):
            return m_B, s_B
    # Not compiled: a compiled tanh of [B] values rounds the last ones differently, so that m would depend on the batch.
    max_B = _capped(z_BV.amax(-1), inverse_B, softcap) if softcap else None
    return tuple(run(formulas.row_terms, z_BV, inverse_B, max_B, static=(softcap, *sums)))


def _capped(logits_B: Tensor, inverse_B: Tensor | None, softcap: float) -> Tensor:
    """z of one logit of each row, in the dtype of the arithmetic."""
    z_B = logits_B.to(compute_dtype(logits_B.dtype))
    if softcap:
        z_B = softcap * (z_B / softcap).tanh()
    return z_B if inverse_B is None else z_B * inverse_B


def _terms_and_grad(args: list[Any], grad_BV: Tensor, objective: CrossEntropy) -> tuple[Tensor, ...]:
    """m, s, and the other sums that are needed; the gradient, without the targets' columns, is written to grad_BV.

    Args:
        args: logits; per row: inverse temperature or None, keep, z of the target, coefficient.
    """
    z_BV, inverse_B, keep_B, t_B, _ = args
    vocab, *options = objective
    static = tuple(options)
    if not objective.metrics and inverse_B is None and approximate_maximum.applies(z_BV):
        m_B = approximate_maximum.compute(z_BV, t_B)
        results = run(formulas.row_terms_and_grad, *args, m_B, grad_BV, vocab=vocab, static=static)
        if approximate_maximum.is_accurate(results[1], keep_B):
            return tuple(results)
    return tuple(run(formulas.row_terms_and_grad, *args, None, grad_BV, vocab=vocab, static=static))


def _padded(x_T: Tensor | None, block: Block) -> Tensor | None:
    """Per-row values of a block, as `padded_rows`."""
    return None if x_T is None else padded_rows(x_T[block.rows].contiguous())


def _block_terms(block: Block, rows: Rows, t_B: Tensor, results: tuple[Tensor, ...], sums: Sums) -> RowTerms:
    """Terms of a block from the results of a program: m, s, and the other sums that are needed."""
    m_B, s_B, *optional = (x_B[: block.num_rows] for x_B in results)
    z_sum_B = optional.pop(0) if sums.z_sum else None
    if z_sum_B is not None and rows.logits.shape[-1] == 1:
        # The column added by `matrices` to a vocabulary of one class is not part of the sum.
        z_sum_B = t_B.clone()
    return RowTerms(m_B, s_B, t_B, z_sum_B, optional.pop() if sums.e else None)


class _Targets:
    """`Targets` in the logits of a call, with its ignored rows, softcap and temperature.

    Attributes:
        keep_T: [T] bool.
    """

    def __init__(self, rows: Rows) -> None:
        self._targets = Targets.of(rows.labels_T, rows.vocab_start, rows.logits.shape[-1])
        first_T = self._targets.column_TK[:, 0]
        self.keep_T = torch.ones_like(first_T, dtype=torch.bool) if rows.keep_T is None else rows.keep_T
        self._softcap, self._inverse_T = rows.softcap, rows.inverse_temperature_T

    def logits(self, z_BV: Tensor, rows: slice | Tensor) -> Tensor:
        """z of the target of each row of a block, in the dtype of the arithmetic; -inf for an absent target."""
        targets = self._targets.of_rows(rows)
        inverse_B = None if self._inverse_T is None else self._inverse_T[rows]
        t_B = _capped(targets.read(z_BV[: len(targets.column_TK)], 0.0), inverse_B, self._softcap)
        # After the softcap, which would make -inf finite.
        return targets.fill_absent(t_B, -torch.inf)

    def extract(self, z_BV: Tensor, rows: slice | Tensor) -> Tensor:
        """z of the targets of each row of a block, replaced in z_BV by -inf."""
        targets = self._targets.of_rows(rows)
        z_BV = z_BV[: len(targets.column_TK)]
        t_B = targets.read(z_BV, -torch.inf)
        targets.write(z_BV, -torch.inf)
        return t_B

    def write(self, out: Tensor, target_T: Tensor) -> None:
        """Write the gradient of the targets' columns into out, rounded once; 0 in ignored rows."""
        if not out.numel():
            return
        target_T, column_TK = torch.where(per_row(self.keep_T, target_T), target_T, 0.0), self._targets.column_TK
        leading = torch.unravel_index(torch.arange(len(column_TK), device=out.device)[:, None], out.shape[:-1])
        indices = (*leading, column_TK)
        out[indices] = self._targets.values_to_write(out[indices], target_T)


def _new_grad(rows: Rows) -> Tensor:
    return torch.empty(rows.logits.shape, dtype=rows.logits.dtype, device=rows.logits.device)


def _concatenated(parts: list[RowTerms], rows: Rows, sums: Sums) -> RowTerms:
    """Terms of all rows, from those of the blocks; terms of an empty vocabulary if there is no block."""
    if not parts:
        dtype = compute_dtype(rows.logits.dtype)
        return filled_terms(EMPTY_ROW, sums, rows.labels_T, dtype)
    return concatenate_terms(parts)
