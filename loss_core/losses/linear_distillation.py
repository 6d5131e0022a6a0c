"""Distillation between two heads: as `distillation`, with z = h @ W.T / temperature of student and teacher."""

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
from loss_core.losses.fused import behind_heads
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
    """As distillation of exact logits, and what moves because the logits are rounded products; products behind it."""
    inner, temp, beta = compute_format(dtype), float(config.temperature), beta_of(config)
    keep_T = expected.reduction.keep_T
    u, sides, moves = inner.u, [], []
    for of in _SIDES:
        raw_TV, err_raw_TV = raw_logits(arrays, keep_T, u, of)
        z_TV = raw_TV / temp
        scaled_T = (2 * u if temp != 1 else 0.0) * np.max(np.abs(finite(z_TV)), axis=-1)
        sides.append(side(z_TV, scaled_T, inner))
        moves.append(err_raw_TV / temp)
    student, teacher = sides
    err_d_T, *err_by_z = divergence_errors(beta, student, teacher, u)
    _, *by_z = token_divergence(beta, student.sm.z_TV, teacher.sm.z_TV)
    # A gradient on the way from the exact to the rounded logits is off by no more than at the end of it.
    moved = moved_gradients(beta, (student.sm, teacher.sm), moves)
    err_by_z = [err_TV + moved_TV for err_TV, moved_TV in zip(err_by_z, moved, strict=True)]
    for by_z_TV, err_TV, move_TV in zip(by_z, err_by_z, moves, strict=True):
        err_d_T = err_d_T + np.sum((np.abs(finite(by_z_TV)) + err_TV) * move_TV, axis=-1)
    d_T = np.abs(finite(expected.token_loss_T)) / temp**2
    err_T = np.where(keep_T, temp**2 * (err_d_T + 3 * u * d_T), 0.0)
    result = result_errors(config, expected, err_T, dtype, upstream)
    coef_T = np.abs(expected.coef_T) * temp
    for of, by_z_TV, err_TV in zip(_SIDES, by_z, err_by_z, strict=True):
        draw_TV = finite(times_rows(coef_T, by_z_TV))
        err_draw_TV = finite(times_rows(coef_T, err_TV)) + np.where(coef_T == 0, 0.0, inner.near_zero)[:, None]
        result |= product_errors(arrays, expected, draw_TV, err_draw_TV, keep_T, dtype, product_dtype, of)
    return result


def moved_gradients(beta: float, both: tuple[SoftmaxErrors, SoftmaxErrors], moves: list[Floats]) -> list[Floats]:
    """How far dD/dz of student and teacher may move [T, V] when each z of theirs does, by at most its entry of `moves`.

    lse moves by at most log sum p e^move, log p = z - lse by as much more, and p by the factor that this is the
    logarithm of. What a row's x have in common is gone from p (x - sum p x): of log p_t - log p_s there the moves of z
    are left. log(p / M) has a slope in [0, 1] by log p_t - log p_s.
    """
    if beta == 1:
        return moved_gradients(0.0, both[::-1], moves[::-1])[::-1]
    logs = [
        move_TV + np.log(np.sum(sm.p_TV * np.exp(move_TV), axis=-1, keepdims=True))
        for sm, move_TV in zip(both, moves, strict=True)
    ]
    factors, (student, teacher) = [np.expm1(log_TV) for log_TV in logs], both
    if beta == 0:
        log_ratio_TV = teacher.log_p_TV - student.log_p_TV
        of_teacher = _moved_centred(teacher.p_TV, log_ratio_TV, factors[1], moves[0] + moves[1])
        return [student.p_TV * factors[0] + teacher.p_TV * factors[1], of_teacher]
    log_m_TV = np.logaddexp(np.log(beta) + teacher.log_p_TV, np.log1p(-beta) + student.log_p_TV)
    return [
        share * _moved_centred(sm.p_TV, sm.log_p_TV - log_m_TV, factor_TV, logs[0] + logs[1])
        for share, sm, factor_TV in zip((1 - beta, beta), both, factors, strict=True)
    ]


def _moved_centred(p_TV: Floats, x_TV: Floats, factor_TV: Floats, move_x_TV: Floats) -> Floats:
    """How far p (x - sum p x) moves when p does by at most p * factor, and x by at most move_x."""
    x_TV = finite(x_TV)
    centred_TV = np.abs(x_TV - np.sum(p_TV * x_TV, axis=-1, keepdims=True))
    moved_TV = factor_TV * centred_TV + (1 + factor_TV) * move_x_TV
    move_centre_T1 = np.sum(p_TV * moved_TV, axis=-1, keepdims=True)
    return np.asarray(p_TV * (moved_TV + (1 + factor_TV) * move_centre_T1))


def near_heads(definition: LossDef, sizes: Sizes, scale: float, rng: np.random.Generator) -> dict[str, Floats]:
    """A teacher whose logits are the student's, disturbed by half their size; see `distillation.near_logits`."""

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

DEFINITION = behind_heads(
    OVER_LOGITS, HEADS, name="linear_distillation", error_bound=error_bound, recipes=RECIPES, draw=near_heads
)
