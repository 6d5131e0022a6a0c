"""Linear pairs, chunk by chunk: only the logits of one chunk exist at a time, of student and teacher.

A tile of the vocabulary of a chunk is to the kernels of pairs what a shard of the vocabulary is: terms fold, sums add
up, and gradients are made from those of the whole rows.
"""

# T = tokens, N = tiles of the vocabulary, C = tokens of a chunk, V = vocabulary, B = vocabulary of a tile, H = hidden

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from loss_core.row_terms import EMPTY_PAIR, MixtureTerms, PairTerms, combine_pairs, jensen_shannon, kl_divergence
from loss_core_jax.inputs import IGNORED
from loss_core_jax.kernels import BothGradients, How, LinearGradients, LinearPairs, Mixture, PairHow, Pairs, Shard
from loss_core_jax.kernels.xla import pairs
from loss_core_jax.kernels.xla.chunks import zeros_for_loop
from loss_core_jax.kernels.xla.linear import chunk_of, joined_rows, pieces_of, planned, split_rows, unsharded_last
from loss_core_jax.kernels.xla.sizes import Plan, Sizes
from loss_core_jax.kernels.xla.tiles import (
    Chunk,
    Tile,
    tile_at,
    tile_indices,
    tile_logits,
    with_products,
    without_ignored_hidden,
    zeros_of_chunk,
)

# A tile is cut already, and its logits have been divided by the temperature.
_WHOLE, _TEMPERATURE = Shard(partitioned=True), 1.0

Both = tuple[Chunk, Chunk]
# Logits of student and teacher [N, C, B] that were kept, or None each.
Kept = tuple[jax.Array | None, jax.Array | None]


class _Gradient(NamedTuple):
    """What gradients of a chunk are made of: terms and sums of its whole rows, factors of their losses, its logits."""

    terms: PairTerms
    sums: Any
    upstream_C: jax.Array
    kept: Kept = (None, None)


def terms(how: PairHow, sizes: Sizes, rows: LinearPairs) -> PairTerms:
    """Terms of each pair, shape of target."""

    def of_chunk(both: Both, plan: Plan, given: Any) -> tuple[PairTerms, None]:
        return _chunk_terms(both, how, plan, keep=False)[0], None

    found: PairTerms = _sweep(how, sizes, rows, (), of_chunk)[0]
    return found


def mixture_terms(how: PairHow, sizes: Sizes, rows: LinearPairs, terms: PairTerms) -> MixtureTerms:
    """Sums of both distributions against their mixture, shape of target."""

    def of_chunk(both: Both, plan: Plan, terms_C: PairTerms) -> tuple[MixtureTerms, None]:
        return _chunk_mixture(both, terms_C, (None, None), how, plan), None

    found: MixtureTerms = _sweep(how, sizes, rows, terms, of_chunk)[0]
    return found


def gradients(
    how: PairHow,
    sizes: Sizes,
    rows: LinearPairs,
    terms: PairTerms,
    sums: jax.Array | MixtureTerms,
    upstream: jax.Array,
) -> BothGradients:
    """Gradients of upstream * divergence, given terms and sums of the whole rows."""

    def of_chunk(both: Both, plan: Plan, given: Any) -> tuple[None, _Gradient]:
        return None, _Gradient(*given)

    return _sweep(how, sizes, rows, (terms, sums, upstream), of_chunk)[1]


def losses_and_gradients(
    how: PairHow, sizes: Sizes, rows: LinearPairs, upstream: jax.Array
) -> tuple[jax.Array, BothGradients]:
    """Divergence of each row, and the gradients of upstream * divergence."""

    def of_chunk(both: Both, plan: Plan, upstream_C: Any) -> tuple[jax.Array, _Gradient]:
        terms_C, kept = _chunk_terms(both, how, plan, keep=True)
        if not how.beta:
            kl_C = kl_divergence(jnp, terms_C)
            return kl_C, _Gradient(terms_C, kl_C, upstream_C, kept)
        sums_C = _chunk_mixture(both, terms_C, kept, how, plan)
        return jensen_shannon(jnp, terms_C, sums_C, how.beta), _Gradient(terms_C, sums_C, upstream_C, kept)

    found: tuple[jax.Array, BothGradients] = _sweep(how, sizes, rows, upstream, of_chunk)
    return found


def _sweep(how: PairHow, sizes: Sizes, rows: LinearPairs, given: Any, of_chunk: Callable[..., Any]) -> tuple[Any, Any]:
    """Numbers and gradients of all rows in one visit of each chunk.

    Args:
        given: tree of arrays over the rows.
        of_chunk: (chunks of both, plan, its part of `given`) -> numbers of its rows, and what gradients are made of;
            None each.
    """
    linear = How(shard=how.shard)
    sizes = sizes._replace(logits_bytes=sizes.logits_bytes // 2)
    (plan, student), (_, teacher) = (planned(x, linear, sizes) for x in rows)

    def body(dheads: Any, piece: Any) -> Any:
        *of_rows, given_C = piece
        both = (chunk_of(student, *of_rows[0]), chunk_of(teacher, *of_rows[1]))
        numbers, gradient = of_chunk(both, plan, given_C)
        if gradient is None:
            return dheads, (numbers, None)
        found = _chunk_gradients(both, gradient, dheads, how, plan)
        dheads = tuple((unsharded_last(x.weight_VH, linear), None) for x in found)
        return dheads, (numbers, tuple(x.hidden for x in found))

    sources = jax.tree.leaves((rows, given))
    dheads = tuple(
        (zeros_for_loop(x.weight_VH.shape, plan.dtype, *sources) if wanted.weight else None, None)
        for x, wanted in zip(rows, how.wanted, strict=True)
    )
    # Rows that are added are ignored: what they have must only be finite.
    of_both, target = (pieces_of(student, linear, plan), pieces_of(teacher, linear, plan)), rows.student.target
    given = split_rows(given, target.ndim, linear, plan, None, fill=1)
    dheads, (numbers, dhiddens) = lax.scan(body, dheads, (*of_both, given))

    def of_rows(chunks: jax.Array, like: jax.Array) -> jax.Array:
        return joined_rows(chunks, target, linear, None).reshape(like.shape)

    numbers = jax.tree.map(lambda x: of_rows(x, target), numbers)
    if dhiddens is None:
        return numbers, None
    grads = (
        LinearGradients(None if dhidden is None else of_rows(dhidden, x.hidden), *dhead)
        for x, dhidden, dhead in zip(rows, dhiddens, dheads, strict=True)
    )
    return numbers, tuple(grads)


def _tile_pair(both: Both, index: jax.Array, kept: Kept, how: PairHow, plan: Plan) -> tuple[Pairs, tuple[Tile, Tile]]:
    """Logits of a tile over the temperature, -inf in repeated columns and in padding."""
    tiles = (tile_at(both[0], index, plan), tile_at(both[1], index, plan))
    student_CB, teacher_CB = (
        tile_logits(chunk, tile, How(shard=how.shard), plan) if z_CB is None else z_CB
        for chunk, tile, z_CB in zip(both, tiles, kept, strict=True)
    )
    return Pairs(student_CB, teacher_CB, both[0].target_C), tiles


def _chunk_terms(both: Both, how: PairHow, plan: Plan, *, keep: bool) -> tuple[PairTerms, Kept]:
    """Terms of each pair, and the logits where they are to be kept."""

    def body(found: PairTerms, index: jax.Array) -> tuple[PairTerms, Kept]:
        pair, _ = _tile_pair(both, index, (None, None), how, plan)
        part = pairs.terms(_TEMPERATURE, 0, _WHOLE, plan.sizes, pair)
        return combine_pairs(jnp, found, part), (pair.student, pair.teacher) if keep else (None, None)

    empty = PairTerms(*(_zeros(both, plan) + x for x in EMPTY_PAIR))
    found, kept = lax.scan(body, empty, tile_indices(both[0], plan))
    # Those of an ignored row are finite.
    ignored_C = both[0].target_C == IGNORED
    return PairTerms(*(jnp.where(ignored_C, x, y) for x, y in zip(_IGNORED, found, strict=True))), kept


_IGNORED = PairTerms(m_t=0.0, s_t=1.0, a=0.0, m_s=0.0, s_s=1.0)


def _chunk_mixture(both: Both, terms_C: PairTerms, kept: Kept, how: PairHow, plan: Plan) -> MixtureTerms:
    """Sums of both distributions of each pair against their mixture."""

    def body(sums: MixtureTerms, index_and_kept: Any) -> tuple[MixtureTerms, None]:
        index, tiles_kept = index_and_kept
        pair, _ = _tile_pair(both, index, tiles_kept, how, plan)
        part = pairs.mixture_terms(Mixture(how.beta, _TEMPERATURE), _WHOLE, plan.sizes, pair, terms_C)
        return jax.tree.map(jnp.add, sums, part), None

    zeros = MixtureTerms(_zeros(both, plan), _zeros(both, plan))
    return lax.scan(body, zeros, (tile_indices(both[0], plan), kept))[0]


def _chunk_gradients(
    both: Both, gradient: _Gradient, dheads: Any, how: PairHow, plan: Plan
) -> tuple[LinearGradients, ...]:
    """Gradients of the chunk's hidden states, and the running sums of the weights' with this chunk added."""
    terms_C, sums_C, upstream_C, kept = gradient
    if both[0].inverse_C is not None:
        upstream_C = upstream_C * both[0].inverse_C

    def body(found: tuple[LinearGradients, ...], index_and_kept: Any) -> tuple[tuple[LinearGradients, ...], None]:
        index, tiles_kept = index_and_kept
        pair, tiles = _tile_pair(both, index, tiles_kept, how, plan)
        if how.beta:
            by_logits = pairs.mixture_gradients(pair, terms_C, sums_C, upstream_C, Mixture(how.beta, _TEMPERATURE))
        else:
            by_logits = pairs.gradients(pair, terms_C, sums_C, upstream_C, _TEMPERATURE)
        added = (
            with_products(x, dlogits_CB, chunk, tile, How(shard=how.shard), plan)
            for x, dlogits_CB, chunk, tile in zip(found, by_logits, both, tiles, strict=True)
        )
        return tuple(added), None

    of_rows = (terms_C, sums_C, upstream_C, *((x.hidden_CH, x.weight_VH) for x in both))
    zeros = tuple(
        zeros_of_chunk(chunk, of_rows, dhead, plan, wanted)
        for chunk, dhead, wanted in zip(both, dheads, how.wanted, strict=True)
    )
    found, _ = lax.scan(body, zeros, (tile_indices(both[0], plan), kept))
    return tuple(without_ignored_hidden(x, chunk) for x, chunk in zip(found, both, strict=True))


def _zeros(both: Both, plan: Plan) -> jax.Array:
    """[C] to begin with."""
    arrays = [x for chunk in both for x in (chunk.hidden_CH, chunk.weight_VH)]
    return zeros_for_loop(both[0].target_C.shape, plan.dtype, *arrays, both[0].target_C)
