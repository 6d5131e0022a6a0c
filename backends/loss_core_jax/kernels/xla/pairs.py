"""Terms and gradients of two distributions per row, from logits in memory or from linear rows.

From logits in memory, the terms are computed by chunks of rows, and each gradient in one pass.
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
from loss_core_jax.kernels import BothGradients, LinearPairs, LinearRows, PairOptions, Pairs, RowOptions, Wanted
from loss_core_jax.kernels.xla.chunks import (
    Arrays,
    Sizes,
    barrier,
    finite_max,
    map_chunks,
    rows_within,
    zero_where_ignored,
)
from loss_core_jax.kernels.xla.linear import ChunkFn, scan_chunks
from loss_core_jax.kernels.xla.tiles import Chunk, ChunkGradient, Tile, fold_tiles, zeros


def terms(options: PairOptions, sizes: Sizes, pairs: Pairs) -> PairTerms:
    """Terms of each pair; two passes over each of the logits."""

    def chunk_fn(*logits_and_target: jax.Array) -> PairTerms:
        return _terms(Pairs(*logits_and_target), options)

    return PairTerms(*_map_chunks(chunk_fn, pairs, (), options, sizes))


def mixture(options: PairOptions, sizes: Sizes, pairs: Pairs, terms: PairTerms) -> MixtureTerms:
    """Sums of both distributions against their mixture; one pass over each of the logits."""

    def chunk_fn(student: jax.Array, teacher: jax.Array, target: jax.Array, *terms_C: jax.Array) -> MixtureTerms:
        return _mixture(Pairs(student, teacher, target), PairTerms(*terms_C), options)

    return MixtureTerms(*_map_chunks(chunk_fn, pairs, terms, options, sizes))


def _map_chunks(
    chunk_fn: Callable[..., Arrays], pairs: Pairs, terms: Arrays, options: PairOptions, sizes: Sizes
) -> Arrays:
    """`chunk_fn(*pairs, *terms)`, a value for each row, by chunks of rows; all rows at once where XLA partitions."""
    if options.shard.partitioned:
        return chunk_fn(*pairs, *terms)
    dtype, vocab = arithmetic_dtype(pairs.student, pairs.teacher), pairs.student.shape[-1]
    logits = (pairs.student.reshape(-1, vocab), pairs.teacher.reshape(-1, vocab))
    chunk = options.chunk_size or rows_within(sizes.pair_bytes, vocab * dtype.itemsize, at_least=16)
    result = map_chunks(chunk_fn, (*logits, *(x.reshape(-1) for x in (pairs.target, *terms))), chunk)
    return tuple(x.reshape(pairs.target.shape) for x in result)


def _terms(pairs: Pairs, options: PairOptions) -> PairTerms:
    student, teacher, target = pairs
    dtype = arithmetic_dtype(student, teacher)
    # As for rows: the divergence does not depend on the maxima, so they are constants.
    m_t, m_s = (lax.stop_gradient(jnp.max(_upcast(x, target, dtype), axis=-1)) for x in (teacher, student))
    z_t, z_s = _shifted(teacher, m_t, target, options, dtype), _shifted(student, m_s, target, options, dtype)
    e_t = jnp.exp(z_t)
    # Probability 0 times a difference of inf or NaN must be 0.
    difference = jnp.where(e_t == 0, 0, z_t / GAP_UNIT - z_s / GAP_UNIT)
    return PairTerms(m_t, jnp.sum(e_t, -1), jnp.sum(e_t * difference, -1), m_s, jnp.sum(jnp.exp(z_s), -1))


def _upcast(logits: jax.Array, target: jax.Array, dtype: Any) -> jax.Array:
    return zero_where_ignored(logits.astype(dtype), target)


def _shifted(logits: jax.Array, m: jax.Array, target: jax.Array, options: PairOptions, dtype: Any) -> jax.Array:
    """(logits - max) / temperature, with logits 0 in ignored rows."""
    # Subtracted first: logits / temperature at 1e4 would lose digits that the difference keeps.
    return (_upcast(logits, target, dtype) - finite_max(m)[..., None]) / options.temperature


def _shifted_pair(pairs: Pairs, terms: PairTerms, options: PairOptions) -> tuple[jax.Array, jax.Array]:
    """`_shifted` of teacher and student."""
    dtype = arithmetic_dtype(pairs.student, pairs.teacher)
    z_t = _shifted(pairs.teacher, terms.m_t, pairs.target, options, dtype)
    return z_t, _shifted(pairs.student, terms.m_s, pairs.target, options, dtype)


def gradients(
    pairs: Pairs, terms: PairTerms, sums: MixtureTerms | None, upstream: jax.Array, options: PairOptions
) -> tuple[jax.Array, jax.Array]:
    """Gradients of upstream * divergence with respect to student and teacher, in one elementwise pass each.

    Args:
        sums: of the mixture; None if beta is 0.
    """
    if sums is not None:
        return _mixture_gradients(pairs, terms, sums, upstream, options)
    upstream = upstream / options.temperature
    student_gradient = _student_gradient(pairs, terms, upstream, options)
    # Without the barrier XLA would write out, in float32, the common subexpressions of the two gradients.
    student, teacher, target, centre, upstream, *flat = barrier(
        *pairs, kl_centre(jnp, terms, kl_divergence(jnp, terms)), upstream, *terms
    )
    teacher_gradient = _teacher_gradient(Pairs(student, teacher, target), PairTerms(*flat), centre, upstream, options)
    return student_gradient, teacher_gradient


def _student_gradient(pairs: Pairs, terms: PairTerms, upstream: jax.Array, options: PairOptions) -> jax.Array:
    """(p_s - p_t) * upstream."""
    z_t, z_s = _shifted_pair(pairs, terms, options)
    p_s, p_t = jnp.exp(z_s) / terms.s_s[..., None], jnp.exp(z_t) / terms.s_t[..., None]
    return zero_where_ignored((p_s - p_t) * upstream[..., None], pairs.target).astype(pairs.student.dtype)


def _teacher_gradient(
    pairs: Pairs, terms: PairTerms, centre: jax.Array, upstream: jax.Array, options: PairOptions
) -> jax.Array:
    """p_t * (log p_t - log p_s - KL) * upstream."""
    z_t, z_s = _shifted_pair(pairs, terms, options)
    p_t = jnp.exp(z_t) / terms.s_t[..., None]
    # Where p_t is 0 the gradient is 0, even if a logarithm is infinite.
    excess = jnp.where(p_t == 0, 0, z_t - z_s - centre[..., None])
    return zero_where_ignored(p_t * excess * upstream[..., None], pairs.target).astype(pairs.teacher.dtype)


def _mixture(pairs: Pairs, terms: PairTerms, options: PairOptions) -> MixtureTerms:
    return MixtureTerms(*(jnp.sum(p * log, -1) for p, log in _mixture_ratios(pairs, terms, options)))


def _mixture_gradients(
    pairs: Pairs, terms: PairTerms, sums: MixtureTerms, upstream: jax.Array, options: PairOptions
) -> tuple[jax.Array, jax.Array]:
    # Multiplied into [T] coefficients first: a small probability times a weight may be subnormal.
    coef_s, coef_t = (upstream * (weight / options.temperature) for weight in (1.0 - options.beta, options.beta))
    _, (p_s, log_s) = _mixture_ratios(pairs, terms, options)
    student = zero_where_ignored(p_s * (log_s - sums.kl_s[..., None]) * coef_s[..., None], pairs.target)
    # The barrier is for the reason in `gradients`.
    student_logits, teacher_logits, target, kl_t, coef_t, *flat = barrier(*pairs, sums.kl_t, coef_t, *terms)
    (p_t, log_t), _ = _mixture_ratios(Pairs(student_logits, teacher_logits, target), PairTerms(*flat), options)
    teacher = zero_where_ignored(p_t * (log_t - kl_t[..., None]) * coef_t[..., None], target)
    return student.astype(pairs.student.dtype), teacher.astype(pairs.teacher.dtype)


def _mixture_ratios(pairs: Pairs, terms: PairTerms, options: PairOptions) -> tuple[Arrays, Arrays]:
    """(p, log(p / M)) of teacher and of student, where M is the mixture; the logarithm is 0 where p is 0."""
    z_t, z_s = _shifted_pair(pairs, terms, options)
    p_t, p_s = jnp.exp(z_t) / terms.s_t[..., None], jnp.exp(z_s) / terms.s_s[..., None]
    # -inf minus -inf is NaN, which would reach second derivatives even where the ratio is not used.
    ratio = jnp.where((p_t == 0) & (p_s == 0), 0, z_t - z_s - log_ratio_offset(jnp, terms)[..., None])
    log_t, log_s = mixture_logs(jnp, ratio, *log_shares(options.beta))
    return (p_t, jnp.where(p_t == 0, 0, log_t)), (p_s, jnp.where(p_s == 0, 0, log_s))


def linear_terms(options: PairOptions, sizes: Sizes, rows: LinearPairs) -> PairTerms:
    """Terms of each pair at logits / temperature, m_t and m_s included."""

    def chunk_fn(chunk: Chunk, _: Any) -> tuple[PairTerms, None]:
        return _chunk_terms(chunk, options)[0], None

    terms: PairTerms = _scan_chunks(options, sizes, rows, (), chunk_fn, ())[0]
    return terms


def linear_mixture(options: PairOptions, sizes: Sizes, rows: LinearPairs, terms: PairTerms) -> MixtureTerms:
    """Sums of both distributions against their mixture."""

    def chunk_fn(chunk: Chunk, terms_C: PairTerms) -> tuple[MixtureTerms, None]:
        return _chunk_mixture(chunk, terms_C, options), None

    sums: MixtureTerms = _scan_chunks(options, sizes, rows, terms, chunk_fn, ())[0]
    return sums


def linear_gradients(
    options: PairOptions,
    sizes: Sizes,
    rows: LinearPairs,
    terms: PairTerms,
    sums: MixtureTerms | None,
    upstream: jax.Array,
) -> BothGradients:
    """Gradients of upstream * divergence, from terms and sums of the full rows."""

    def chunk_fn(chunk: Chunk, per_row_C: Any) -> tuple[None, ChunkGradient]:
        terms_C, sums_C, upstream_C = per_row_C
        return None, _chunk_gradient(chunk, terms_C, sums_C, upstream_C, options)

    return _scan_chunks(options, sizes, rows, (terms, sums, upstream), chunk_fn, (Wanted(), Wanted()))[1]


def linear_losses_and_gradients(
    options: PairOptions, wanted: tuple[Wanted, Wanted], sizes: Sizes, rows: LinearPairs, upstream: jax.Array
) -> tuple[jax.Array, BothGradients]:
    """Divergence of each row, and the gradients of upstream * divergence."""

    def chunk_fn(chunk: Chunk, upstream_C: Any) -> tuple[jax.Array, ChunkGradient]:
        terms_C, saved = _chunk_terms(chunk, options, save=True)
        sums_C = _chunk_mixture(chunk, terms_C, options, saved) if options.beta else None
        losses_C = kl_divergence(jnp, terms_C) if sums_C is None else jensen_shannon(jnp, terms_C, sums_C, options.beta)
        return losses_C, _chunk_gradient(chunk, terms_C, sums_C, upstream_C, options, saved)

    result: tuple[jax.Array, BothGradients] = _scan_chunks(options, sizes, rows, upstream, chunk_fn, wanted)
    return result


def _scan_chunks(
    options: PairOptions, sizes: Sizes, rows: LinearPairs, per_row: Any, chunk_fn: ChunkFn, wanted: tuple[Wanted, ...]
) -> tuple[Any, Any]:
    """`linear.scan_chunks` over student and teacher; the logits in their tiles are divided by the temperature."""

    def with_temperature(x: LinearRows) -> LinearRows:
        dtype = arithmetic_dtype(x.hidden, x.weight_VH)
        return x._replace(inverse_temperature=jnp.full(x.target.shape, 1.0 / options.temperature, dtype))

    sources = rows if options.temperature == 1 else map(with_temperature, rows)
    return scan_chunks(tuple(sources), per_row, chunk_fn, RowOptions(shard=options.shard), sizes, wanted)


def _chunk_terms(chunk: Chunk, options: PairOptions, *, save: bool = False) -> tuple[PairTerms, Arrays | None]:
    """Terms of each pair, and the logits to save, as `fold_tiles` returns them."""

    def tile_fn(tile: Tile) -> PairTerms:
        return _terms(_tile_pairs(tile), _tile_options(options))

    zero_C = zeros(chunk, chunk.target.shape)
    identity = PairTerms(*(zero_C + x for x in EMPTY_PAIR))
    return fold_tiles(chunk, tile_fn, functools.partial(combine_pairs, jnp), identity, save=save)


def _chunk_mixture(chunk: Chunk, terms: PairTerms, options: PairOptions, saved: Arrays | None = None) -> MixtureTerms:
    """Sums of both distributions of each pair against their mixture."""

    def tile_fn(tile: Tile) -> MixtureTerms:
        return _mixture(_tile_pairs(tile), terms, _tile_options(options))

    zero_C = zeros(chunk, chunk.target.shape)
    add = functools.partial(jax.tree.map, jnp.add)
    sums: MixtureTerms = fold_tiles(chunk, tile_fn, add, MixtureTerms(zero_C, zero_C), saved=saved)[0]
    return sums


def _chunk_gradient(
    chunk: Chunk,
    terms: PairTerms,
    sums: MixtureTerms | None,
    upstream: jax.Array,
    options: PairOptions,
    saved: Arrays | None = None,
) -> ChunkGradient:
    """Gradient of upstream * divergence with respect to the matrix products, which are divided by the temperature."""
    inverse_C = chunk.sources[0].inverse_temperature
    upstream = upstream if inverse_C is None else upstream * inverse_C

    def tile_fn(tile: Tile) -> tuple[jax.Array, jax.Array]:
        return gradients(_tile_pairs(tile), terms, sums, upstream, _tile_options(options))

    return ChunkGradient(tile_fn, saved)


def _tile_pairs(tile: Tile) -> Pairs:
    student_CB, teacher_CB = tile.logits
    return Pairs(student_CB, teacher_CB, tile.target_C)


def _tile_options(options: PairOptions) -> PairOptions:
    """The options for `_tile_pairs`: a tile's logits have been divided by the temperature."""
    return options._replace(temperature=1.0)
