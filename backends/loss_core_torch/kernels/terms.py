"""What kernel sets do with terms and coefficients of rows, whose laws stand in `loss_core.row_terms`."""

# T = tokens (rows)

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loss_core.row_terms import Coefficients, RowTerms, Sums


def times(coefficients: Coefficients, factor_T: Tensor) -> Coefficients:
    """Coefficients of a gradient that is larger by a factor [T]."""
    return Coefficients(*(None if c_T is None else c_T * factor_T for c_T in coefficients))


def kept_coefficients(coefficients: Coefficients, keep_T: Tensor) -> Coefficients:
    """The coefficients, 0 where keep is False."""
    return Coefficients(*(None if c_T is None else c_T.masked_fill(~keep_T, 0.0) for c_T in coefficients))


def filled_terms(values: RowTerms, sums: Sums, like_T: Tensor) -> RowTerms:
    """Terms of the same value for every row, those that are needed; of shape, dtype and device of `like_T`."""
    wanted = RowTerms(True, True, True, *sums)
    return RowTerms(
        *(torch.full_like(like_T, x) if is_wanted else None for x, is_wanted in zip(values, wanted, strict=True))
    )


def joined_terms(parts: Sequence[RowTerms]) -> RowTerms:
    """Terms of all rows from those of blocks of them, of which there is one at least."""
    if len(parts) == 1:
        return parts[0]
    return RowTerms(*(None if x[0] is None else torch.cat(x) for x in zip(*parts, strict=True)))
