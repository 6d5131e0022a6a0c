"""The methods of `KernelSet` for rows of logits: terms, gradient, and both in one kernel."""

# T = tokens (rows), V = vocabulary (of this rank)

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from loss_core.row_terms import EMPTY_ROW, Coefficients, CrossEntropy, Objective, RowTerms, Sums
from loss_core_torch.kernels import Rows
from loss_core_torch.kernels.gpu import kernels
from loss_core_torch.kernels.gpu.launch import (
    Launcher,
    column_constants,
    contiguous,
    layout,
    new_grad,
    new_partials,
    piece_constants,
)
from loss_core_torch.kernels.terms import filled_terms, no_coefficients
from loss_core_torch.tracing import compute_dtype


class RowKernels:
    """The methods of `KernelSet` that take rows."""

    _launcher: Launcher

    def row_terms(self, rows: Rows, sums: Sums) -> RowTerms:
        """Terms of each row, those of an empty piece for an ignored row; see `KernelSet.row_terms`."""
        logits, labels_T, keep_T, vocab_start, softcap, inverse_T = rows
        num_rows, vocab, one_target = len(labels_T), logits.shape[-1], labels_T.dim() == 1
        if logits.numel() == 0:
            return filled_terms(EMPTY_ROW, sums, labels_T, compute_dtype(logits.dtype))
        terms = _new_terms(rows, sums)
        kind = "top_k_terms" if not one_target else "general_terms" if softcap or sums.e else "terms"
        size = self._launcher.parameters(vocab, logits.dtype, kind)
        self._launcher.launch(
            kernels.row_terms_kernel, (num_rows,), logits, contiguous(labels_T), contiguous(keep_T),
            contiguous(inverse_T), *terms, vocab_start, vocab, layout(logits), size=size, SOFTCAP=softcap,
            EXCLUDE_TARGETS=not one_target, **_target_constants(labels_T), **column_constants(size, logits),
        )  # fmt: skip
        return terms

    def row_grad(self, rows: Rows, terms: RowTerms, coefficients: Coefficients, out: Tensor | None = None) -> Tensor:
        """The gradient by the logits, including the softcap's slope; see `KernelSet.row_grad`.

        The kernel reads the factor, so that the host does not wait for the device.
        """
        logits, labels_T, keep_T, vocab_start, softcap, inverse_T = rows
        num_rows, vocab = len(labels_T), logits.shape[-1]
        prefilled = coefficients.factor is not None and out is not None
        out = new_grad(logits) if out is None else out
        if logits.numel() == 0:
            return out
        size = self._launcher.parameters(vocab, logits.dtype, "grad", out.dtype)
        self._launcher.launch(
            kernels.row_grad_kernel, (num_rows,), out, logits, contiguous(labels_T), contiguous(keep_T),
            contiguous(inverse_T), contiguous(terms.m), contiguous(terms.t), *map(contiguous, coefficients),
            vocab_start, vocab, layout(out), layout(logits), size=size, SOFTCAP=softcap, PREFILLED=prefilled,
            **_target_constants(labels_T), **column_constants(size, out, logits),
        )  # fmt: skip
        return out

    def row_terms_and_grad(
        self, rows: Rows, coef_T: Tensor, objective: Objective, out: Tensor | None = None
    ) -> tuple[RowTerms, Tensor, Coefficients]:
        """Terms, gradient (into `out` [..., V], which may be the logits), and its coefficients; see `KernelSet`.

        A row, or each piece of a long row, is read a second time right after the first, from the cache as far as it
        fits. The gradient of a row with coefficient 0 is 0, even if the row holds inf or NaN.
        """
        if not isinstance(objective, CrossEntropy):
            terms, nonzero_T = self.row_terms(rows, objective.sums), coef_T != 0
            coefficients = objective.coefficients(torch, terms, [coef_T])
            rows = rows._replace(keep_T=nonzero_T if rows.keep_T is None else rows.keep_T & nonzero_T)
            return terms, self.row_grad(rows, terms, coefficients, out=out), coefficients
        logits, labels_T, keep_T, vocab_start, softcap, inverse_T = rows
        num_rows, vocab = len(labels_T), logits.shape[-1]
        out = new_grad(logits) if out is None else out
        if logits.numel() == 0:
            dtype = compute_dtype(logits.dtype)
            empty = filled_terms(EMPTY_ROW, objective.sums, labels_T, dtype)
            return empty, out, no_coefficients(labels_T, dtype)
        terms, coefficients = _new_terms(rows, objective.sums), _new_coefficients(coef_T, objective.sums)
        kind = "general_row" if softcap or any(objective.sums) else "row"
        size = self._launcher.parameters(vocab, logits.dtype, kind, out.dtype)
        num_pieces = size.num_pieces(vocab)
        self._launcher.launch(
            kernels.row_kernel, (num_rows * num_pieces,), out, logits, contiguous(labels_T), contiguous(keep_T),
            contiguous(inverse_T), contiguous(coef_T), *terms, *coefficients[:3],
            new_partials(num_rows, num_pieces, terms.m), objective.num_classes, vocab_start, vocab, layout(out),
            layout(logits), size=size, SOFTCAP=softcap, **piece_constants(size, vocab),
            **column_constants(size, out, logits), **_option_constants(objective),
        )  # fmt: skip
        return terms, out, coefficients


def _target_constants(labels_T: Tensor) -> dict[str, int]:
    """Constants: the number of targets of a row, and the next power of 2."""
    num_targets = 1 if labels_T.dim() == 1 else labels_T.shape[1]
    return {"NUM_TARGETS": num_targets, "N": triton.next_power_of_2(num_targets)}


def _option_constants(objective: CrossEntropy) -> dict[str, Any]:
    """The loss's options as kernel constants, named in capitals; as arguments Triton would pass them in float32."""
    return {name.upper(): value for name, value in objective.options.items()}


def _new_terms(rows: Rows, sums: Sums) -> RowTerms:
    dtype, device = compute_dtype(rows.logits.dtype), rows.logits.device
    needed = zip((True, True, *sums), ("m", "s", "z_sum", "e"), strict=True)
    shape = rows.labels_T.shape[:1]
    terms = {name: torch.empty(shape, dtype=dtype, device=device) for is_needed, name in needed if is_needed}
    return RowTerms(t=torch.empty(rows.labels_T.shape, dtype=dtype, device=device), **terms)


def _new_coefficients(coef_T: Tensor, sums: Sums) -> Coefficients:
    """Uninitialized coefficients, without a slope."""
    scale_T, target_T, uniform_T = (
        torch.empty(coef_T.shape, dtype=coef_T.dtype, device=coef_T.device) if has else None
        for has in (True, True, sums.z_sum)
    )
    return Coefficients(scale_T, target_T, uniform_T)
