"""Functions that `torch:compile` compiles with TorchInductor: terms of matrices, and gradients from coefficients.

PyTorch operations without loops: each function is compiled into one loop over rows, so that a row is read from memory
once and stays in cache for the remaining operations. Arithmetic is float32, or float64 for float64 logits. Formulas are
in `loss_core.row_terms`.

TorchInductor stores the exponentials of a row that are used twice if they are computed by exp; by exp2, it recomputes
them. The target's column is not written here: in a loop over all classes it would cost one comparison per class.
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
from loss_core_torch.kernels.terms import scale_coefficients
from loss_core_torch.tracing import compute_dtype

_UNIT = 1.0 / GAP_UNIT


def _upcast(logits_TV: Tensor) -> Tensor:
    return logits_TV.to(compute_dtype(logits_TV.dtype))


def _shifted(x_TV: Tensor, m_T: Tensor) -> Tensor:
    """x - m; a row without any finite logit stays -inf, where -inf minus -inf would be NaN."""
    return x_TV - torch.where(m_T == -torch.inf, 0.0, m_T)[:, None]


def _exp2(x_TV: Tensor) -> Tensor:
    """exp(x), recomputed at each use."""
    # log2(e) as a literal: a global constant would become an input of the program.
    return (x_TV * 1.4426950408889634).exp2()


def _masked(out_TV: Tensor, keep_T: Tensor) -> Tensor:
    """Zero the ignored rows; not by a product with 0, since they may hold inf or NaN."""
    return torch.where(keep_T[:, None], out_TV, 0.0)


def _read(logits_TV: Tensor, inverse_T: Tensor | None, softcap: float) -> tuple[Tensor, Tensor | None]:
    """z of the logits, and the derivative of the softcap if there is one."""
    x_TV, slope_TV = _upcast(logits_TV), None
    if softcap:
        tanh_TV = (x_TV / softcap).tanh()
        x_TV, slope_TV = softcap * tanh_TV, 1.0 - tanh_TV * tanh_TV
    return x_TV if inverse_T is None else x_TV * inverse_T[:, None], slope_TV


def _weighted(exp_TV: Tensor, shifted_TV: Tensor) -> Tensor:
    """exp(x) x; 0 where exp(x) is 0, even if x is infinite."""
    return torch.where(exp_TV == 0, 0.0, exp_TV * shifted_TV)


def _gradient(exp_TV: Tensor, shifted_TV: Tensor, slope_TV: Tensor | None, coefficients: Coefficients) -> Tensor:
    """Gradient of the logits, without the target's column; see `row_terms.Coefficients`.

    Args:
        slope_TV: derivative of the softcap.
        coefficients: with the inverse temperature multiplied in.
    """
    grad_TV = exp_TV * coefficients.scale[:, None]
    if coefficients.slope is not None:
        grad_TV = grad_TV + _weighted(exp_TV, shifted_TV) * coefficients.slope[:, None]
    if coefficients.uniform is not None:
        grad_TV = grad_TV - coefficients.uniform[:, None]
    return grad_TV if slope_TV is None else grad_TV * slope_TV


def row_terms(
    logits_TV: Tensor, inverse_T: Tensor | None, m_T: Tensor | None, softcap: float, z_sum: bool, e: bool
) -> tuple[Tensor, ...]:
    """m, s, then z_sum and e if requested.

    Args:
        m_T: the maximum of z; None: computed here, without a softcap, whose result TorchInductor would store.
    """
    x_TV, _ = _read(logits_TV, inverse_T, softcap)
    m_T = x_TV.amax(-1) if m_T is None else m_T
    shifted_TV = _shifted(x_TV, m_T)
    exp_TV = shifted_TV.exp()
    terms = [m_T, exp_TV.sum(-1)]
    if z_sum:
        terms.append(x_TV.sum(-1))
    if e:
        terms.append(_weighted(exp_TV, shifted_TV).sum(-1))
    return tuple(terms)


def row_sum_around(logits_TV: Tensor, m_T: Tensor) -> Tensor:
    """s for a given finite m."""
    return (_upcast(logits_TV) - m_T[:, None]).exp().sum(-1)


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
    """Write the gradient, without the target's column, into out; 0 where keep is False."""
    x_TV, slope_TV = _read(logits_TV, inverse_T, softcap)
    shifted_TV = _shifted(x_TV, m_T)
    coefficients = Coefficients(scale_T, scale_T, uniform_T, slope_T)
    out_TV.copy_(_masked(_gradient(shifted_TV.exp(), shifted_TV, slope_TV, coefficients), keep_T))


def row_terms_and_grad(
    logits_TV: Tensor,
    inverse_T: Tensor | None,
    keep_T: Tensor,
    t_T: Tensor,
    coef_T: Tensor,
    m_T: Tensor | None,
    out_TV: Tensor,
    num_classes: int,
    *options: Any,
) -> tuple[Tensor, ...]:
    """m, s, then z_sum and e if requested; the gradient, without the target's column, is written into out.

    Args:
        m_T: finite; None: the maximum. If an approximate maximum were computed in this function, TorchInductor would
            store the exponentials of all rows.
        num_classes, options: fields of the `CrossEntropy`.
    """
    x_TV, _ = _read(logits_TV, inverse_T, 0.0)
    objective = CrossEntropy(num_classes, *options)
    if m_T is None:
        m_T = x_TV.amax(-1)
        shifted_TV = _shifted(x_TV, m_T)
    else:
        shifted_TV = x_TV - m_T[:, None]
    exp_TV = shifted_TV.exp()
    s_T = exp_TV.sum(-1)
    z_sum_T = x_TV.sum(-1) if objective.sums.z_sum else None
    e_T = _weighted(exp_TV, shifted_TV).sum(-1) if objective.sums.e else None
    coefficients = objective.coefficients(torch, RowTerms(m_T, s_T, t_T, z_sum_T, e_T), [coef_T])
    if inverse_T is not None:
        coefficients = scale_coefficients(coefficients, inverse_T)
    out_TV.copy_(_masked(_gradient(exp_TV, shifted_TV, None, coefficients), keep_T))
    return tuple(x_T for x_T in (m_T, s_T, z_sum_T, e_T) if x_T is not None)


def _pair_terms(student_TV: Tensor, teacher_TV: Tensor) -> PairTerms:
    m_s_T, m_t_T = student_TV.amax(-1), teacher_TV.amax(-1)
    student_TV, teacher_TV = _shifted(student_TV, m_s_T), _shifted(teacher_TV, m_t_T)
    exp_TV = _exp2(teacher_TV)
    # A class of probability 0 adds 0, even if the gap is inf or NaN.
    weighted_TV = torch.where(exp_TV == 0, 0.0, exp_TV * (teacher_TV * _UNIT - student_TV * _UNIT))
    return PairTerms(m_t_T, exp_TV.sum(-1), weighted_TV.sum(-1), m_s_T, _exp2(student_TV).sum(-1))


def _student_grad(student_TV: Tensor, teacher_TV: Tensor, keep_T: Tensor, terms: PairTerms, coef_T: Tensor) -> Tensor:
    p_s_TV = _exp2(_shifted(student_TV, terms.m_s)) * (coef_T / terms.s_s)[:, None]
    p_t_TV = _exp2(_shifted(teacher_TV, terms.m_t)) * (coef_T / terms.s_t)[:, None]
    return _masked(p_s_TV - p_t_TV, keep_T)


def pair_terms(student_TV: Tensor, teacher_TV: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
    """The PairTerms.

    Args:
        factor: inverse temperature, a scalar tensor, so that all temperatures use one program.
    """
    return _pair_terms(_upcast(student_TV) * factor, _upcast(teacher_TV) * factor)


def pair_student_grad(student_TV: Tensor, teacher_TV: Tensor, factor: Tensor, keep_T: Tensor, *rest: Tensor) -> None:
    """Write coef (p_s - p_t) into out, 0 where keep is False.

    Args:
        rest: the PairTerms, KL [T], coef [T], and out.
    """
    *fields, _, coef_T, out_TV = rest
    zs_TV, zt_TV = _upcast(student_TV) * factor, _upcast(teacher_TV) * factor
    out_TV.copy_(_student_grad(zs_TV, zt_TV, keep_T, PairTerms(*fields), coef_T))


def pair_teacher_grad(student_TV: Tensor, teacher_TV: Tensor, factor: Tensor, keep_T: Tensor, *rest: Tensor) -> None:
    """Write coef p_t (log p_t - log p_s - KL) into out, 0 where keep is False; arguments as of `pair_student_grad`."""
    *fields, kl_T, coef_T, out_TV = rest
    terms = PairTerms(*fields)
    exponent_TV = _shifted(_upcast(teacher_TV) * factor, terms.m_t)
    exp_TV = _exp2(exponent_TV)
    gap_TV = exponent_TV - _shifted(_upcast(student_TV) * factor, terms.m_s) - kl_centre(torch, terms, kl_T)[:, None]
    grad_TV = torch.where(exp_TV == 0, 0.0, exp_TV * gap_TV) * (coef_T / terms.s_t)[:, None]
    out_TV.copy_(_masked(grad_TV, keep_T))


def pair_terms_and_grad(
    student_TV: Tensor, teacher_TV: Tensor, factor: Tensor, keep_T: Tensor, coef_T: Tensor, out_TV: Tensor
) -> tuple[Tensor, ...]:
    """The PairTerms; coef (p_s - p_t) is written into out, 0 where keep is False."""
    zs_TV, zt_TV = _upcast(student_TV) * factor, _upcast(teacher_TV) * factor
    terms = _pair_terms(zs_TV, zt_TV)
    out_TV.copy_(_student_grad(zs_TV, zt_TV, keep_T, terms, coef_T))
    return terms


def _mixture(
    student_TV: Tensor, teacher_TV: Tensor, factor: Tensor, log_share_t: Tensor, log_share_s: Tensor, terms: PairTerms
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """p and log(p / M) of teacher and student; the logarithm is 0 where p is 0."""
    zt_TV = _shifted(_upcast(teacher_TV) * factor, terms.m_t)
    zs_TV = _shifted(_upcast(student_TV) * factor, terms.m_s)
    logs = mixture_logs(torch, zt_TV - zs_TV - log_ratio_offset(torch, terms)[:, None], log_share_t, log_share_s)
    both = []
    for z_TV, s_T, log_TV in ((zt_TV, terms.s_t, logs[0]), (zs_TV, terms.s_s, logs[1])):
        p_TV = _exp2(z_TV) / s_T[:, None]
        both.append((p_TV, torch.where(p_TV == 0, 0.0, log_TV)))
    return both[0], both[1]


def pair_mixture(
    student_TV: Tensor, teacher_TV: Tensor, factor: Tensor, log_share_t: Tensor, log_share_s: Tensor, *terms: Tensor
) -> tuple[Tensor, ...]:
    """The MixtureTerms.

    Args:
        log_share_t, log_share_s: logarithms of the weights of teacher and student in the mixture, scalar tensors.
        terms: the PairTerms.
    """
    both = _mixture(student_TV, teacher_TV, factor, log_share_t, log_share_s, PairTerms(*terms))
    return tuple((p_TV * log_TV).sum(-1) for p_TV, log_TV in both)


def mixture_student_grad(
    student_TV: Tensor, teacher_TV: Tensor, factor: Tensor, log_share_t: Tensor, log_share_s: Tensor, *rest: Tensor
) -> None:
    """Write coef p_s (log(p_s / M) - KL) into out, 0 where keep is False; see `pair_student_grad`."""
    keep_T, *fields, kl_T, coef_T, out_TV = rest
    _, (p_TV, log_TV) = _mixture(student_TV, teacher_TV, factor, log_share_t, log_share_s, PairTerms(*fields))
    out_TV.copy_(_masked(p_TV * (log_TV - kl_T[:, None]) * coef_T[:, None], keep_T))


def mixture_teacher_grad(
    student_TV: Tensor, teacher_TV: Tensor, factor: Tensor, log_share_t: Tensor, log_share_s: Tensor, *rest: Tensor
) -> None:
    """Write coef p_t (log(p_t / M) - KL) into out, 0 where keep is False; see `pair_student_grad`."""
    keep_T, *fields, kl_T, coef_T, out_TV = rest
    (p_TV, log_TV), _ = _mixture(student_TV, teacher_TV, factor, log_share_t, log_share_s, PairTerms(*fields))
    out_TV.copy_(_masked(p_TV * (log_TV - kl_T[:, None]) * coef_T[:, None], keep_T))
