"""Helpers of kernel sets for terms, coefficients and targets of rows; formulas are in `loss_core.row_terms`."""

# T = tokens (rows), B = some of them, K = targets of a row, V = vocabulary (of this rank)

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loss_core.row_terms import Coefficients, RowTerms, Sums
from loss_core_torch.tracing import is_readable


class Targets(NamedTuple):
    """Columns of the targets of each row among the columns of this rank.

    Attributes:
        column_TK: int64, column of each target; for an absent target that of another target of the row, or 0.
        is_one: whether rows have one target, so that per-target values have shape [T] instead of [T, K].
        absent: which targets other ranks own; None if there are none and this may be read without a sync.
    """

    column_TK: Tensor
    is_one: bool
    absent: AbsentTargets | None = None

    @classmethod
    def of(cls, labels_T: Tensor, vocab_start: int, vocab: int) -> Targets:
        """Targets of labels [T] or [T, K], as in `Rows`."""
        is_one = labels_T.dim() == 1
        local_TK = (labels_T[:, None] if is_one else labels_T) - vocab_start
        owned_TK = (local_TK >= 0) & (local_TK < vocab)
        if is_readable(owned_TK) and bool(owned_TK.all()):
            return cls(local_TK, is_one)
        first_T1, any_T1 = owned_TK.int().argmax(-1, keepdim=True), owned_TK.any(-1, keepdim=True)
        source_TK = torch.where(owned_TK, torch.arange(local_TK.shape[1], device=local_TK.device), first_T1)
        column_TK = torch.where(any_T1, local_TK.gather(1, source_TK), 0)
        return cls(column_TK, is_one, AbsentTargets(owned_TK, source_TK, any_T1))

    def of_rows(self, rows: slice | Tensor) -> Targets:
        """The targets of some rows."""
        absent = None if self.absent is None else AbsentTargets(*(x[rows] for x in self.absent))
        return Targets(self.column_TK[rows], self.is_one, absent)

    def read(self, x_TV: Tensor, fill_value: float) -> Tensor:
        """Elements of a matrix at the targets' columns, [T] or [T, K]; `fill_value` for absent targets."""
        values_TK = x_TV.gather(1, self.column_TK)
        return self.fill_absent(values_TK[:, 0] if self.is_one else values_TK, fill_value)

    def fill_absent(self, values: Tensor, fill_value: float) -> Tensor:
        """Values of targets, [T] or [T, K], with `fill_value` for absent targets."""
        if self.absent is None:
            return values
        owned_TK = self.absent.owned_TK
        return values.masked_fill(~(owned_TK[:, 0] if self.is_one else owned_TK), fill_value)

    def write(self, x_TV: Tensor, values: Tensor | float) -> None:
        """Write values, [T] or [T, K] or one, into a matrix at the columns of the targets that are not absent."""
        if self.absent is not None:
            values = self.values_to_write(x_TV.gather(1, self.column_TK), values)
        elif isinstance(values, Tensor):
            values = (values[:, None] if self.is_one else values).to(x_TV.dtype)
        x_TV.scatter_(1, self.column_TK, values)

    def values_to_write(self, old_TK: Tensor, values: Tensor | float) -> Tensor:
        """Values to scatter to `column_TK`, which holds `old_TK`; equal columns of a row have equal values."""
        if isinstance(values, Tensor):
            values = (values[:, None] if self.is_one else values).to(old_TK.dtype)
        if self.absent is None:
            return torch.as_tensor(values, dtype=old_TK.dtype, device=old_TK.device).expand(old_TK.shape)
        _, source_TK, any_T1 = self.absent
        return torch.where(any_T1, values.gather(1, source_TK) if isinstance(values, Tensor) else values, old_TK)


class AbsentTargets(NamedTuple):
    """Which targets are not among the columns of this rank.

    Attributes:
        owned_TK: bool, False for absent targets.
        source_TK: int64, index into the row's K targets of the target at `column_TK`.
        any_T1: bool, whether any target of the row is present; else its columns are 0.
    """

    owned_TK: Tensor
    source_TK: Tensor
    any_T1: Tensor


def per_row(x_T: Tensor, like: Tensor) -> Tensor:
    """x [T] or scalar, with a dimension added to broadcast against `like` if that is [T, K]."""
    return x_T[:, None] if like.dim() == 2 and x_T.dim() else x_T


def scale_coefficients(coefficients: Coefficients, factor_T: Tensor) -> Coefficients:
    """Coefficients of the gradient times a factor [T], or a scalar."""
    return Coefficients(*(None if c_T is None else c_T * per_row(factor_T, c_T) for c_T in coefficients))


def folded(coefficients: Coefficients) -> Coefficients:
    """The same gradient, with `factor` multiplied into the other coefficients."""
    factor = coefficients.factor
    return coefficients if factor is None else scale_coefficients(coefficients._replace(factor=None), factor)


def logit_coefficients(
    coefficients: Coefficients, t_T: Tensor, softcap: float, inverse_temperature_T: Tensor | None
) -> Coefficients:
    """Coefficients of the logits' gradient, from those by z; only `target` includes the derivative of the softcap.

    Args:
        t_T: z of the targets, after softcap and temperature.
    """
    if softcap:
        capped_T = t_T if inverse_temperature_T is None else t_T / per_row(inverse_temperature_T, t_T)
        coefficients = coefficients._replace(target=coefficients.target * (1.0 - (capped_T / softcap).square()))
    return coefficients if inverse_temperature_T is None else scale_coefficients(coefficients, inverse_temperature_T)


def mask_coefficients(coefficients: Coefficients, keep_T: Tensor) -> Coefficients:
    """The coefficients, 0 where keep_T is False."""
    return Coefficients(*(None if c_T is None else c_T.masked_fill(~per_row(keep_T, c_T), 0.0) for c_T in coefficients))


def filled_terms(values: RowTerms, sums: Sums, labels_T: Tensor, dtype: torch.dtype) -> RowTerms:
    """Terms with the same values in each row, shaped for these labels; None for sums that are not needed."""
    m, s, t, *optional = values
    row_T = labels_T if labels_T.dim() == 1 else labels_T[:, 0]
    needed = zip((m, s, *optional), (True, True, *sums), strict=True)
    m_T, s_T, *optional_T = (torch.full_like(row_T, x, dtype=dtype) if is_needed else None for x, is_needed in needed)
    return RowTerms(m_T, s_T, torch.full_like(labels_T, t, dtype=dtype), *optional_T)


def no_coefficients(labels_T: Tensor, dtype: torch.dtype) -> Coefficients:
    """Coefficients of 0, shaped for these labels."""
    row_T = labels_T if labels_T.dim() == 1 else labels_T[:, 0]
    return Coefficients(torch.zeros_like(row_T, dtype=dtype), torch.zeros_like(labels_T, dtype=dtype))


def with_zeros(coefficients: Coefficients, like: Coefficients) -> Coefficients:
    """The coefficients, with zeros in place of None where `like` has a tensor."""
    scale_T, pairs = coefficients.scale, zip(coefficients, like, strict=True)
    return Coefficients(*(torch.zeros_like(scale_T) if x is None and other is not None else x for x, other in pairs))


def concatenate_terms(parts: Sequence[RowTerms]) -> RowTerms:
    """Terms of all rows, from those of at least one block of rows."""
    if len(parts) == 1:
        return parts[0]
    return RowTerms(*(None if x[0] is None else torch.cat(x) for x in zip(*parts, strict=True)))
