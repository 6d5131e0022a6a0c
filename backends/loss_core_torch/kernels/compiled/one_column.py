"""Rows of one column under a softcap: what the programs get in their place, and the way back of its gradient.

A program is not made for sizes of 1, so it gets a second column of -inf, of which a softcap would make a number. Here
the softcap is applied before.
"""

# T = tokens, V = 1

from __future__ import annotations

import torch
from torch import Tensor

from loss_core_torch.kernels import Rows, whole_rows


def applies(rows: Rows) -> bool:
    """Whether rows are such ones. Those with K targets have their softcap applied in any case."""
    return bool(rows.softcap) and rows.logits.shape[-1] == 1 and rows.labels_T.dim() == 1


def uncapped(rows: Rows) -> tuple[Rows, Tensor]:
    """Rows without softcap and temperature, and the slope [T, V] of both."""
    z_TV, slope_TV = whole_rows(rows)
    return rows._replace(logits=z_TV, softcap=0.0, inverse_temperature_T=None), slope_TV


def through_softcap(grad_TV: Tensor, slope_TV: Tensor, rows: Rows, out: Tensor | None = None) -> Tensor:
    """Gradient by the logits, from that by the rows that `uncapped` gives."""
    grad_TV = grad_TV * slope_TV
    if rows.keep_T is not None:
        # The slope of an ignored row may be NaN.
        grad_TV = torch.where(rows.keep_T[:, None], grad_TV, 0.0)
    found = grad_TV.to(rows.logits.dtype).view(rows.logits.shape)
    return found if out is None else out.copy_(found)
