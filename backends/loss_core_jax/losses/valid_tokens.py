"""Skip ignored tokens in matrix products: valid rows are gathered before them, their losses scattered back after.

Shapes must be known when JAX traces, so the number of gathered rows is a Python integer: the caller's, or one counted
in labels in host memory and rounded up, so that few programs are compiled.
"""

# T = tokens (any leading dimensions), N = gathered rows, H = hidden

from __future__ import annotations

import functools
import math
import numbers
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from loss_core.dispatch.protocol import BackendUnavailable
from loss_core_jax.inputs import IGNORED, ArrayLike, in_host_memory

# A count read on the host is rounded up to a multiple of T / this, which bounds the programs compiled for one shape.
_MAX_PROGRAMS = 16


def num_rows(target: ArrayLike, skip_ignored: bool | None, num_valid_tokens: int | None) -> int:
    """Number of rows to gather, with skip_ignored=True or with the caller's num_valid_tokens.

    Args:
        target: as `inputs.read_labels` returns it.
    Raises:
        TypeError: num_valid_tokens is not a Python integer, such as an argument that jit traces.
        ValueError: num_valid_tokens is not the number of labels that are not ignored (where they are readable), or
            comes with skip_ignored=False; skip_ignored=True where the labels are traced.
    """
    total = target.size
    counted = int(np.sum(np.asarray(target) != IGNORED)) if in_host_memory(target) else None
    if num_valid_tokens is None:
        if counted is None:
            raise ValueError(
                "skip_ignored=True counts the labels on the host, which it can't under jax.jit: pass their number as "
                "num_valid_tokens (a Python integer, static under jit), or use skip_ignored=None."
            )
        step = max(1, total // _MAX_PROGRAMS)
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
    if counted is not None and counted != num_valid_tokens:
        raise ValueError(
            f"num_valid_tokens is {num_valid_tokens}, but {counted} of the {total} labels are not ignore_index; it "
            "must be their number in this very call."
        )
    return int(num_valid_tokens)


def refuse_sharded(skip_ignored: bool | None, num_valid_tokens: Any) -> NoReturn:
    """Raise BackendUnavailable: ignored tokens can't be skipped where the vocabulary is sharded."""
    raise BackendUnavailable(
        f"The fused loss got skip_ignored={skip_ignored}, num_valid_tokens={num_valid_tokens} with a "
        "sharded vocabulary: ignored tokens take part in its products. Use skip_ignored=None and leave out "
        "num_valid_tokens."
    )


@functools.partial(jax.jit, static_argnames="size")
def gather(hidden: jax.Array, target: jax.Array, scale: jax.Array, *, size: int) -> tuple[jax.Array, ...]:
    """The valid rows, padded with ignored rows to `size`.

    Args:
        hidden: [..., H]; target: [...] int32; scale: [...] factor per row.
    Returns:
        hidden [N, H], target [N], scale [N], and the indices [N] of the rows among T; T for padding.
    """
    indices_N = jnp.nonzero(target.reshape(-1) != IGNORED, size=size, fill_value=target.size)[0]

    def take(rows: jax.Array, fill: int) -> jax.Array:
        return rows.at[indices_N].get(mode="fill", fill_value=fill, indices_are_sorted=True)

    hidden_TH = hidden.reshape(-1, hidden.shape[-1])
    return take(hidden_TH, 0), take(target.reshape(-1), IGNORED), take(scale.reshape(-1), 0), indices_N


@functools.partial(jax.jit, static_argnames="shape")
def scatter(loss_N: jax.Array, indices_N: jax.Array, *, shape: tuple[int, ...]) -> jax.Array:
    """Losses of all rows, 0 for those that were not gathered."""
    loss_T = jnp.zeros(math.prod(shape), loss_N.dtype)
    return loss_T.at[indices_N].set(loss_N, mode="drop", indices_are_sorted=True).reshape(shape)


def nan_if_miscounted(loss: jax.Array, target: jax.Array, num_valid_tokens: int | None) -> jax.Array:
    """The loss; NaN, as are its gradients, if num_valid_tokens is given and is not the number of valid rows."""
    if num_valid_tokens is None:
        return loss
    one_or_nan: Any = jnp.where(jnp.sum(target != IGNORED) == num_valid_tokens, 1, jnp.nan)
    return loss * one_or_nan.astype(loss.dtype)
