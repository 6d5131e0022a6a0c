"""Ignored rows left out of the fused loss's matrix products: gathered before them, put back behind them.

Shapes must be known when JAX traces, so the number of rows that stay is a Python integer: the caller's, or one read
from labels in host memory and rounded up, so that few programs are compiled.
"""

# T = tokens (any leading dimensions), N = rows that take part in the products, H = hidden

from __future__ import annotations

import functools
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loss_core_jax.checks import IGNORED, ArrayLike, classify, in_host_memory

# A count that was read is rounded up to a multiple of T / this: at most so many programs for one shape.
_PROGRAMS = 16


def num_rows(
    labels: ArrayLike, ignore_index: int, vocab: int, skip_ignored: bool | None, num_valid_tokens: int | None
) -> int | None:
    """How many rows take part in the products; None for all of them.

    Args:
        labels, ignore_index: as `checks.read_labels` gives them.
    Raises:
        TypeError: num_valid_tokens is no Python integer, such as an argument that jit traces.
        ValueError: num_valid_tokens is not the number of labels that count (where they can be read), or comes
            with skip_ignored=False; skip_ignored=True where the labels are traced.
    """
    total = labels.size
    if num_valid_tokens is None:
        if not skip_ignored:
            return None
        if isinstance(labels, jax.core.Tracer):
            raise ValueError(
                "skip_ignored=True counts the labels on the host, which it can't under jax.jit: pass their number as "
                "num_valid_tokens (a Python integer, static under jit), or use skip_ignored=None."
            )
        counted = _counted(labels, ignore_index, vocab)
        step = max(1, total // _PROGRAMS)
        return min(-(-counted // step) * step, total)
    if isinstance(num_valid_tokens, bool) or not isinstance(num_valid_tokens, numbers.Integral):
        raise TypeError(
            f"num_valid_tokens must be a Python integer, got {type(num_valid_tokens).__name__}: it gives arrays their "
            "shape. Under jax.jit make it static (static_argnames), or bind it with functools.partial."
        )
    if skip_ignored is False:
        raise ValueError(
            f"num_valid_tokens={num_valid_tokens} is for leaving the other tokens out of the products, which "
            "skip_ignored=False forbids; use skip_ignored=None or True, or leave the number out."
        )
    if not 0 <= num_valid_tokens <= total:
        raise ValueError(f"num_valid_tokens must be in [0, {total}], the number of tokens, got {num_valid_tokens}.")
    if not isinstance(labels, jax.Array) or in_host_memory(labels):
        counted = _counted(labels, ignore_index, vocab)
        if counted != num_valid_tokens:
            raise ValueError(
                f"num_valid_tokens is {num_valid_tokens}, but {counted} of the {total} labels are not ignore_index; it "
                "must be their number in this very call."
            )
    return int(num_valid_tokens)


def _counted(labels: ArrayLike, ignore_index: int, vocab: int) -> int:
    return int(np.sum(np.asarray(classify(np, np.asarray(labels), None, ignore_index, vocab)) != IGNORED))


@functools.partial(jax.jit, static_argnames="size")
def take_counted(
    hidden: jax.Array, target: jax.Array, scale: jax.Array, *, size: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The rows that count, and their places; free rows at the end are ignored ones.

    Args:
        hidden: [..., H]; target: [...] int32; scale: [...] factor per row.
    Returns:
        [N, H], [N], [N], and the places [N] among the T rows, T for a free row.
    """
    total = target.size
    places_N = jnp.nonzero(target.reshape(-1) != IGNORED, size=size, fill_value=total)[0]
    take = functools.partial(_take, places_N)
    hidden_TH = hidden.reshape(-1, hidden.shape[-1])
    return take(hidden_TH, 0), take(target.reshape(-1), IGNORED), take(scale.reshape(-1), 0), places_N


def _take(places_N: jax.Array, rows: jax.Array, fill: int) -> jax.Array:
    taken: jax.Array = rows.at[places_N].get(mode="fill", fill_value=fill, indices_are_sorted=True)
    return taken


@functools.partial(jax.jit, static_argnames="shape")
def put_back(loss_N: jax.Array, places_N: jax.Array, *, shape: tuple[int, ...]) -> jax.Array:
    """Losses of all rows, 0 for those that were left out."""
    loss_T = jnp.zeros(int(np.prod(shape)), loss_N.dtype)
    return loss_T.at[places_N].set(loss_N, mode="drop", indices_are_sorted=True).reshape(shape)


def nan_if_wrong(loss: jax.Array, target: jax.Array, num_valid_tokens: int | None) -> jax.Array:
    """The loss, NaN (its gradients as well) where num_valid_tokens is not the number of rows that count."""
    if num_valid_tokens is None:
        return loss
    one_or_nan: Any = jnp.where(jnp.sum(target != IGNORED) == num_valid_tokens, 1, jnp.nan)
    return loss * one_or_nan.astype(loss.dtype)
