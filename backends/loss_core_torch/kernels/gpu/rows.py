"""Rows of logits: their terms, their gradient, and both in one kernel; see `KernelSet`."""

# T = tokens (rows), V = vocabulary (of this rank)

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from loss_core.row_terms import EMPTY_ROW, Coefficients, CrossEntropy, Objective, RowTerms, Sums
from loss_core_torch.kernels import Rows
from loss_core_torch.kernels.gpu import kernels
from loss_core_torch.kernels.gpu.launch import Launcher, columns, dense, layout, pieces, untold
from loss_core_torch.kernels.terms import filled_terms, no_coefficients
from loss_core_torch.tracing import compute_dtype


class RowKernels:
    """The methods of a `KernelSet` that take rows."""

    _launcher: Launcher

    def row_terms(self, rows: Rows, sums: Sums) -> RowTerms:
        """Terms of each row; of an ignored row those of an empty piece. See `KernelSet.row_terms`."""
        logits, labels_T, keep_T, vocab_start, softcap, inverse_T = rows
        num_rows, vocab, is_one = len(labels_T), logits.shape[-1], labels_T.dim() == 1
        if logits.numel() == 0:
            return filled_terms(EMPTY_ROW, sums, labels_T, compute_dtype(logits.dtype))
        found = _new_terms(rows, sums)
        kind = "others_terms" if not is_one else "capped_terms" if softcap or sums.e else "terms"
        size = self._launcher.parameters(vocab, logits.dtype, kind)
        self._launcher.start(
            kernels.row_terms_kernel, (num_rows,), logits, dense(labels_T), dense(keep_T), dense(inverse_T), *found,
            vocab_start, vocab, layout(logits), size=size, SOFTCAP=softcap, LEFT_OUT=not is_one,
            **_num_targets(labels_T), **columns(size, logits),
        )  # fmt: skip
        return found

    def row_grad(self, rows: Rows, terms: RowTerms, coefficients: Coefficients, out: Tensor | None = None) -> Tensor:
        """The gradient by the logits, softcap's slope included; see `KernelSet.row_grad`.

        The kernel looks at the factor, so that the host need not wait for it.
        """
        logits, labels_T, keep_T, vocab_start, softcap, inverse_T = rows
        num_rows, vocab, held = len(labels_T), logits.shape[-1], coefficients.factor is not None and out is not None
        out = _new_grad(logits) if out is None else out
        if logits.numel() == 0:
            return out
        size = self._launcher.parameters(vocab, logits.dtype, "grad", out.dtype)
        self._launcher.start(
            kernels.row_grad_kernel, (num_rows,), out, logits, dense(labels_T), dense(keep_T), dense(inverse_T),
            dense(terms.m), dense(terms.t), *map(dense, coefficients), vocab_start, vocab, layout(out),
            layout(logits), size=size, SOFTCAP=softcap, HELD=held, **_num_targets(labels_T),
            **columns(size, out, logits),
        )  # fmt: skip
        return out

    def row_terms_and_grad(
        self, rows: Rows, coef_T: Tensor, objective: Objective, out: Tensor | None = None
    ) -> tuple[RowTerms, Tensor, Coefficients]:
        """Terms, gradient, also into `out` [..., V], which may be the logits; see `KernelSet.row_terms_and_grad`.

        A row, or each piece of a long one, is read a second time at once after the first, from the cache as far as it
        holds it. A coefficient of 0 gives a gradient of 0, whatever the row holds.
        """
        if not isinstance(objective, CrossEntropy):
            terms, has_T = self.row_terms(rows, objective.sums), coef_T != 0
            coefficients = objective.coefficients(torch, terms, [coef_T])
            rows = rows._replace(keep_T=has_T if rows.keep_T is None else rows.keep_T & has_T)
            return terms, self.row_grad(rows, terms, coefficients, out=out), coefficients
        logits, labels_T, keep_T, vocab_start, softcap, inverse_T = rows
        num_rows, vocab = len(labels_T), logits.shape[-1]
        out = _new_grad(logits) if out is None else out
        if logits.numel() == 0:
            dtype = compute_dtype(logits.dtype)
            empty = filled_terms(EMPTY_ROW, objective.sums, labels_T, dtype)
            return empty, out, no_coefficients(labels_T, dtype)
        found, coefficients = _new_terms(rows, objective.sums), _new_coefficients(coef_T, objective.sums)
        kind = "full_row" if softcap or any(objective.sums) else "row"
        size = self._launcher.parameters(vocab, logits.dtype, kind, out.dtype)
        programs = size.pieces(vocab)
        self._launcher.start(
            kernels.row_kernel, (num_rows * programs,), out, logits, dense(labels_T), dense(keep_T), dense(inverse_T),
            dense(coef_T), *found, *coefficients[:3], untold(num_rows, programs, found.m), objective.num_classes,
            vocab_start, vocab, layout(out), layout(logits), size=size, SOFTCAP=softcap, **pieces(size, vocab),
            **columns(size, out, logits), **_constants(objective),
        )  # fmt: skip
        return found, out, coefficients


def with_effect(coefficients: Coefficients) -> Tensor:
    """[T] bool: the rows of which a coefficient is not 0."""
    has_T = ((c_T != 0 if c_T.dim() == 1 else (c_T != 0).any(-1)) for c_T in coefficients if c_T is not None)
    return reduce(torch.logical_or, has_T)


def _num_targets(labels_T: Tensor) -> dict[str, int]:
    """Constants: targets of a row, and that up to the next power of 2."""
    number = 1 if labels_T.dim() == 1 else labels_T.shape[1]
    return {"NUM": number, "N": 1 << (number - 1).bit_length()}


def _constants(objective: CrossEntropy) -> dict[str, Any]:
    """Each option as a constant of the kernel, in capitals; a float argument would arrive in float32."""
    return {name.upper(): value for name, value in objective.options.items()}


def _new_terms(rows: Rows, sums: Sums) -> RowTerms:
    dtype, device = compute_dtype(rows.logits.dtype), rows.logits.device
    wanted = zip((True, True, *sums), ("m", "s", "z_sum", "e"), strict=True)
    shape = rows.labels_T.shape[:1]
    found = {name: torch.empty(shape, dtype=dtype, device=device) for is_wanted, name in wanted if is_wanted}
    return RowTerms(t=torch.empty(rows.labels_T.shape, dtype=dtype, device=device), **found)


def _new_coefficients(coef_T: Tensor, sums: Sums) -> Coefficients:
    """Memory for those of a gradient without a slope."""
    scale_T, target_T, uniform_T = (
        torch.empty(coef_T.shape, dtype=coef_T.dtype, device=coef_T.device) if has else None
        for has in (True, True, sums.z_sum)
    )
    return Coefficients(scale_T, target_T, uniform_T)


def _new_grad(logits: Tensor) -> Tensor:
    # Not empty_like, which would keep the strides.
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
