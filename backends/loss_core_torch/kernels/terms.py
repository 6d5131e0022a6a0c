"""What kernel sets do with terms, coefficients and targets of rows, whose laws stand in `loss_core.row_terms`."""

# T = tokens (rows), B = some of them, K = targets of a row, V = vocabulary (of this rank)

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loss_core.row_terms import Coefficients, RowTerms, Sums
from loss_core_torch.tracing import is_readable


class Targets(NamedTuple):
    """The columns of the targets of rows, among those of this rank.

    Attributes:
        column_TK: int64, of the row's own target, or in place of one that is not here of another one of the row.
        is_one: whether rows have one target, and its numbers the shape [T], and not [T, K].
        elsewhere: what there is to know of targets that are not here; None where it can be seen that all are.
    """

    column_TK: Tensor
    is_one: bool
    elsewhere: Elsewhere | None = None

    @classmethod
    def of(cls, labels_T: Tensor, vocab_start: int, vocab: int) -> Targets:
        """Those of labels [T] or [T, K], as `Rows` has them."""
        is_one = labels_T.dim() == 1
        local_TK = (labels_T[:, None] if is_one else labels_T) - vocab_start
        owned_TK = (local_TK >= 0) & (local_TK < vocab)
        if is_readable(owned_TK) and bool(owned_TK.all()):
            return cls(local_TK, is_one)
        first_T1, any_T1 = owned_TK.int().argmax(-1, keepdim=True), owned_TK.any(-1, keepdim=True)
        source_TK = torch.where(owned_TK, torch.arange(local_TK.shape[1], device=local_TK.device), first_T1)
        column_TK = torch.where(any_T1, local_TK.gather(1, source_TK), 0)
        return cls(column_TK, is_one, Elsewhere(owned_TK, source_TK, any_T1))

    def at(self, rows: slice | Tensor) -> Targets:
        """Those of some rows."""
        elsewhere = None if self.elsewhere is None else Elsewhere(*(x[rows] for x in self.elsewhere))
        return Targets(self.column_TK[rows], self.is_one, elsewhere)

    def read(self, x_TV: Tensor, otherwise: float) -> Tensor:
        """The numbers of a matrix at the columns, [T] or [T, K]; `otherwise` for targets that are not here."""
        found_TK = x_TV.gather(1, self.column_TK)
        return self.here(found_TK[:, 0] if self.is_one else found_TK, otherwise)

    def here(self, values: Tensor, otherwise: float) -> Tensor:
        """Numbers of targets, [T] or [T, K]; `otherwise` for those that are not here."""
        if self.elsewhere is None:
            return values
        owned_TK = self.elsewhere.owned_TK
        return values.masked_fill(~(owned_TK[:, 0] if self.is_one else owned_TK), otherwise)

    def write(self, x_TV: Tensor, values: Tensor | float) -> None:
        """Put numbers, [T] or [T, K] or one, in a matrix at the columns of the targets that are here."""
        if self.elsewhere is not None:
            values = self.placed(x_TV.gather(1, self.column_TK), values)
        elif isinstance(values, Tensor):
            values = (values[:, None] if self.is_one else values).to(x_TV.dtype)
        x_TV.scatter_(1, self.column_TK, values)

    def placed(self, old_TK: Tensor, values: Tensor | float) -> Tensor:
        """What to write at the columns, in place of the old: where two of them are one, the same number."""
        if isinstance(values, Tensor):
            values = (values[:, None] if self.is_one else values).to(old_TK.dtype)
        if self.elsewhere is None:
            return torch.as_tensor(values, dtype=old_TK.dtype, device=old_TK.device).expand(old_TK.shape)
        _, source_TK, any_T1 = self.elsewhere
        return torch.where(any_T1, values.gather(1, source_TK) if isinstance(values, Tensor) else values, old_TK)


class Elsewhere(NamedTuple):
    """Which targets are not here.

    Attributes:
        owned_TK: bool, whether the target is here.
        source_TK: int64, which of the row's K targets `column_TK` is of.
        any_T1: bool, whether one of the row is here; else its columns are 0.
    """

    owned_TK: Tensor
    source_TK: Tensor
    any_T1: Tensor


def per_row(x_T: Tensor, like: Tensor) -> Tensor:
    """One number per row, or of all, beside numbers of rows or of their K targets."""
    return x_T[:, None] if like.dim() == 2 and x_T.dim() else x_T


def times(coefficients: Coefficients, factor_T: Tensor) -> Coefficients:
    """Coefficients of a gradient that is larger by a factor [T], or a scalar."""
    return Coefficients(*(None if c_T is None else c_T * per_row(factor_T, c_T) for c_T in coefficients))


def folded(coefficients: Coefficients) -> Coefficients:
    """The same gradient with each coefficient times their factor, which is 1 then."""
    factor = coefficients.factor
    return coefficients if factor is None else times(coefficients._replace(factor=None), factor)


def by_logits(
    coefficients: Coefficients, t_T: Tensor, softcap: float, inverse_temperature_T: Tensor | None
) -> Coefficients:
    """Coefficients of the gradient by the logits but for the softcap's slope, which `target` alone has got.

    Args:
        t_T: z of the targets, after softcap and temperature.
    """
    if softcap:
        capped_T = t_T if inverse_temperature_T is None else t_T / per_row(inverse_temperature_T, t_T)
        coefficients = coefficients._replace(target=coefficients.target * (1.0 - (capped_T / softcap).square()))
    return coefficients if inverse_temperature_T is None else times(coefficients, inverse_temperature_T)


def kept_coefficients(coefficients: Coefficients, keep_T: Tensor) -> Coefficients:
    """The coefficients, 0 where keep is False."""
    return Coefficients(*(None if c_T is None else c_T.masked_fill(~per_row(keep_T, c_T), 0.0) for c_T in coefficients))


def filled_terms(values: RowTerms, sums: Sums, labels_T: Tensor, dtype: torch.dtype) -> RowTerms:
    """Terms of the same value for every row with these labels, those that are needed."""
    m, s, t, *rest = values
    row_T = labels_T if labels_T.dim() == 1 else labels_T[:, 0]
    wanted = zip((m, s, *rest), (True, True, *sums), strict=True)
    m_T, s_T, *rest_T = (torch.full_like(row_T, x, dtype=dtype) if is_wanted else None for x, is_wanted in wanted)
    return RowTerms(m_T, s_T, torch.full_like(labels_T, t, dtype=dtype), *rest_T)


def no_coefficients(labels_T: Tensor, dtype: torch.dtype) -> Coefficients:
    """Coefficients of 0 for every row with these labels."""
    row_T = labels_T if labels_T.dim() == 1 else labels_T[:, 0]
    return Coefficients(torch.zeros_like(row_T, dtype=dtype), torch.zeros_like(labels_T, dtype=dtype))


def with_zeros(coefficients: Coefficients, like: Coefficients) -> Coefficients:
    """The coefficients, with zeros for those that others have and these have not."""
    scale_T, both = coefficients.scale, zip(coefficients, like, strict=True)
    return Coefficients(*(torch.zeros_like(scale_T) if x is None and other is not None else x for x, other in both))


def joined_terms(parts: Sequence[RowTerms]) -> RowTerms:
    """Terms of all rows from those of blocks of them, of which there is one at least."""
    if len(parts) == 1:
        return parts[0]
    return RowTerms(*(None if x[0] is None else torch.cat(x) for x in zip(*parts, strict=True)))
