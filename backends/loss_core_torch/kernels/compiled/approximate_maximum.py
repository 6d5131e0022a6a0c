"""Long rows on a CPU with one pass over the logits fewer: m is an approximate maximum, from a part of the columns.

Any m will do if no exp(z - m) overflows and no more than rounding is lost. The sum shows afterwards whether that is so
(`is_accurate`); if not, a second call computes the exact maximum.

Measured, cross entropy over 2048 x 32000 logits in float32, forward and backward, 2 threads, on an EPYC with AVX2: 202
and 211 ms with it, 261 and 251 with the exact maximum (fresh processes, alternating; 2026-11-26, torch 2.13). It was
found first on an EPYC with AVX-512.
"""

# B = rows of a block, V = vocabulary

from __future__ import annotations

import torch
from torch import Tensor

from loss_core_torch.kernels.compiled.programs import LONG_ROW
from loss_core_torch.tracing import compute_dtype

_COLUMNS = 256


def applies(z_BV: Tensor) -> bool:
    """Whether it is faster: not for 16-bit logits, for which TorchInductor would store the exponentials of all rows."""
    return z_BV.device.type == "cpu" and z_BV.shape[1] > LONG_ROW and z_BV.dtype == compute_dtype(z_BV.dtype)


def compute(z_BV: Tensor, t_B: Tensor) -> Tensor:
    """Maximum of the first 256 logits and the target's, [B]; 0 where all are -inf."""
    m_B = torch.maximum(z_BV[:, :_COLUMNS].amax(-1), t_B)
    return m_B.masked_fill(m_B == -torch.inf, 0.0)


def is_accurate(s_B: Tensor, keep_B: Tensor | None = None) -> bool:
    """Whether the sums of all rows with keep_B show that no logit is more than 30 above m.

    Up to there the rounding of z - m changes exp by 16 u at most. The bound of `losses/bounds/rounding.py`, for rows of
    n > 256 logits, is 6 sqrt(n) u, at least 96 u; sums in vectors of 8 need no more than 6 sqrt(n / 8) u of that.
    """
    accurate_B = (s_B > 1e-13) & (s_B < 1e13)
    return bool((accurate_B if keep_B is None else accurate_B | ~keep_B).all())
