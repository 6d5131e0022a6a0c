"""Rows of one column under a softcap: the softcap is applied before the compiled programs, and differentiated after.

Programs do not accept sizes of 1, so `matrices` adds a second column of -inf, which a softcap inside the program would
make finite.
"""

# T = tokens, V = 1

from __future__ import annotations

import torch
from torch import Tensor

from loss_core_torch.kernels import Rows, whole_rows


def applies(rows: Rows) -> bool:
    """Whether rows have one column and a softcap. For K targets, the softcap is always applied before the programs."""
    return bool(rows.softcap) and rows.logits.shape[-1] == 1 and rows.labels_T.dim() == 1


def apply_softcap(rows: Rows) -> tuple[Rows, Tensor]:
    """The rows of z, without softcap and temperature, and dz/dlogits [T, V]."""
    z_TV, slope_TV = whole_rows(rows)
    return rows._replace(logits=z_TV, softcap=0.0, inverse_temperature_T=None), slope_TV


def softcap_backward(grad_TV: Tensor, slope_TV: Tensor, rows: Rows, out: Tensor | None = None) -> Tensor:
    """Gradient of the logits, from that of the z of `apply_softcap`."""
    grad_TV = grad_TV * slope_TV
    if rows.keep_T is not None:
        # dz/dlogits of an ignored row may be NaN.
        grad_TV = torch.where(rows.keep_T[:, None], grad_TV, 0.0)
    grad = grad_TV.to(rows.logits.dtype).view(rows.logits.shape)
    return grad if out is None else out.copy_(grad)
