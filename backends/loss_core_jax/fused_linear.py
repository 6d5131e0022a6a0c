"""Cross entropy of `hidden @ weight.T` that never holds the logits of all tokens.

Tokens are taken in chunks, the vocabulary in tiles. The states of a row over the tiles are folded with
`loss_core.row_stats.combine`. Two forms, because what is known in the forward differs:

- `linear_total`: the factor of every row is known, so the forward that runs under differentiation makes the
  gradients while a chunk's logits are at hand (three products in all).
- `linear_rows`: upstream gradients come later, so the backward makes each chunk's logits again (four products).
"""

# T = tokens, C = tokens of a chunk, V = vocabulary, H = hidden

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from loss_core.row_stats import RowState, finish
from loss_core_jax.checks import IGNORED, in_host_memory
from loss_core_jax.chunked import (
    chunk_starts,
    counted_first,
    map_chunks,
    put_rows,
    put_rows_at,
    take_rows,
    take_rows_at,
    zeros_for_loop,
)
from loss_core_jax.cross_entropy import losses_of_counted
from loss_core_jax.vocab_tiles import Gradients, chunk_gradients, fold_tiles, plan_for


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def linear_total(
    hidden: jax.Array, weight_VH: jax.Array, target: jax.Array, scale: jax.Array, softcap: float, skip: bool = True
) -> jax.Array:
    """Sum over rows of scale * cross entropy; a scalar in the dtype of the arithmetic.

    Args:
        hidden: [..., H] floating.
        weight_VH: same dtype as hidden.
        target: [...] int32, classes or IGNORED or INVALID.
        scale: [...] factor per row, in the dtype of the arithmetic; differentiable.
        softcap: c in c * tanh(logits / c), 0 is off.
        skip: leave chunks of ignored rows out where that needs no sync, and gradients are wanted: XLA compiles a
            forward with the sort and the branch for more than half as long again.
    """
    return _total(_losses_only(hidden, weight_VH, target, softcap=softcap), scale)


def _total(loss: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.sum(loss * scale)


def _total_forward(
    hidden: Any, weight_VH: Any, target: Any, scale: Any, softcap: float, skip: bool
) -> tuple[jax.Array, Any]:
    # With symbolic zeros each argument says whether it is differentiated: a frozen weight costs no product.
    loss, gradients = _losses_and_gradients(
        hidden.value,
        weight_VH.value,
        target.value,
        scale.value,
        softcap=softcap,
        skip=skip,
        want_hidden=hidden.perturbed,
        want_weight=weight_VH.perturbed,
    )
    # Empty arrays carry the dtypes to the backward.
    dtypes = (jnp.zeros(0, hidden.value.dtype), jnp.zeros(0, weight_VH.value.dtype))
    return _total(loss, scale.value), (gradients, loss, dtypes)


def _total_backward(softcap: float, skip: bool, residuals: Any, grad: Any) -> tuple[Any, Any, None, jax.Array]:
    gradients, loss, (hidden_like, weight_like) = residuals
    grad = _instantiate(grad)
    return (
        _times(gradients.hidden_TH, grad, hidden_like.dtype),
        _times(gradients.weight_VH, grad, weight_like.dtype),
        None,
        loss * grad,
    )


def _instantiate(grad: Any) -> jax.Array:
    symbolic = isinstance(grad, jax.custom_derivatives.SymbolicZero)
    dense: jax.Array = jnp.zeros(grad.shape, grad.dtype) if symbolic else grad
    return dense


def _times(gradient: jax.Array | None, grad: jax.Array, dtype: Any) -> jax.Array | None:
    if gradient is None:
        return None
    # The usual upstream gradient is 1. Where looking costs no sync, do not make a second [V, H] array for it.
    if gradient.dtype == dtype and in_host_memory(grad) and grad == 1:
        return gradient
    scaled: jax.Array = _scaled(gradient, grad, dtype=dtype)
    return scaled


@functools.partial(jax.jit, static_argnames="dtype")
def _scaled(gradient: jax.Array, grad: jax.Array, *, dtype: Any) -> jax.Array:
    return (gradient * grad).astype(dtype)


linear_total.defvjp(_total_forward, _total_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear_rows(hidden: jax.Array, weight_VH: jax.Array, target: jax.Array, softcap: float) -> jax.Array:
    """Cross entropy per row, shape of target; arguments as in `linear_total`."""
    loss: jax.Array = _losses_only(hidden, weight_VH, target, softcap=softcap)
    return loss


def _rows_forward(hidden: jax.Array, weight_VH: jax.Array, target: jax.Array, softcap: float) -> tuple[jax.Array, Any]:
    state = row_states(hidden, weight_VH, target, softcap=softcap)
    loss_T = losses_of_counted(finish(jnp, state), target.reshape(-1))
    return loss_T.reshape(target.shape), (hidden, weight_VH, target, state)


def _rows_backward(softcap: float, residuals: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    hidden, weight_VH, target, state = residuals
    gradients = gradients_again(hidden, weight_VH, target, state, grad, softcap=softcap)
    return (
        gradients.hidden_TH.astype(hidden.dtype),
        gradients.weight_VH.astype(weight_VH.dtype),
        None,
    )


linear_rows.defvjp(_rows_forward, _rows_backward)


@functools.partial(jax.jit, static_argnames="softcap")
def _losses_only(hidden: jax.Array, weight_VH: jax.Array, target: jax.Array, *, softcap: float) -> jax.Array:
    state = row_states(hidden, weight_VH, target, softcap=softcap)
    return losses_of_counted(finish(jnp, state), target.reshape(-1)).reshape(target.shape)


@functools.partial(jax.jit, static_argnames="softcap")
def row_states(
    hidden: jax.Array,
    weight_VH: jax.Array,
    target: jax.Array,
    *,
    softcap: float,
    num_classes: jax.Array | None = None,
) -> RowState:
    """State of every row, [T] each. Only one tile of one chunk's logits exists at a time.

    Args:
        num_classes: as in `fold_tiles`.
    """
    hidden_TH = hidden.reshape(-1, hidden.shape[-1])
    plan = plan_for(hidden_TH.shape[0], weight_VH, softcap)

    def chunk(hidden_CH: jax.Array, target_C: jax.Array) -> RowState:
        return fold_tiles(hidden_CH, weight_VH, target_C, plan, keep=False, num_classes=num_classes)[0]

    return RowState(*map_chunks(chunk, (hidden_TH, target.reshape(-1)), plan.chunk))


@functools.partial(jax.jit, static_argnames=("softcap", "skip", "want_hidden", "want_weight"))
def _losses_and_gradients(
    hidden: jax.Array,
    weight_VH: jax.Array,
    target: jax.Array,
    scale: jax.Array,
    *,
    softcap: float,
    skip: bool,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[jax.Array, Gradients]:
    if not (want_hidden or want_weight):
        return _losses_only(hidden, weight_VH, target, softcap=softcap), Gradients(None, None)
    return _sweep(hidden, weight_VH, target, scale, None, softcap, skip, want_hidden, want_weight)


@functools.partial(jax.jit, static_argnames="softcap")
def gradients_again(
    hidden: jax.Array,
    weight_VH: jax.Array,
    target: jax.Array,
    state: RowState,
    grad: jax.Array,
    *,
    softcap: float,
    num_classes: jax.Array | None = None,
) -> Gradients:
    """Gradients in the dtype of the arithmetic, given the state of every row and its upstream gradient."""
    return _sweep(hidden, weight_VH, target, grad, state, softcap, False, True, True, num_classes)[1]


def _sweep(
    hidden: jax.Array,
    weight_VH: jax.Array,
    target: jax.Array,
    scale: jax.Array,
    state: RowState | None,
    softcap: float,
    skip: bool,
    want_hidden: bool,
    want_weight: bool,
    num_classes: jax.Array | None = None,
) -> tuple[jax.Array, Gradients]:
    """Losses and gradients, chunk by chunk; with a state given, its statistics are not computed again."""
    hidden_TH, target_T, scale_T = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1), scale.reshape(-1)
    num_rows = target_T.shape[0]
    plan = plan_for(num_rows, weight_VH, softcap)
    sources = (hidden_TH, weight_VH, target_T, scale_T)

    places_T = counted_first(target_T != IGNORED, plan.chunk) if skip else None

    def body(carry: tuple[jax.Array, Gradients], start_and_first: jax.Array) -> tuple[Any, None]:
        if places_T is None:
            return chunk(carry, start_and_first, None), None
        places_C = take_rows(places_T, start_and_first[0], plan.chunk)
        counts = jnp.any(take_rows_at(target_T, places_C) != IGNORED)
        return lax.cond(counts, lambda sums: chunk(sums, start_and_first, places_C), lambda sums: sums, carry), None

    def chunk(carry: tuple[jax.Array, Gradients], start_and_first: jax.Array, places_C: jax.Array | None) -> Any:
        losses_T, sums = carry
        start, first_new = start_and_first

        def take(x: jax.Array) -> jax.Array:
            return take_rows(x, start, plan.chunk) if places_C is None else take_rows_at(x, places_C)

        def put(x: jax.Array, rows: jax.Array) -> jax.Array:
            return put_rows(x, rows, start) if places_C is None else put_rows_at(x, rows, places_C)

        hidden_CH, target_C, scale_C = map(take, (hidden_TH, target_T, scale_T))
        tiles = None
        if state is None:
            state_C, tiles = fold_tiles(hidden_CH, weight_VH, target_C, plan, keep=True)
        else:
            state_C = RowState(*map(take, state))
        loss_C = losses_of_counted(finish(jnp, state_C), target_C)
        is_new_C = start + jnp.arange(plan.chunk, dtype=np.int32) >= first_new
        dhidden_CH, dweight_VH = chunk_gradients(
            hidden_CH,
            weight_VH,
            target_C,
            scale_C,
            is_new_C,
            state_C,
            tiles,
            sums.weight_VH,
            plan,
            want_hidden,
            num_classes,
        )
        dhidden_TH = sums.hidden_TH
        if dhidden_TH is not None and dhidden_CH is not None:
            dhidden_TH = put(dhidden_TH, dhidden_CH)
        return put(losses_T, loss_C), Gradients(dhidden_TH, dweight_VH)

    sums = Gradients(
        zeros_for_loop(hidden_TH.shape, plan.dtype, *sources) if want_hidden else None,
        zeros_for_loop(weight_VH.shape, plan.dtype, *sources) if want_weight else None,
    )
    losses_T = zeros_for_loop((num_rows,), plan.dtype, *sources)
    if num_rows:
        starts = chunk_starts(num_rows, plan.chunk)
        steps = np.stack([starts, np.arange(len(starts), dtype=np.int32) * plan.chunk], axis=1)
        (losses_T, sums), _ = lax.scan(body, (losses_T, sums), jnp.asarray(steps))
    dhidden = None if sums.hidden_TH is None else sums.hidden_TH.reshape(hidden.shape)
    return losses_T.reshape(target.shape), Gradients(dhidden, sums.weight_VH)
