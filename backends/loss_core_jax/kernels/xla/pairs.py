"""Rows of two logits in memory: terms by chunks of rows, each gradient in one pass."""

# T = tokens, C = tokens of a chunk, V = vocabulary, z = logits / temperature

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from loss_core.row_terms import (
    GAP_UNIT,
    MixtureTerms,
    PairTerms,
    kl_centre,
    log_ratio_offset,
    log_shares,
    mixture_logs,
)
from loss_core_jax.inputs import arithmetic_dtype
from loss_core_jax.kernels import Mixture, Pairs, Shard
from loss_core_jax.kernels.xla.chunks import Arrays, behind_barrier, finite, map_chunks, rows_within, zero_if_ignored
from loss_core_jax.kernels.xla.sizes import Sizes


def terms(temperature: float, chunk_size: int, shard: Shard, sizes: Sizes, pairs: Pairs) -> PairTerms:
    """Terms of each pair; two passes over each of the logits."""
    dtype = arithmetic_dtype(pairs.student, pairs.teacher)
    of_rows = functools.partial(_terms, temperature=temperature, dtype=dtype)
    return PairTerms(*_by_chunks(of_rows, pairs, (), chunk_size, shard, sizes))


def _by_chunks(
    of_rows: Callable[..., Arrays], pairs: Pairs, numbers: Arrays, chunk_size: int, shard: Shard, sizes: Sizes
) -> Arrays:
    """`of_rows(*pairs, *numbers)`, one number for each row, by chunks of rows; of all at once where none may be cut."""
    if shard.partitioned:
        return of_rows(*pairs, *numbers)
    dtype, vocab = arithmetic_dtype(pairs.student, pairs.teacher), pairs.student.shape[-1]
    logits = (pairs.student.reshape(-1, vocab), pairs.teacher.reshape(-1, vocab))
    chunk = chunk_size or rows_within(sizes.pair_bytes, vocab * dtype.itemsize, at_least=16)
    found = map_chunks(of_rows, (*logits, *(x.reshape(-1) for x in (pairs.target, *numbers))), chunk)
    return tuple(x.reshape(pairs.target.shape) for x in found)


def _terms(student: jax.Array, teacher: jax.Array, target: jax.Array, *, temperature: float, dtype: Any) -> PairTerms:
    shifted = functools.partial(_shifted, target=target, temperature=temperature, dtype=dtype)
    # As for rows: nothing depends on a maximum, so it is held constant.
    m_t, m_s = (lax.stop_gradient(jnp.max(_wide(x, target, dtype), axis=-1)) for x in (teacher, student))
    z_t, z_s = shifted(teacher, m_t), shifted(student, m_s)
    e_t = jnp.exp(z_t)
    # Probability 0 times a difference of inf or NaN must be 0.
    difference = jnp.where(e_t == 0, 0, z_t / GAP_UNIT - z_s / GAP_UNIT)
    return PairTerms(m_t, jnp.sum(e_t, -1), jnp.sum(e_t * difference, -1), m_s, jnp.sum(jnp.exp(z_s), -1))


def _wide(logits: jax.Array, target: jax.Array, dtype: Any) -> jax.Array:
    return zero_if_ignored(logits.astype(dtype), target)


def _shifted(logits: jax.Array, m: jax.Array, target: jax.Array, temperature: float, dtype: Any) -> jax.Array:
    """(logits - max) / temperature; ignored rows count as zeros."""
    # Subtracted first: logits / temperature at 1e4 would lose digits that the difference keeps.
    return (_wide(logits, target, dtype) - finite(m)[..., None]) / temperature


def gradients(
    pairs: Pairs, terms: PairTerms, kl: jax.Array, upstream: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Gradients of upstream * kl by student and teacher: one elementwise pass each, with no temporaries."""
    upstream = upstream / temperature
    by_student = _student_gradient(pairs, terms, upstream, temperature)
    # Behind a barrier, or XLA would write out, in float32, what the two gradients have in common.
    student, teacher, target, centre, upstream, *sums = behind_barrier(
        *pairs, kl_centre(jnp, terms, kl), upstream, *terms
    )
    by_teacher = _teacher_gradient(Pairs(student, teacher, target), PairTerms(*sums), centre, upstream, temperature)
    return by_student, by_teacher


def _student_gradient(pairs: Pairs, terms: PairTerms, upstream: jax.Array, temperature: float) -> jax.Array:
    """(p_s - p_t) * upstream."""
    z_t, z_s = _both(pairs, terms, temperature)
    p_s, p_t = jnp.exp(z_s) / terms.s_s[..., None], jnp.exp(z_t) / terms.s_t[..., None]
    return zero_if_ignored((p_s - p_t) * upstream[..., None], pairs.target).astype(pairs.student.dtype)


def _teacher_gradient(
    pairs: Pairs, terms: PairTerms, centre: jax.Array, upstream: jax.Array, temperature: float
) -> jax.Array:
    """p_t * (log p_t - log p_s - KL) * upstream."""
    z_t, z_s = _both(pairs, terms, temperature)
    p_t = jnp.exp(z_t) / terms.s_t[..., None]
    # Where p_t is 0 the gradient is 0, whatever the logarithms are.
    excess = jnp.where(p_t == 0, 0, z_t - z_s - centre[..., None])
    return zero_if_ignored(p_t * excess * upstream[..., None], pairs.target).astype(pairs.teacher.dtype)


def mixture_terms(mixture: Mixture, shard: Shard, sizes: Sizes, pairs: Pairs, terms: PairTerms) -> MixtureTerms:
    """Sums of both distributions against their mixture; one pass over each of the logits."""

    def of_rows(student: jax.Array, teacher: jax.Array, target: jax.Array, *numbers: jax.Array) -> Arrays:
        of_both = _against_mixture(Pairs(student, teacher, target), PairTerms(*numbers), mixture)
        return tuple(jnp.sum(p * log, -1) for p, log in of_both)

    return MixtureTerms(*_by_chunks(of_rows, pairs, terms, mixture.chunk_size, shard, sizes))


def mixture_gradients(
    pairs: Pairs, terms: PairTerms, sums: MixtureTerms, upstream: jax.Array, mixture: Mixture
) -> tuple[jax.Array, jax.Array]:
    """Gradients of upstream * `jensen_shannon` by student and teacher: one elementwise pass each, as `gradients`."""
    # Into [T] numbers first: a small probability times a share may be below the normal range.
    of_student, of_teacher = (upstream * (share / mixture.temperature) for share in (1.0 - mixture.beta, mixture.beta))
    _, (p_s, log_s) = _against_mixture(pairs, terms, mixture)
    student = zero_if_ignored(p_s * (log_s - sums.kl_s[..., None]) * of_student[..., None], pairs.target)
    student_logits, teacher_logits, target, kl_t, of_teacher, *numbers = behind_barrier(
        *pairs, sums.kl_t, of_teacher, *terms
    )
    held = Pairs(student_logits, teacher_logits, target)
    (p_t, log_t), _ = _against_mixture(held, PairTerms(*numbers), mixture)
    teacher = zero_if_ignored(p_t * (log_t - kl_t[..., None]) * of_teacher[..., None], target)
    return student.astype(pairs.student.dtype), teacher.astype(pairs.teacher.dtype)


def _against_mixture(pairs: Pairs, terms: PairTerms, mixture: Mixture) -> tuple[Arrays, Arrays]:
    """Of teacher and student: p, and log(p / M), 0 where p is 0."""
    z_t, z_s = _both(pairs, terms, mixture.temperature)
    p_t, p_s = jnp.exp(z_t) / terms.s_t[..., None], jnp.exp(z_s) / terms.s_s[..., None]
    # -inf minus -inf is NaN, and so would be its second derivative, even where it is not used.
    ratio = jnp.where((p_t == 0) & (p_s == 0), 0, z_t - z_s - log_ratio_offset(jnp, terms)[..., None])
    log_t, log_s = mixture_logs(jnp, ratio, *log_shares(mixture.beta))
    return (p_t, jnp.where(p_t == 0, 0, log_t)), (p_s, jnp.where(p_s == 0, 0, log_s))


def _both(pairs: Pairs, terms: PairTerms, temperature: float) -> tuple[jax.Array, jax.Array]:
    dtype = arithmetic_dtype(pairs.student, pairs.teacher)
    z_t = _shifted(pairs.teacher, terms.m_t, pairs.target, temperature, dtype)
    return z_t, _shifted(pairs.student, terms.m_s, pairs.target, temperature, dtype)
