"""Terms and gradients of two distributions per row: of logits in memory, and of linear rows.

Of logits in memory the terms are made by chunks of rows, and each gradient in one pass.
"""

# T = tokens, C = tokens of a chunk, V = vocabulary, B = vocabulary of a tile, z = logits / temperature

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from loss_core.row_terms import (
    EMPTY_PAIR,
    GAP_UNIT,
    MixtureTerms,
    PairTerms,
    combine_pairs,
    jensen_shannon,
    kl_centre,
    kl_divergence,
    log_ratio_offset,
    log_shares,
    mixture_logs,
)
from loss_core_jax.inputs import arithmetic_dtype
from loss_core_jax.kernels import BothGradients, How, LinearPairs, LinearRows, PairHow, Pairs, Wanted
from loss_core_jax.kernels.xla.chunks import (
    Arrays,
    Sizes,
    behind_barrier,
    finite,
    map_chunks,
    rows_within,
    zero_if_ignored,
)
from loss_core_jax.kernels.xla.linear import OfChunk, sweep
from loss_core_jax.kernels.xla.tiles import Chunk, Gradient, Tile, fold, zeros


def terms(how: PairHow, sizes: Sizes, pairs: Pairs) -> PairTerms:
    """Terms of each pair; two passes over each of the logits."""

    def of_rows(*logits_and_target: jax.Array) -> PairTerms:
        return _terms(Pairs(*logits_and_target), how)

    return PairTerms(*_by_chunks(of_rows, pairs, (), how, sizes))


def mixture(how: PairHow, sizes: Sizes, pairs: Pairs, terms: PairTerms) -> MixtureTerms:
    """Sums of both distributions against their mixture; one pass over each of the logits."""

    def of_rows(student: jax.Array, teacher: jax.Array, target: jax.Array, *numbers: jax.Array) -> MixtureTerms:
        return _mixture(Pairs(student, teacher, target), PairTerms(*numbers), how)

    return MixtureTerms(*_by_chunks(of_rows, pairs, terms, how, sizes))


def _by_chunks(of_rows: Callable[..., Arrays], pairs: Pairs, numbers: Arrays, how: PairHow, sizes: Sizes) -> Arrays:
    """`of_rows(*pairs, *numbers)`, one number for each row, by chunks of rows; of all at once where none may be cut."""
    if how.shard.partitioned:
        return of_rows(*pairs, *numbers)
    dtype, vocab = arithmetic_dtype(pairs.student, pairs.teacher), pairs.student.shape[-1]
    logits = (pairs.student.reshape(-1, vocab), pairs.teacher.reshape(-1, vocab))
    chunk = how.chunk_size or rows_within(sizes.pair_bytes, vocab * dtype.itemsize, at_least=16)
    found = map_chunks(of_rows, (*logits, *(x.reshape(-1) for x in (pairs.target, *numbers))), chunk)
    return tuple(x.reshape(pairs.target.shape) for x in found)


def _terms(pairs: Pairs, how: PairHow) -> PairTerms:
    student, teacher, target = pairs
    dtype = arithmetic_dtype(student, teacher)
    # As for rows: nothing depends on a maximum, so it is held constant.
    m_t, m_s = (lax.stop_gradient(jnp.max(_wide(x, target, dtype), axis=-1)) for x in (teacher, student))
    z_t, z_s = _shifted(teacher, m_t, target, how, dtype), _shifted(student, m_s, target, how, dtype)
    e_t = jnp.exp(z_t)
    # Probability 0 times a difference of inf or NaN must be 0.
    difference = jnp.where(e_t == 0, 0, z_t / GAP_UNIT - z_s / GAP_UNIT)
    return PairTerms(m_t, jnp.sum(e_t, -1), jnp.sum(e_t * difference, -1), m_s, jnp.sum(jnp.exp(z_s), -1))


def _wide(logits: jax.Array, target: jax.Array, dtype: Any) -> jax.Array:
    return zero_if_ignored(logits.astype(dtype), target)


def _shifted(logits: jax.Array, m: jax.Array, target: jax.Array, how: PairHow, dtype: Any) -> jax.Array:
    """(logits - max) / temperature; ignored rows count as zeros."""
    # Subtracted first: logits / temperature at 1e4 would lose digits that the difference keeps.
    return (_wide(logits, target, dtype) - finite(m)[..., None]) / how.temperature


def _both(pairs: Pairs, terms: PairTerms, how: PairHow) -> tuple[jax.Array, jax.Array]:
    """`_shifted` of teacher and student."""
    dtype = arithmetic_dtype(pairs.student, pairs.teacher)
    z_t = _shifted(pairs.teacher, terms.m_t, pairs.target, how, dtype)
    return z_t, _shifted(pairs.student, terms.m_s, pairs.target, how, dtype)


def gradients(
    pairs: Pairs, terms: PairTerms, sums: MixtureTerms | None, upstream: jax.Array, how: PairHow
) -> tuple[jax.Array, jax.Array]:
    """Gradients of upstream * divergence by student and teacher: one elementwise pass each, with no temporaries.

    Args:
        sums: with beta those of the mixture; None without.
    """
    if sums is not None:
        return _mixture_gradients(pairs, terms, sums, upstream, how)
    upstream = upstream / how.temperature
    by_student = _student_gradient(pairs, terms, upstream, how)
    # Behind a barrier, or XLA would write out, in float32, what the two gradients have in common.
    student, teacher, target, centre, upstream, *numbers = behind_barrier(
        *pairs, kl_centre(jnp, terms, kl_divergence(jnp, terms)), upstream, *terms
    )
    by_teacher = _teacher_gradient(Pairs(student, teacher, target), PairTerms(*numbers), centre, upstream, how)
    return by_student, by_teacher


def _student_gradient(pairs: Pairs, terms: PairTerms, upstream: jax.Array, how: PairHow) -> jax.Array:
    """(p_s - p_t) * upstream."""
    z_t, z_s = _both(pairs, terms, how)
    p_s, p_t = jnp.exp(z_s) / terms.s_s[..., None], jnp.exp(z_t) / terms.s_t[..., None]
    return zero_if_ignored((p_s - p_t) * upstream[..., None], pairs.target).astype(pairs.student.dtype)


def _teacher_gradient(
    pairs: Pairs, terms: PairTerms, centre: jax.Array, upstream: jax.Array, how: PairHow
) -> jax.Array:
    """p_t * (log p_t - log p_s - KL) * upstream."""
    z_t, z_s = _both(pairs, terms, how)
    p_t = jnp.exp(z_t) / terms.s_t[..., None]
    # Where p_t is 0 the gradient is 0, whatever the logarithms are.
    excess = jnp.where(p_t == 0, 0, z_t - z_s - centre[..., None])
    return zero_if_ignored(p_t * excess * upstream[..., None], pairs.target).astype(pairs.teacher.dtype)


def _mixture(pairs: Pairs, terms: PairTerms, how: PairHow) -> MixtureTerms:
    return MixtureTerms(*(jnp.sum(p * log, -1) for p, log in _against_mixture(pairs, terms, how)))


def _mixture_gradients(
    pairs: Pairs, terms: PairTerms, sums: MixtureTerms, upstream: jax.Array, how: PairHow
) -> tuple[jax.Array, jax.Array]:
    # Into [T] numbers first: a small probability times a share may be below the normal range.
    of_student, of_teacher = (upstream * (share / how.temperature) for share in (1.0 - how.beta, how.beta))
    _, (p_s, log_s) = _against_mixture(pairs, terms, how)
    student = zero_if_ignored(p_s * (log_s - sums.kl_s[..., None]) * of_student[..., None], pairs.target)
    # Behind a barrier as the other gradients.
    student_logits, teacher_logits, target, kl_t, of_teacher, *numbers = behind_barrier(
        *pairs, sums.kl_t, of_teacher, *terms
    )
    held = Pairs(student_logits, teacher_logits, target)
    (p_t, log_t), _ = _against_mixture(held, PairTerms(*numbers), how)
    teacher = zero_if_ignored(p_t * (log_t - kl_t[..., None]) * of_teacher[..., None], target)
    return student.astype(pairs.student.dtype), teacher.astype(pairs.teacher.dtype)


def _against_mixture(pairs: Pairs, terms: PairTerms, how: PairHow) -> tuple[Arrays, Arrays]:
    """Of teacher and student: p, and log(p / M), 0 where p is 0."""
    z_t, z_s = _both(pairs, terms, how)
    p_t, p_s = jnp.exp(z_t) / terms.s_t[..., None], jnp.exp(z_s) / terms.s_s[..., None]
    # -inf minus -inf is NaN, and so would be its second derivative, even where it is not used.
    ratio = jnp.where((p_t == 0) & (p_s == 0), 0, z_t - z_s - log_ratio_offset(jnp, terms)[..., None])
    log_t, log_s = mixture_logs(jnp, ratio, *log_shares(how.beta))
    return (p_t, jnp.where(p_t == 0, 0, log_t)), (p_s, jnp.where(p_s == 0, 0, log_s))


def linear_terms(how: PairHow, sizes: Sizes, rows: LinearPairs) -> PairTerms:
    """Terms of each pair, m_t and m_s after the temperature."""

    def of_chunk(chunk: Chunk, _: Any) -> tuple[PairTerms, None]:
        return _chunk_terms(chunk, how)[0], None

    found: PairTerms = _sweep(how, sizes, rows, (), of_chunk, ())[0]
    return found


def linear_mixture(how: PairHow, sizes: Sizes, rows: LinearPairs, terms: PairTerms) -> MixtureTerms:
    """Sums of both distributions against their mixture."""

    def of_chunk(chunk: Chunk, terms_C: PairTerms) -> tuple[MixtureTerms, None]:
        return _chunk_mixture(chunk, terms_C, how), None

    found: MixtureTerms = _sweep(how, sizes, rows, terms, of_chunk, ())[0]
    return found


def linear_gradients(
    how: PairHow,
    sizes: Sizes,
    rows: LinearPairs,
    terms: PairTerms,
    sums: MixtureTerms | None,
    upstream: jax.Array,
) -> BothGradients:
    """Gradients of upstream * divergence, given terms and sums of the whole rows."""

    def of_chunk(chunk: Chunk, given: Any) -> tuple[None, Gradient]:
        terms_C, sums_C, upstream_C = given
        return None, _chunk_gradient(chunk, terms_C, sums_C, upstream_C, how)

    return _sweep(how, sizes, rows, (terms, sums, upstream), of_chunk, (Wanted(), Wanted()))[1]


def linear_losses_and_gradients(
    how: PairHow, wanted: tuple[Wanted, Wanted], sizes: Sizes, rows: LinearPairs, upstream: jax.Array
) -> tuple[jax.Array, BothGradients]:
    """Divergence of each row, and the gradients of upstream * divergence."""

    def of_chunk(chunk: Chunk, upstream_C: Any) -> tuple[jax.Array, Gradient]:
        terms_C, kept = _chunk_terms(chunk, how, keep=True)
        sums_C = _chunk_mixture(chunk, terms_C, how, kept) if how.beta else None
        losses_C = kl_divergence(jnp, terms_C) if sums_C is None else jensen_shannon(jnp, terms_C, sums_C, how.beta)
        return losses_C, _chunk_gradient(chunk, terms_C, sums_C, upstream_C, how, kept)

    found: tuple[jax.Array, BothGradients] = _sweep(how, sizes, rows, upstream, of_chunk, wanted)
    return found


def _sweep(
    how: PairHow, sizes: Sizes, rows: LinearPairs, given: Any, of_chunk: OfChunk, wanted: tuple[Wanted, ...]
) -> tuple[Any, Any]:
    """`linear.sweep` over student and teacher, whose tiles hold the logits over the temperature."""

    def cooled(x: LinearRows) -> LinearRows:
        dtype = arithmetic_dtype(x.hidden, x.weight_VH)
        return x._replace(inverse_temperature=jnp.full(x.target.shape, 1.0 / how.temperature, dtype))

    sources = rows if how.temperature == 1 else map(cooled, rows)
    return sweep(tuple(sources), given, of_chunk, How(shard=how.shard), sizes, wanted)


def _chunk_terms(chunk: Chunk, how: PairHow, *, keep: bool = False) -> tuple[PairTerms, Arrays | None]:
    """Terms of each pair, and the logits where they are to be kept."""

    def of_tile(tile: Tile) -> PairTerms:
        return _terms(_pairs_of(tile), _of_tile(how))

    zero_C = zeros(chunk, chunk.target.shape)
    empty = PairTerms(*(zero_C + x for x in EMPTY_PAIR))
    return fold(chunk, of_tile, functools.partial(combine_pairs, jnp), empty, keep=keep)


def _chunk_mixture(chunk: Chunk, terms: PairTerms, how: PairHow, kept: Arrays | None = None) -> MixtureTerms:
    """Sums of both distributions of each pair against their mixture."""

    def of_tile(tile: Tile) -> MixtureTerms:
        return _mixture(_pairs_of(tile), terms, _of_tile(how))

    zero_C = zeros(chunk, chunk.target.shape)
    add = functools.partial(jax.tree.map, jnp.add)
    found: MixtureTerms = fold(chunk, of_tile, add, MixtureTerms(zero_C, zero_C), kept=kept)[0]
    return found


def _chunk_gradient(
    chunk: Chunk,
    terms: PairTerms,
    sums: MixtureTerms | None,
    upstream: jax.Array,
    how: PairHow,
    kept: Arrays | None = None,
) -> Gradient:
    """Of the products, which the temperature divides."""
    inverse_C = chunk.sources[0].inverse_temperature
    upstream = upstream if inverse_C is None else upstream * inverse_C

    def of_tile(tile: Tile) -> tuple[jax.Array, jax.Array]:
        return gradients(_pairs_of(tile), terms, sums, upstream, _of_tile(how))

    return Gradient(of_tile, kept)


def _pairs_of(tile: Tile) -> Pairs:
    student_CB, teacher_CB = tile.logits
    return Pairs(student_CB, teacher_CB, tile.target_C)


def _of_tile(how: PairHow) -> PairHow:
    return how._replace(temperature=1.0)
