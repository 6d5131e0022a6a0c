"""Rows of logits: their terms, their gradient, and both in one kernel; see `KernelSet`."""

# T = tokens (rows), V = vocabulary (of this rank)

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from loss_core.row_terms import EMPTY_ROW, Coefficients, Objective, RowTerms, Sums
from loss_core_torch.kernels import NEW, Into, Rows
from loss_core_torch.kernels.gpu import kernels
from loss_core_torch.kernels.gpu.launch import Launcher, columns, dense, layout
from loss_core_torch.kernels.terms import filled_terms
from loss_core_torch.tracing import compute_dtype


def terms(launcher: Launcher, rows: Rows, sums: Sums) -> RowTerms:
    """Terms of each row; of an ignored row those of an empty piece. See `KernelSet.row_terms`."""
    logits, labels_T, keep_T, vocab_start, softcap, inverse_T = rows
    num_rows, vocab = labels_T.numel(), logits.shape[-1]
    if logits.numel() == 0:
        return filled_terms(EMPTY_ROW, sums, _new_term(rows))
    found = _new_terms(rows, sums)
    kind = "capped_terms" if softcap or sums.e else "terms"
    size = launcher.parameters(vocab, logits.dtype, kind)
    launcher.start(
        kernels.row_terms_kernel, (num_rows,), logits, dense(labels_T), dense(keep_T), dense(inverse_T), *found,
        vocab_start, vocab, layout(logits), size=size, SOFTCAP=softcap, **columns(size, logits),
    )  # fmt: skip
    return found


def grad(launcher: Launcher, rows: Rows, terms: RowTerms, coefficients: Coefficients, into: Into = NEW) -> Tensor:
    """The gradient by the logits, softcap's slope included; see `KernelSet.row_grad`.

    A kernel looks at `into.unless_one`, so that the host need not wait for it.
    """
    logits, labels_T, keep_T, vocab_start, softcap, inverse_T = rows
    num_rows, vocab = labels_T.numel(), logits.shape[-1]
    out = _new_grad(logits) if into.out is None else into.out
    if logits.numel() == 0:
        return out
    size = launcher.parameters(vocab, logits.dtype, "grad", out.dtype)
    launcher.start(
        kernels.row_grad_kernel, (num_rows,), out, logits, dense(labels_T), dense(keep_T), dense(inverse_T),
        dense(terms.m), dense(terms.t), *map(dense, coefficients), into.unless_one, vocab_start, vocab, layout(out),
        layout(logits), size=size, SOFTCAP=softcap, **columns(size, out, logits),
    )  # fmt: skip
    return out


def terms_and_grad(
    launcher: Launcher, rows: Rows, coef_T: Tensor, objective: Objective, out: Tensor | None = None
) -> tuple[RowTerms, Tensor]:
    """Terms and gradient, also into `out` [..., V], which may be the logits; see `KernelSet.row_terms_and_grad`.

    A row is read a second time at once after the first, from the cache as far as it holds it. A coefficient of 0 gives
    a gradient of 0, whatever the row holds.
    """
    logits, labels_T, keep_T, vocab_start, softcap, inverse_T = rows
    num_rows, vocab = labels_T.numel(), logits.shape[-1]
    out = _new_grad(logits) if out is None else out
    if logits.numel() == 0:
        return filled_terms(EMPTY_ROW, objective.sums, _new_term(rows)), out
    found = _new_terms(rows, objective.sums)
    kind = "full_row" if softcap or any(objective.sums) else "row"
    size = launcher.parameters(vocab, logits.dtype, kind, out.dtype)
    launcher.start(
        kernels.row_kernel, (num_rows,), out, logits, dense(labels_T), dense(keep_T), dense(inverse_T), dense(coef_T),
        *found, objective.num_classes, vocab_start, vocab, layout(out), layout(logits), size=size, SOFTCAP=softcap,
        **columns(size, out, logits), **_constants(objective),
    )  # fmt: skip
    return found, out


def with_effect(coefficients: Coefficients) -> Tensor:
    """[T] bool: the rows of which a coefficient is not 0."""
    return reduce(torch.logical_or, (c_T != 0 for c_T in coefficients if c_T is not None))


def _constants(objective: Objective) -> dict[str, Any]:
    """Each option as a constant of the kernel, in capitals; a float argument would arrive in float32."""
    return {name.upper(): value for name, value in objective.options.items()}


def _new_term(rows: Rows) -> Tensor:
    return torch.empty(rows.labels_T.shape, dtype=compute_dtype(rows.logits.dtype), device=rows.logits.device)


def _new_terms(rows: Rows, sums: Sums) -> RowTerms:
    return RowTerms(*(_new_term(rows) if is_wanted else None for is_wanted in (True, True, True, *sums)))


def _new_grad(logits: Tensor) -> Tensor:
    # Not empty_like, which would keep the strides.
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
