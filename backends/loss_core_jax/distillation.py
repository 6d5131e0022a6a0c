"""KL(teacher || student) per row, times T^2, by chunks of rows: statistics forward, local backward.

The formula stands in `loss_core.oracle`; the row state in `loss_core.row_stats`.
"""

# T = tokens, C = tokens of a chunk, V = vocabulary; tau = temperature

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from loss_core.row_stats import KDRowState, finish_kd
from loss_core_jax.checks import IGNORED
from loss_core_jax.chunked import Arrays, behind_barrier, map_chunks, rows_within
from loss_core_jax.cross_entropy import arithmetic_dtype, losses_of_counted, nan_if_invalid

# Of each temporary, of which there are three: XLA for CPU writes terms out before it sums them. They stay in the L2
# caches of the cores when there is 1 MiB for each: measured a fifth faster than 4 MiB for each.
_BUDGET_BYTES = (os.cpu_count() or 1) << 20


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def distillation_rows(
    student: jax.Array, teacher: jax.Array, target: jax.Array, temperature: float, chunk_size: int
) -> jax.Array:
    """T^2 * KL(teacher || student) per row; 0 where target is IGNORED, NaN where it is INVALID.

    Args:
        student, teacher: [..., V] floating.
        target: [...] int32; only IGNORED and INVALID matter.
        chunk_size: rows computed at a time, 0 to choose.
    Returns:
        [...] in the dtype of the arithmetic.
    """
    return _forward(student, teacher, target, temperature, chunk_size)[0]


def _forward(
    student: jax.Array, teacher: jax.Array, target: jax.Array, temperature: float, chunk_size: int
) -> tuple[jax.Array, Any]:
    vocab = student.shape[-1]
    dtype = arithmetic_dtype(student, teacher)

    def chunk(student_CV: jax.Array, teacher_CV: jax.Array, target_C: jax.Array) -> Arrays:
        state = _row_state(student_CV, teacher_CV, target_C, temperature, dtype)
        return finish_kd(jnp, state), state.m_t, state.s_t, state.m_s, state.s_s

    rows = (student.reshape(-1, vocab), teacher.reshape(-1, vocab), target.reshape(-1))
    kl_T, *stats = map_chunks(chunk, rows, chunk_rows(chunk_size, vocab, dtype))
    loss_T = losses_of_counted(temperature**2 * kl_T, rows[2])
    return loss_T.reshape(target.shape), (student, teacher, target, kl_T, *stats)


def _backward(
    temperature: float, chunk_size: int, residuals: Any, grad: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    student, teacher, target, *stats = residuals
    vocab = student.shape[-1]
    dtype = arithmetic_dtype(student, teacher)
    # No chunks: each gradient is one elementwise pass, which XLA fuses and runs on all cores, with no temporaries.
    kl_T, m_t, s_t, m_s, s_s = stats
    rows = Rows(
        student.reshape(-1, vocab),
        teacher.reshape(-1, vocab),
        target.reshape(-1),
        kl_T,
        m_t,
        s_t,
        m_s,
        s_s,
        grad.reshape(-1),
    )
    dstudent_TV = student_gradient(rows, temperature, dtype)
    dteacher_TV = teacher_gradient(rows, temperature, dtype)
    return dstudent_TV.reshape(student.shape), dteacher_TV.reshape(teacher.shape), None


distillation_rows.defvjp(_forward, _backward)


def chunk_rows(chunk_size: int, vocab: int, dtype: Any) -> int:
    """Rows to compute at a time; a chunk_size of 0 lets this function choose."""
    return chunk_size or rows_within(_BUDGET_BYTES, vocab * dtype.itemsize, at_least=16)


def _shifted(logits: jax.Array, target: jax.Array, m: jax.Array | None, temperature: float, dtype: Any) -> Arrays:
    """(logits - max) / T and the max; ignored rows count as zeros."""
    z = jnp.where(target[..., None] == IGNORED, 0, logits.astype(dtype))
    # As in cross_entropy: nothing depends on the max, so it is held constant.
    m = lax.stop_gradient(jnp.max(z, axis=-1)) if m is None else m
    # Subtracted first: z / T at 1e4 would lose digits that the difference keeps.
    return (z - m[..., None]) / temperature, m


def _row_state(
    student_CV: jax.Array, teacher_CV: jax.Array, target_C: jax.Array, temperature: float, dtype: Any
) -> KDRowState:
    u_t, m_t = _shifted(teacher_CV, target_C, None, temperature, dtype)
    u_s, m_s = _shifted(student_CV, target_C, None, temperature, dtype)
    e_t = jnp.exp(u_t)
    # Probability 0 times a difference of inf or NaN must be 0.
    difference = jnp.where(e_t == 0, 0, u_t - u_s)
    return KDRowState(m_t, jnp.sum(e_t, -1), jnp.sum(e_t * difference, -1), m_s, jnp.sum(jnp.exp(u_s), -1))


class Rows(NamedTuple):
    """What the backward of each row needs; logits [..., V], the rest [...]."""

    student: jax.Array
    teacher: jax.Array
    target: jax.Array
    kl: jax.Array
    m_t: jax.Array
    s_t: jax.Array
    m_s: jax.Array
    s_s: jax.Array
    grad: jax.Array


def student_gradient(rows: Rows, temperature: float, dtype: Any) -> jax.Array:
    """T * (p_s - p_t) * g."""
    u_t, _ = _shifted(rows.teacher, rows.target, rows.m_t, temperature, dtype)
    u_s, _ = _shifted(rows.student, rows.target, rows.m_s, temperature, dtype)
    p_s, p_t = jnp.exp(u_s) / rows.s_s[..., None], jnp.exp(u_t) / rows.s_t[..., None]
    gradient = (p_s - p_t) * _scale(rows, temperature)
    return jnp.where(rows.target[..., None] == IGNORED, 0, gradient).astype(rows.student.dtype)


def teacher_gradient(rows: Rows, temperature: float, dtype: Any) -> jax.Array:
    """T * p_t * (log p_t - log p_s - KL) * g."""
    # Behind a barrier, or XLA would write out, in float32, what the two gradients have in common.
    rows = Rows(*behind_barrier(*rows))
    u_t, _ = _shifted(rows.teacher, rows.target, rows.m_t, temperature, dtype)
    u_s, _ = _shifted(rows.student, rows.target, rows.m_s, temperature, dtype)
    p_t = jnp.exp(u_t) / rows.s_t[..., None]
    row_terms = (jnp.log(rows.s_t) - jnp.log(rows.s_s) + rows.kl)[..., None]
    # Where p_t is 0 the gradient is 0, whatever the logarithms are.
    excess = jnp.where(p_t == 0, 0, u_t - u_s - row_terms)
    gradient = jnp.where(rows.target[..., None] == IGNORED, 0, p_t * excess * _scale(rows, temperature))
    return gradient.astype(rows.teacher.dtype)


def _scale(rows: Rows, temperature: float) -> jax.Array:
    return temperature * nan_if_invalid(rows.grad, rows.target)[..., None]
