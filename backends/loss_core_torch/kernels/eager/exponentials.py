"""Exponentials of a block of logits, their sums, and the gradient computed from them in place.

In base 2: in PyTorch's CPU kernels exp2 runs at memory bandwidth, exp at a third of that speed.
"""

# B = rows of a block, C = columns of it, z = logits (after softcap), x = z - m

from __future__ import annotations

import math

import torch
from torch import Tensor

from loss_core.row_terms import Coefficients
from loss_core_torch.tracing import is_readable

_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2.0)

# For a row's maximum below this size, its product with log2(e) has a rounding error of less than 1/8.
_MAX_MODERATE = 2.0**20

# Smaller exponents, -inf among them, may be replaced by this one: exp2 of it is 0 in float32 and in float64.
_MIN_EXPONENT = -2048.0


def log2_exp(z_BC: Tensor, factor: float, m_B: Tensor, out_BC: Tensor) -> Tensor | None:
    """Binary logarithms y of exp(factor z - m), up to an offset n per row.

    Args:
        z_BC: in the dtype of the arithmetic; may be out_BC.
        m_B: maximum of factor z in each row.
        out_BC: receives y.
    Returns:
        n [B], with exp(factor z - m) = 2^(y - n); None if it is 0 in all rows.
    """
    if not is_readable(m_B):
        shifted(z_BC, factor, m_B, out_BC).mul_(_LOG2_E)
        return None
    # NaN and infinities fail the comparison.
    if float(torch.linalg.vector_norm(m_B, torch.inf)) < _MAX_MODERATE:
        return _multiply_add(z_BC, factor, m_B, out_BC)
    # Chosen for each row by its own maximum: the rounding of a row must not depend on the other rows.
    huge_N = (~(m_B.abs() < _MAX_MODERATE)).nonzero()[:, 0]
    z_NC = z_BC[huge_N]
    y_NC = shifted(z_NC, factor, m_B[huge_N], z_NC).mul_(_LOG2_E)
    offset_B = _multiply_add(z_BC, factor, m_B, out_BC)
    out_BC.index_copy_(0, huge_N, y_NC)
    return offset_B.index_fill_(0, huge_N, 0.0)


def _multiply_add(z_BC: Tensor, factor: float, m_B: Tensor, out_BC: Tensor) -> Tensor:
    """`log2_exp` for rows of moderate maxima."""
    # One fused multiply-add, rounded once. The rounding error of `shift` is the same for the whole row: the offset.
    shift_B = m_B * -_LOG2_E
    torch.add(shift_B[:, None], z_BC, alpha=factor * _LOG2_E, out=out_BC)
    return torch.add(shift_B, m_B, alpha=_LOG2_E)


def shifted(z_BC: Tensor, factor: float, m_B: Tensor, out_BC: Tensor) -> Tensor:
    """factor z - m, written to out, which may be z."""
    if factor != 1.0:
        z_BC = torch.mul(z_BC, factor, out=out_BC)
    # -inf minus -inf is NaN: exponentials of a row without any finite logit must be 0.
    return torch.sub(z_BC, torch.where(m_B == -torch.inf, 0.0, m_B)[:, None], out=out_BC)


def remove_offset(x_B: Tensor, offset_B: Tensor | None) -> Tensor:
    """x / 2^n, for the offset n from `log2_exp`."""
    return x_B if offset_B is None else x_B / offset_B.exp2()


def row_sums(x_BC: Tensor) -> Tensor:
    """Sum of each row, with rounding that does not depend on the number of rows."""
    # PyTorch splits a single long row among its threads, but not one of several rows.
    return x_BC.sum(-1) if x_BC.shape[0] != 1 else x_BC.expand(2, -1).sum(-1)[:1]


def row_dots(x_BC: Tensor, y_BC: Tensor) -> Tensor:
    """Sum of x * y of each row, with rounding as in `row_sums`."""
    if x_BC.shape[0] != 1:
        return torch.linalg.vecdot(x_BC, y_BC)
    return torch.linalg.vecdot(x_BC.expand(2, -1), y_BC.expand(2, -1))[:1]


def finite_exponents(y_BC: Tensor, out_BC: Tensor) -> Tensor:
    """y of `log2_exp`, but finite where exp2 of it is 0; written to out."""
    return torch.clamp(y_BC, min=_MIN_EXPONENT, out=out_BC)


def exponent_sums(exp2_BC: Tensor, y_BC: Tensor, offset_B: Tensor | None, s_B: Tensor) -> Tensor:
    """Sum of exp(x) x of each row.

    Args:
        y_BC: `finite_exponents`, with x = ln(2) (y - offset); s_B: sums of exp(x).
    """
    e_B = remove_offset(row_dots(exp2_BC, y_BC), offset_B)
    return (e_B if offset_B is None else e_B - offset_B * s_B) * _LN_2


def write_gradient(
    exp2_BC: Tensor,
    offset_B: Tensor | None,
    coefficients: Coefficients,
    y_BC: Tensor | None,
    slope_BC: Tensor | None,
    out_BC: Tensor,
) -> None:
    """Gradient of rows without the targets' columns: (exp(x) (scale + slope x) - uniform) * slope_BC.

    Args:
        exp2_BC, offset_B: exp(x) = exp2 / 2^offset.
        y_BC: if coefficients have a slope, x = ln(2) (y - offset); overwritten.
        slope_BC: derivative of the softcap, if there is one.
        out_BC: receives the gradient; may be exp2_BC.
    """
    scale_B, by_y_B = coefficients.scale, None
    if y_BC is not None and coefficients.slope is not None:
        by_y_B = coefficients.slope * _LN_2
        scale_B = scale_B if offset_B is None else scale_B - offset_B * by_y_B
    scale_B1 = remove_offset(scale_B, offset_B)[:, None]
    if y_BC is None or by_y_B is None:
        torch.mul(exp2_BC, scale_B1, out=out_BC)
    else:
        weights_BC = y_BC.mul_(remove_offset(by_y_B, offset_B)[:, None]).add_(scale_B1)
        torch.mul(exp2_BC, weights_BC, out=out_BC)
    if coefficients.uniform is not None:
        out_BC.sub_(coefficients.uniform[:, None])
    if slope_BC is not None:
        out_BC.mul_(slope_BC)


def softcap_slope(tanh: Tensor, out: Tensor) -> Tensor:
    """1 - tanh^2, the derivative of the softcap."""
    return torch.addcmul(tanh.new_ones(()), tanh, tanh, value=-1, out=out)
