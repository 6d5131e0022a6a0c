"""Distillation between two linear heads: as `distillation`, with z = h @ W.T / temperature for student and teacher."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, H = hidden, H_t = hidden of the teacher

from __future__ import annotations

from typing import Any

import numpy as np

from loss_core.dtypes import compute_format
from loss_core.losses.bounds.products import product_errors, raw_logits
from loss_core.losses.bounds.rounding import SoftmaxErrors, finite, result_errors
from loss_core.losses.definition import Arrays, Floats, LossDef, Recipe, Sizes, Upstream
from loss_core.losses.distillation import DEFINITION as OVER_LOGITS
from loss_core.losses.distillation import beta_of, divergence_errors, side, token_divergence
from loss_core.losses.fused import fused_definition
from loss_core.losses.heads import Head
from loss_core.losses.reduction import TokenResult, times_rows

_SIDES = ("student_", "teacher_")

HEADS = tuple(
    Head(f"{of}hidden_states", f"{of}lm_weight", f"{of}logits", dim=dim)
    for of, dim in zip(_SIDES, ("H", "H_t"), strict=True)
)


def error_bound(
    config: Any, arrays: Arrays, expected: TokenResult, dtype: str, upstream: Upstream, product_dtype: str | None
) -> dict[str, Floats]:
    """As for distillation of exact logits, plus the effect of rounded logits, plus the products of the gradients."""
    inner, temp, beta = compute_format(dtype), float(config.temperature), beta_of(config)
    keep_T = expected.reduction.keep_T
    u, sides, shifts = inner.u, [], []
    for of in _SIDES:
        raw_TV, err_raw_TV = raw_logits(arrays, keep_T, u, of)
        z_TV = raw_TV / temp
        scaled_T = (2 * u if temp != 1 else 0.0) * np.max(np.abs(finite(z_TV)), axis=-1)
        sides.append(side(z_TV, scaled_T, inner))
        shifts.append(err_raw_TV / temp)
    student, teacher = sides
    err_d_T, *err_by_z = divergence_errors(beta, student, teacher, u)
    _, *by_z = token_divergence(beta, student.sm.z_TV, teacher.sm.z_TV)
    # Mean value theorem; on the path from the exact to the rounded logits, err_by_z is largest at its end.
    changes = gradient_changes(beta, (student.sm, teacher.sm), shifts)
    err_by_z = [err_TV + change_TV for err_TV, change_TV in zip(err_by_z, changes, strict=True)]
    for by_z_TV, err_TV, shift_TV in zip(by_z, err_by_z, shifts, strict=True):
        err_d_T = err_d_T + np.sum((np.abs(finite(by_z_TV)) + err_TV) * shift_TV, axis=-1)
    d_T = np.abs(finite(expected.token_loss_T)) / temp**2
    err_T = np.where(keep_T, temp**2 * (err_d_T + 3 * u * d_T), 0.0)
    result = result_errors(config, expected, err_T, dtype, upstream)
    coef_T = np.abs(expected.coef_T) * temp
    for of, by_z_TV, err_TV in zip(_SIDES, by_z, err_by_z, strict=True):
        draw_TV = finite(times_rows(coef_T, by_z_TV))
        err_draw_TV = finite(times_rows(coef_T, err_TV)) + np.where(coef_T == 0, 0.0, inner.near_zero)[:, None]
        result |= product_errors(arrays, expected, draw_TV, err_draw_TV, keep_T, dtype, product_dtype, of)
    return result


def gradient_changes(beta: float, both: tuple[SoftmaxErrors, SoftmaxErrors], shifts: list[Floats]) -> list[Floats]:
    """Bound on the change of dD/dz of student and teacher [T, V] if each z is shifted by at most its entry of `shifts`.

    lse changes by at most log sum p e^shift, log p = z - lse by at most d = that + shift, and p by at most the factor
    e^d. A change of x that is common to a row cancels in p (x - sum p x): for x = log p_t - log p_s only the shifts of
    z remain. log(p / M) has a slope in [0, 1] by log p_t - log p_s.
    """
    if beta == 1:
        return gradient_changes(0.0, both[::-1], shifts[::-1])[::-1]
    logs = [
        shift_TV + np.log(np.sum(sm.p_TV * np.exp(shift_TV), axis=-1, keepdims=True))
        for sm, shift_TV in zip(both, shifts, strict=True)
    ]
    factors, (student, teacher) = [np.expm1(log_TV) for log_TV in logs], both
    if beta == 0:
        log_ratio_TV = teacher.log_p_TV - student.log_p_TV
        by_teacher = _centred_change(teacher.p_TV, log_ratio_TV, factors[1], shifts[0] + shifts[1])
        return [student.p_TV * factors[0] + teacher.p_TV * factors[1], by_teacher]
    log_m_TV = np.logaddexp(np.log(beta) + teacher.log_p_TV, np.log1p(-beta) + student.log_p_TV)
    return [
        share * _centred_change(sm.p_TV, sm.log_p_TV - log_m_TV, factor_TV, logs[0] + logs[1])
        for share, sm, factor_TV in zip((1 - beta, beta), both, factors, strict=True)
    ]


def _centred_change(p_TV: Floats, x_TV: Floats, factor_TV: Floats, change_x_TV: Floats) -> Floats:
    """Bound on the change of p (x - sum p x) if p changes by at most p * factor, and x by at most change_x."""
    x_TV = finite(x_TV)
    centred_TV = np.abs(x_TV - np.sum(p_TV * x_TV, axis=-1, keepdims=True))
    change_TV = factor_TV * centred_TV + (1 + factor_TV) * change_x_TV
    change_mean_T1 = np.sum(p_TV * change_TV, axis=-1, keepdims=True)
    return np.asarray(p_TV * (change_TV + (1 + factor_TV) * change_mean_T1))


def near_heads(definition: LossDef, sizes: Sizes, scale: float, rng: np.random.Generator) -> dict[str, Floats]:
    """A teacher whose logits are those of the student, perturbed by half their size; see `distillation.near_logits`."""

    def draw(dims: tuple[str, ...], size: float = 1.0) -> Floats:
        return rng.standard_normal(sizes.shape(dims)) * size

    hidden, weight = draw(("T", "H")), draw(("V", "H"), scale / np.sqrt(sizes.hidden))
    others = draw(("V", "H"), scale / np.sqrt(sizes.hidden) / 2)
    return {
        "student_hidden_states": hidden,
        "student_lm_weight": weight,
        "teacher_hidden_states": np.concatenate([hidden, draw(("T", "H"))], axis=-1),
        "teacher_lm_weight": np.concatenate([weight, others], axis=-1),
    }


def _same_heads(drawn: Any) -> None:
    weight = drawn.arrays["student_lm_weight"]
    drawn.arrays["teacher_lm_weight"] = np.concatenate([weight, np.zeros_like(weight)], axis=-1)


_LARGE: dict[str, Any] = {"lead": (2, 333), "vocab": 67, "hidden": 16, "scale": 1.0}
_JSD: dict[str, Any] = {"divergence": "jsd"}

RECIPES = (
    Recipe("many-tokens-heads", "errors between token blocks", **_LARGE),
    Recipe("temperature-heads", "a missing T^2, or a T in the wrong place", {"temperature": 2.5}),
    Recipe("same-heads", "a divergence of equal distributions that is not 0", change=_same_heads),
    Recipe(
        "reverse-heads",
        "roles exchanged in the loss, but not in a gradient",
        {"divergence": "reverse_kl", "temperature": 0.5},
        extras=("loss_weights", "count", "upstream"),
    ),
    Recipe(
        "jsd-heads",
        "the shares of teacher and student exchanged",
        _JSD | {"beta": 0.2, "temperature": 2.0},
        extras=("loss_weights", "count", "upstream"),
    ),
    Recipe("many-tokens-jsd-heads", "sums against the mixture of another block", _JSD, **_LARGE),
)

DEFINITION = fused_definition(
    OVER_LOGITS, HEADS, name="linear_distillation", error_bound=error_bound, recipes=RECIPES, draw=near_heads
)
