"""What TorchInductor compiles for `torch:compile`: the losses over logits on matrices, each in one function.

Plain PyTorch operations without loops: the compiler makes one loop over rows out of each, so that a row is read from
memory once and is in cache for whatever else looks at it. Arithmetic is float32, or float64 for float64 logits. The
formulas stand in `loss_core.oracle`, the row state in `loss_core.row_stats`.

An exponential that is used twice is made once: TorchInductor keeps those of the row that it works on (of exp; it would
make exp2 again). The -1 of the gradient at the label's class is not here: in a loop over all classes it would cost each
of them a comparison.
"""

# T = tokens, V = vocabulary (of this rank)

from __future__ import annotations

import torch
from torch import Tensor

from loss_core import row_stats
from loss_core_torch.compiled import LONG_ROW
from loss_core_torch.values import compute_dtype


def _wide(logits_TV: Tensor) -> Tensor:
    return logits_TV.to(compute_dtype(logits_TV.dtype))


def _shifted(x_TV: Tensor, m_T: Tensor) -> Tensor:
    """x - m, where a row without any finite logit stays -inf: -inf minus -inf would be NaN."""
    return x_TV - torch.where(m_T == -torch.inf, 0.0, m_T)[:, None]


def _exp2(x_TV: Tensor) -> Tensor:
    """exp that is made again for each use."""
    # log2 e as a literal: a number from elsewhere would become an input of the program.
    return (x_TV * 1.4426950408889634).exp2()


def looks_once(logits_TV: Tensor) -> bool:
    """Whether m is that of `row_stats.near_largest`, so that `near_enough` is to be asked. Of [..., V] logits."""
    return logits_TV.device.type == "cpu" and logits_TV.shape[-1] > LONG_ROW


def near_largest(logits_TV: Tensor, t_T: Tensor) -> Tensor:
    """m of each row for the label's logit t, in the dtype of the arithmetic."""
    m_T: Tensor = row_stats.near_largest(torch, _wide(logits_TV[:, : row_stats.NEAR_COLUMNS]), t_T)
    return m_T


def _kept(out_TV: Tensor, keep_T: Tensor) -> Tensor:
    """Ignored rows cleared; not by a product with 0, since they may hold inf or NaN."""
    return torch.where(keep_T[:, None], out_TV, 0.0)


def cross_entropy_stats(logits_TV: Tensor, column_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row state (m, s, t).

    Args:
        column_T: [T] int64, the label's column; where it is none of these, t is -inf.
    """
    x_TV = _wide(logits_TV)
    owned_T = (column_T >= 0) & (column_T < x_TV.shape[1])
    t_T = x_TV.gather(1, torch.where(owned_T, column_T, 0)[:, None])[:, 0]
    t_T = torch.where(owned_T, t_T, -torch.inf)
    m_T = near_largest(x_TV, t_T) if looks_once(x_TV) else x_TV.amax(-1)
    return m_T, _shifted(x_TV, m_T).exp().sum(-1), t_T


def cross_entropy_grad(
    logits_TV: Tensor, keep_T: Tensor, m_T: Tensor, s_T: Tensor, coef_T: Tensor, out_TV: Tensor
) -> None:
    """coef softmax into out, 0 where keep is False."""
    powers_TV = _shifted(_wide(logits_TV), m_T).exp()
    out_TV.copy_(_kept(powers_TV * (coef_T / s_T)[:, None], keep_T))


def cross_entropy_overwrite(logits_TV: Tensor, keep_T: Tensor, m_T: Tensor, s_T: Tensor, coef_T: Tensor) -> None:
    """`cross_entropy_grad` over the logits."""
    powers_TV = _shifted(_wide(logits_TV), m_T).exp()
    logits_TV.copy_(_kept(powers_TV * (coef_T / s_T)[:, None], keep_T))


def cross_entropy_with_grad(logits_TV: Tensor, keep_T: Tensor, coef_T: Tensor, out_TV: Tensor) -> tuple[Tensor, Tensor]:
    """m and s, and coef softmax into out, 0 where keep is False."""
    x_TV = _wide(logits_TV)
    m_T = x_TV.amax(-1)
    return m_T, _powers_with_grad(_shifted(x_TV, m_T), keep_T, coef_T, out_TV)


def cross_entropy_with_grad_near(
    logits_TV: Tensor, m_T: Tensor, keep_T: Tensor, coef_T: Tensor, out_TV: Tensor
) -> Tensor:
    """s for the m of `near_largest`, and coef softmax into out, 0 where keep is False."""
    # m is given: were it made in here, TorchInductor would keep the exponentials of all rows.
    return _powers_with_grad(_wide(logits_TV) - m_T[:, None], keep_T, coef_T, out_TV)


def _powers_with_grad(shifted_TV: Tensor, keep_T: Tensor, coef_T: Tensor, out_TV: Tensor) -> Tensor:
    powers_TV = shifted_TV.exp()
    s_T = powers_TV.sum(-1)
    out_TV.copy_(_kept(powers_TV * (coef_T / s_T)[:, None], keep_T))
    return s_T


def _kd_state(student_TV: Tensor, teacher_TV: Tensor) -> row_stats.KDRowState:
    m_s_T, m_t_T = student_TV.amax(-1), teacher_TV.amax(-1)
    student_TV, teacher_TV = _shifted(student_TV, m_s_T), _shifted(teacher_TV, m_t_T)
    powers_TV = _exp2(teacher_TV)
    # A probability of 0 counts for nothing, even if the gap is inf or NaN.
    weighted_TV = torch.where(powers_TV == 0, 0.0, powers_TV * (teacher_TV - student_TV))
    return row_stats.KDRowState(m_t_T, powers_TV.sum(-1), weighted_TV.sum(-1), m_s_T, _exp2(student_TV).sum(-1))


def _kd_student_grad(
    student_TV: Tensor,
    teacher_TV: Tensor,
    keep_T: Tensor,
    state: row_stats.KDRowState,
    coef_T: Tensor,
) -> Tensor:
    p_s_TV = _exp2(_shifted(student_TV, state.m_s)) * (coef_T / state.s_s)[:, None]
    p_t_TV = _exp2(_shifted(teacher_TV, state.m_t)) * (coef_T / state.s_t)[:, None]
    return _kept(p_s_TV - p_t_TV, keep_T)


def distillation_stats(student_TV: Tensor, teacher_TV: Tensor, inverse_temperature: Tensor) -> tuple[Tensor, ...]:
    """KDRowState.

    Args:
        inverse_temperature: scalar tensor, so that another temperature is no other program.
    """
    return _kd_state(_wide(student_TV) * inverse_temperature, _wide(teacher_TV) * inverse_temperature)


def distillation_student_grad(
    student_TV: Tensor,
    teacher_TV: Tensor,
    keep_T: Tensor,
    m_t_T: Tensor,
    s_t_T: Tensor,
    m_s_T: Tensor,
    s_s_T: Tensor,
    coef_T: Tensor,
    inverse_temperature: Tensor,
    out_TV: Tensor,
) -> None:
    """coef (p_s - p_t) into out, 0 where keep is False."""
    zs_TV, zt_TV = _wide(student_TV) * inverse_temperature, _wide(teacher_TV) * inverse_temperature
    state = row_stats.KDRowState(m_t_T, s_t_T, s_t_T, m_s_T, s_s_T)
    out_TV.copy_(_kd_student_grad(zs_TV, zt_TV, keep_T, state, coef_T))


def distillation_teacher_grad(
    student_TV: Tensor,
    teacher_TV: Tensor,
    keep_T: Tensor,
    m_t_T: Tensor,
    s_t_T: Tensor,
    m_s_T: Tensor,
    s_s_T: Tensor,
    kl_T: Tensor,
    coef_T: Tensor,
    inverse_temperature: Tensor,
    out_TV: Tensor,
) -> None:
    """coef p_t (log p_t - log p_s - KL) into out, 0 where keep is False."""
    zs_TV, zt_TV = _wide(student_TV) * inverse_temperature, _wide(teacher_TV) * inverse_temperature
    exponent_TV = _shifted(zt_TV, m_t_T)
    powers_TV = _exp2(exponent_TV)
    excess_TV = exponent_TV - _shifted(zs_TV, m_s_T) - (s_t_T.log() - s_s_T.log() + kl_T)[:, None]
    grad_TV = torch.where(powers_TV == 0, 0.0, powers_TV * excess_TV) * (coef_T / s_t_T)[:, None]
    out_TV.copy_(_kept(grad_TV, keep_T))


def distillation_with_grad(
    student_TV: Tensor,
    teacher_TV: Tensor,
    keep_T: Tensor,
    coef_T: Tensor,
    inverse_temperature: Tensor,
    out_TV: Tensor,
) -> tuple[Tensor, ...]:
    """KDRowState, and coef (p_s - p_t) into out, 0 where keep is False."""
    zs_TV, zt_TV = _wide(student_TV) * inverse_temperature, _wide(teacher_TV) * inverse_temperature
    state = _kd_state(zs_TV, zt_TV)
    out_TV.copy_(_kd_student_grad(zs_TV, zt_TV, keep_T, state, coef_T))
    return state
