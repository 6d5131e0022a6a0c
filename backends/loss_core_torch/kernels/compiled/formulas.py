"""What TorchInductor compiles for `torch:compile`, on matrices: terms, and gradients from coefficients.

Plain PyTorch operations without loops: the compiler makes one loop over rows out of each function, so that a row is
read from memory once and is in cache for whatever else looks at it. Arithmetic is float32, or float64 for float64
logits. The laws stand in `loss_core.row_terms`.

An exponential that is used twice is made once: TorchInductor keeps those of the row that it works on (of exp; it would
make exp2 again). The target's column is not written here: in a loop over all classes it would cost each of them a
comparison.
"""

# T = tokens, V = vocabulary (of this rank)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loss_core.row_terms import (
    GAP_UNIT,
    Coefficients,
    CrossEntropy,
    PairTerms,
    RowTerms,
    kl_centre,
    log_ratio_offset,
    mixture_logs,
)
from loss_core_torch.kernels.terms import times
from loss_core_torch.tracing import compute_dtype

_UNIT = 1.0 / GAP_UNIT


def _wide(logits_TV: Tensor) -> Tensor:
    return logits_TV.to(compute_dtype(logits_TV.dtype))


def _shifted(x_TV: Tensor, m_T: Tensor) -> Tensor:
    """x - m, where a row without any finite logit stays -inf: -inf minus -inf would be NaN."""
    return x_TV - torch.where(m_T == -torch.inf, 0.0, m_T)[:, None]


def _exp2(x_TV: Tensor) -> Tensor:
    """exp that is made again for each use."""
    # log2 e as a literal: a number from elsewhere would become an input of the program.
    return (x_TV * 1.4426950408889634).exp2()


def _kept(out_TV: Tensor, keep_T: Tensor) -> Tensor:
    """Ignored rows cleared; not by a product with 0, since they may hold inf or NaN."""
    return torch.where(keep_T[:, None], out_TV, 0.0)


def read(logits_TV: Tensor, inverse_T: Tensor | None, softcap: float) -> tuple[Tensor, Tensor | None]:
    """z of the logits, and the slope of their softcap where there is one."""
    x_TV, slope_TV = _wide(logits_TV), None
    if softcap:
        tanh_TV = (x_TV / softcap).tanh()
        x_TV, slope_TV = softcap * tanh_TV, 1.0 - tanh_TV * tanh_TV
    return x_TV if inverse_T is None else x_TV * inverse_T[:, None], slope_TV


def _weighted(powers_TV: Tensor, shifted_TV: Tensor) -> Tensor:
    """exp(x) x; a probability of 0 counts for nothing, though its x be infinite."""
    return torch.where(powers_TV == 0, 0.0, powers_TV * shifted_TV)


def _gradient(powers_TV: Tensor, shifted_TV: Tensor, slope_TV: Tensor | None, coefficients: Coefficients) -> Tensor:
    """Gradient of rows by the logits but for the target's column; see `row_terms.Coefficients`.

    Args:
        slope_TV: of the softcap; coefficients: times the inverse temperature.
    """
    grad_TV = powers_TV * coefficients.scale[:, None]
    if coefficients.slope is not None:
        grad_TV = grad_TV + _weighted(powers_TV, shifted_TV) * coefficients.slope[:, None]
    if coefficients.uniform is not None:
        grad_TV = grad_TV - coefficients.uniform[:, None]
    return grad_TV if slope_TV is None else grad_TV * slope_TV


def row_terms(logits_TV: Tensor, inverse_T: Tensor | None, softcap: float, z_sum: bool, e: bool) -> tuple[Tensor, ...]:
    """m, s, then those of z_sum and e that are wanted."""
    x_TV, _ = read(logits_TV, inverse_T, softcap)
    m_T = x_TV.amax(-1)
    shifted_TV = _shifted(x_TV, m_T)
    powers_TV = shifted_TV.exp()
    found = [m_T, powers_TV.sum(-1)]
    if z_sum:
        found.append(x_TV.sum(-1))
    if e:
        found.append(_weighted(powers_TV, shifted_TV).sum(-1))
    return tuple(found)


def row_sum_around(logits_TV: Tensor, m_T: Tensor) -> Tensor:
    """s for a given m, which is finite."""
    return (_wide(logits_TV) - m_T[:, None]).exp().sum(-1)


def row_grad(
    logits_TV: Tensor,
    inverse_T: Tensor | None,
    keep_T: Tensor,
    m_T: Tensor,
    scale_T: Tensor,
    uniform_T: Tensor | None,
    slope_T: Tensor | None,
    out_TV: Tensor,
    softcap: float,
) -> None:
    """The gradient but for the target's column into out, 0 where keep is False."""
    x_TV, slope_TV = read(logits_TV, inverse_T, softcap)
    shifted_TV = _shifted(x_TV, m_T)
    coefficients = Coefficients(scale_T, scale_T, uniform_T, slope_T)
    out_TV.copy_(_kept(_gradient(shifted_TV.exp(), shifted_TV, slope_TV, coefficients), keep_T))


def row_terms_and_grad(
    logits_TV: Tensor,
    inverse_T: Tensor | None,
    keep_T: Tensor,
    t_T: Tensor,
    coef_T: Tensor,
    m_T: Tensor | None,
    out_TV: Tensor,
    num_classes: int,
    softcap: float,
    *options: Any,
) -> tuple[Tensor, ...]:
    """m, s, then those of z_sum and e that are wanted; and the gradient but for the target's column into out.

    Args:
        m_T: finite; None: the maximum. Were it made in here, TorchInductor would keep the exponentials of all rows.
        num_classes, options: of the `CrossEntropy`.
    """
    x_TV, slope_TV = read(logits_TV, inverse_T, softcap)
    objective = CrossEntropy(num_classes, *options)
    if m_T is None:
        m_T = x_TV.amax(-1)
        shifted_TV = _shifted(x_TV, m_T)
    else:
        shifted_TV = x_TV - m_T[:, None]
    powers_TV = shifted_TV.exp()
    s_T = powers_TV.sum(-1)
    z_sum_T = x_TV.sum(-1) if objective.sums.z_sum else None
    e_T = _weighted(powers_TV, shifted_TV).sum(-1) if objective.sums.e else None
    coefficients = objective.coefficients(torch, RowTerms(m_T, s_T, t_T, z_sum_T, e_T), [coef_T])
    if inverse_T is not None:
        coefficients = times(coefficients, inverse_T)
    out_TV.copy_(_kept(_gradient(powers_TV, shifted_TV, slope_TV, coefficients), keep_T))
    return tuple(x_T for x_T in (m_T, s_T, z_sum_T, e_T) if x_T is not None)


def _pair_terms(student_TV: Tensor, teacher_TV: Tensor) -> PairTerms:
    m_s_T, m_t_T = student_TV.amax(-1), teacher_TV.amax(-1)
    student_TV, teacher_TV = _shifted(student_TV, m_s_T), _shifted(teacher_TV, m_t_T)
    powers_TV = _exp2(teacher_TV)
    # A probability of 0 counts for nothing, even if the gap is inf or NaN.
    weighted_TV = torch.where(powers_TV == 0, 0.0, powers_TV * (teacher_TV * _UNIT - student_TV * _UNIT))
    return PairTerms(m_t_T, powers_TV.sum(-1), weighted_TV.sum(-1), m_s_T, _exp2(student_TV).sum(-1))


def _student_grad(student_TV: Tensor, teacher_TV: Tensor, keep_T: Tensor, terms: PairTerms, coef_T: Tensor) -> Tensor:
    p_s_TV = _exp2(_shifted(student_TV, terms.m_s)) * (coef_T / terms.s_s)[:, None]
    p_t_TV = _exp2(_shifted(teacher_TV, terms.m_t)) * (coef_T / terms.s_t)[:, None]
    return _kept(p_s_TV - p_t_TV, keep_T)


def pair_terms(student_TV: Tensor, teacher_TV: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
    """PairTerms.

    Args:
        factor: of both logits, a scalar tensor, so that another temperature is no other program.
    """
    return _pair_terms(_wide(student_TV) * factor, _wide(teacher_TV) * factor)


def pair_student_grad(student_TV: Tensor, teacher_TV: Tensor, factor: Tensor, keep_T: Tensor, *rest: Tensor) -> None:
    """coef (p_s - p_t) into out, 0 where keep is False.

    Args:
        rest: PairTerms, KL, coef [T], and out.
    """
    *found, _, coef_T, out_TV = rest
    zs_TV, zt_TV = _wide(student_TV) * factor, _wide(teacher_TV) * factor
    out_TV.copy_(_student_grad(zs_TV, zt_TV, keep_T, PairTerms(*found), coef_T))


def pair_teacher_grad(student_TV: Tensor, teacher_TV: Tensor, factor: Tensor, keep_T: Tensor, *rest: Tensor) -> None:
    """coef p_t (log p_t - log p_s - KL) into out, 0 where keep is False; arguments as `pair_student_grad`."""
    *found, kl_T, coef_T, out_TV = rest
    terms = PairTerms(*found)
    exponent_TV = _shifted(_wide(teacher_TV) * factor, terms.m_t)
    powers_TV = _exp2(exponent_TV)
    gap_TV = exponent_TV - _shifted(_wide(student_TV) * factor, terms.m_s) - kl_centre(torch, terms, kl_T)[:, None]
    grad_TV = torch.where(powers_TV == 0, 0.0, powers_TV * gap_TV) * (coef_T / terms.s_t)[:, None]
    out_TV.copy_(_kept(grad_TV, keep_T))


def pair_terms_and_grad(
    student_TV: Tensor, teacher_TV: Tensor, factor: Tensor, keep_T: Tensor, coef_T: Tensor, out_TV: Tensor
) -> tuple[Tensor, ...]:
    """PairTerms, and coef (p_s - p_t) into out, 0 where keep is False."""
    zs_TV, zt_TV = _wide(student_TV) * factor, _wide(teacher_TV) * factor
    terms = _pair_terms(zs_TV, zt_TV)
    out_TV.copy_(_student_grad(zs_TV, zt_TV, keep_T, terms, coef_T))
    return terms


def _mixture(
    student_TV: Tensor, teacher_TV: Tensor, factor: Tensor, share_t: Tensor, share_s: Tensor, terms: PairTerms
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Of teacher and student: p, and log(p / M), 0 where p is 0."""
    zt_TV = _shifted(_wide(teacher_TV) * factor, terms.m_t)
    zs_TV = _shifted(_wide(student_TV) * factor, terms.m_s)
    logs = mixture_logs(torch, zt_TV - zs_TV - log_ratio_offset(torch, terms)[:, None], share_t, share_s)
    of_both = []
    for z_TV, s_T, log_TV in ((zt_TV, terms.s_t, logs[0]), (zs_TV, terms.s_s, logs[1])):
        p_TV = _exp2(z_TV) / s_T[:, None]
        of_both.append((p_TV, torch.where(p_TV == 0, 0.0, log_TV)))
    return of_both[0], of_both[1]


def pair_mixture(
    student_TV: Tensor, teacher_TV: Tensor, factor: Tensor, share_t: Tensor, share_s: Tensor, *terms: Tensor
) -> tuple[Tensor, ...]:
    """MixtureTerms.

    Args:
        share_t, share_s: logarithms of teacher's and student's share, scalar tensors as factor.
        terms: PairTerms.
    """
    of_both = _mixture(student_TV, teacher_TV, factor, share_t, share_s, PairTerms(*terms))
    return tuple((p_TV * log_TV).sum(-1) for p_TV, log_TV in of_both)


def mixture_student_grad(
    student_TV: Tensor, teacher_TV: Tensor, factor: Tensor, share_t: Tensor, share_s: Tensor, *rest: Tensor
) -> None:
    """coef p_s (log(p_s / M) - KL) into out, 0 where keep is False; else as `pair_student_grad`."""
    keep_T, *found, kl_T, coef_T, out_TV = rest
    _, (p_TV, log_TV) = _mixture(student_TV, teacher_TV, factor, share_t, share_s, PairTerms(*found))
    out_TV.copy_(_kept(p_TV * (log_TV - kl_T[:, None]) * coef_T[:, None], keep_T))


def mixture_teacher_grad(
    student_TV: Tensor, teacher_TV: Tensor, factor: Tensor, share_t: Tensor, share_s: Tensor, *rest: Tensor
) -> None:
    """coef p_t (log(p_t / M) - KL) into out, 0 where keep is False; else as `pair_student_grad`."""
    keep_T, *found, kl_T, coef_T, out_TV = rest
    (p_TV, log_TV), _ = _mixture(student_TV, teacher_TV, factor, share_t, share_s, PairTerms(*found))
    out_TV.copy_(_kept(p_TV * (log_TV - kl_T[:, None]) * coef_T[:, None], keep_T))
