"""Exponentials of a block of logits, their sums, and the gradient that they become.

In base 2, because exp2 runs at the speed of memory in PyTorch's CPU kernels, exp at a third of it.
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

# Up to this size of a row's maximum, its product with log2(e) is rounded by less than 1/8.
_MODERATE = 2.0**20

# exp2 of this is 0 in float32 and in float64: logarithms below it, -inf among them, may be taken for it.
_NOTHING = -2048.0


def log2_exp(z_BC: Tensor, factor: float, m_B: Tensor, out_BC: Tensor) -> Tensor | None:
    """Binary logarithms y of exp(factor z - m), each row up to a number of its own.

    Args:
        z_BC: in the dtype of the arithmetic; may be out_BC.
        m_B: largest value of factor z in each row.
        out_BC: receives y.
    Returns:
        The row's number n, with exp(factor z - m) = 2^(y - n); None where it is 0 in all rows.
    """
    if not is_readable(m_B):
        shifted(z_BC, factor, m_B, out_BC).mul_(_LOG2_E)
        return None
    # NaN and infinities fail the comparison.
    if float(torch.linalg.vector_norm(m_B, torch.inf)) < _MODERATE:
        return _multiply_add(z_BC, factor, m_B, out_BC)
    # Each row by its own maximum: its rounding must not depend on the rows beside it.
    huge_N = (~(m_B.abs() < _MODERATE)).nonzero()[:, 0]
    z_NC = z_BC[huge_N]
    y_NC = shifted(z_NC, factor, m_B[huge_N], z_NC).mul_(_LOG2_E)
    number_B = _multiply_add(z_BC, factor, m_B, out_BC)
    out_BC.index_copy_(0, huge_N, y_NC)
    return number_B.index_fill_(0, huge_N, 0.0)


def _multiply_add(z_BC: Tensor, factor: float, m_B: Tensor, out_BC: Tensor) -> Tensor:
    """`log2_exp` where each row's maximum is moderate."""
    # One fused multiply-add, rounded once. What rounding moves `shift` by is the same for the whole row: it is the
    # number that is returned.
    shift_B = m_B * -_LOG2_E
    torch.add(shift_B[:, None], z_BC, alpha=factor * _LOG2_E, out=out_BC)
    return torch.add(shift_B, m_B, alpha=_LOG2_E)


def shifted(z_BC: Tensor, factor: float, m_B: Tensor, out_BC: Tensor) -> Tensor:
    """factor z - m, into `out`, which may be z."""
    if factor != 1.0:
        z_BC = torch.mul(z_BC, factor, out=out_BC)
    # -inf minus -inf is NaN: a row without any finite logit must give 0.
    return torch.sub(z_BC, torch.where(m_B == -torch.inf, 0.0, m_B)[:, None], out=out_BC)


def without(number_B: Tensor | None, powers_B: Tensor) -> Tensor:
    """powers / 2^n, for the number n of `log2_exp`."""
    return powers_B if number_B is None else powers_B / number_B.exp2()


def row_sums(x_BC: Tensor) -> Tensor:
    """Sum of each row; its rounding does not depend on how many rows there are."""
    # PyTorch cuts one long row alone into a piece for each thread. Beside a second row it does not.
    return x_BC.sum(-1) if x_BC.shape[0] != 1 else x_BC.expand(2, -1).sum(-1)[:1]


def row_dots(x_BC: Tensor, y_BC: Tensor) -> Tensor:
    """Sum of x * y of each row; otherwise as `row_sums`."""
    if x_BC.shape[0] != 1:
        return torch.linalg.vecdot(x_BC, y_BC)
    return torch.linalg.vecdot(x_BC.expand(2, -1), y_BC.expand(2, -1))[:1]


def exponents(y_BC: Tensor, number_B: Tensor | None, out_BC: Tensor) -> Tensor:
    """x from the logarithms and numbers of `log2_exp`, finite where exp(x) is 0; into `out`, which is not y."""
    torch.clamp(y_BC, min=_NOTHING, out=out_BC)
    if number_B is not None:
        out_BC.sub_(number_B[:, None])
    return out_BC.mul_(_LN_2)


def to_gradient(
    powers_BC: Tensor,
    number_B: Tensor | None,
    coefficients: Coefficients,
    x_BC: Tensor | None,
    slope_BC: Tensor | None,
    out_BC: Tensor,
) -> None:
    """Gradient of a row but for the target's column: (exp(x) (scale + slope x) - uniform) times the softcap's slope.

    Args:
        powers_BC, number_B: exp(x) = powers / 2^number.
        x_BC: where coefficients have a slope; overwritten.
        slope_BC: of the softcap, where there is one.
        out_BC: receives it; may be powers.
    """
    scale_B1 = without(number_B, coefficients.scale)[:, None]
    if x_BC is None or coefficients.slope is None:
        torch.mul(powers_BC, scale_B1, out=out_BC)
    else:
        weights_BC = x_BC.mul_(without(number_B, coefficients.slope)[:, None]).add_(scale_B1)
        torch.mul(powers_BC, weights_BC, out=out_BC)
    if coefficients.uniform is not None:
        out_BC.sub_(coefficients.uniform[:, None])
    if slope_BC is not None:
        out_BC.mul_(slope_BC)


def softcap_slope(tanh: Tensor, out: Tensor) -> Tensor:
    """1 - tanh^2, the slope of the softcap."""
    return torch.mul(tanh, tanh, out=out).neg_().add_(1.0)
