"""Cross entropy per row over logits in memory, by chunks of rows: statistics forward, local backward.

The formula stands in `loss_core.oracle`; the row state in `loss_core.row_stats`.
"""

# T = tokens, C = tokens of a chunk, V = vocabulary

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from loss_core.row_stats import NEAR_COLUMNS, RowState, finish, near_enough, near_largest
from loss_core_jax.checks import IGNORED, INVALID
from loss_core_jax.chunked import map_chunks, rows_within

# XLA for CPU writes a cast of the logits out before it sums over it; chunks bound this temporary, and keep it in cache.
_BUDGET_BYTES = 8 << 20

Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def arithmetic_dtype(*arrays: jax.Array) -> Any:
    """float64 when an array is, else float32."""
    return jnp.dtype("float64" if any(a.dtype == jnp.float64 for a in arrays) else "float32")


@jax.custom_vjp
def cross_entropy_rows(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Cross entropy per row; 0 where target is IGNORED, NaN where it is INVALID.

    Args:
        logits: [..., V] floating; computed in float32 (float64 for float64), with no copy in that dtype.
        target: [...] int32.
    Returns:
        [...] in the dtype of the arithmetic.
    """
    return _evaluated(logits, target, _row_state)[0]


def _forward(logits: jax.Array, target: jax.Array) -> tuple[jax.Array, Residuals]:
    # Not where only the loss is wanted: XLA would compile for twice as long as for two looks.
    loss, state = _evaluated(logits, target, _one_look if jax.default_backend() == "cpu" else _row_state)
    # The logits as they came, not reshaped: outside a jit a reshaped residual would be a copy.
    return loss, (logits, target, state.m, state.s)


def _evaluated(
    logits: jax.Array, target: jax.Array, whole: Callable[[jax.Array, jax.Array], RowState]
) -> tuple[jax.Array, RowState]:
    """Losses, and the states of the rows; `whole` makes them where no chunks are needed."""
    logits_TV, target_T = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    if logits.dtype != arithmetic_dtype(logits):
        state = RowState(*map_chunks(_row_state, (logits_TV, target_T), chunk_of(logits_TV)))
    else:
        # Without a cast XLA sums exp(z - m) straight from the logits: no temporaries, so no chunks.
        state = whole(logits_TV, target_T)
    loss_T = losses_of_counted(finish(jnp, state), target_T)
    return loss_T.reshape(target.shape), state


def _backward(residuals: Residuals, grad: jax.Array) -> tuple[jax.Array, None]:
    logits, target, m_T, s_T = residuals
    logits_TV = logits.reshape(-1, logits.shape[-1])
    rows = (logits_TV, target.reshape(-1), m_T, s_T, grad.reshape(-1))
    # No chunks: this is one elementwise pass, which XLA fuses and runs on all cores; it needs no temporaries.
    return logits_gradient(*rows).reshape(logits.shape), None


cross_entropy_rows.defvjp(_forward, _backward)


def chunk_of(logits: jax.Array) -> int:
    """Rows to compute at a time."""
    return rows_within(_BUDGET_BYTES, logits.shape[-1] * arithmetic_dtype(logits).itemsize, at_least=16)


def _row_state(logits_CV: jax.Array, target_C: jax.Array) -> RowState:
    wide_CV = logits_CV.astype(arithmetic_dtype(logits_CV))
    # The loss does not depend on m, so it may be held constant: second derivatives get no 0 / 0 from ties.
    m_C = lax.stop_gradient(jnp.max(wide_CV, axis=-1))
    s_C = _sum_exp(wide_CV, m_C, target_C)
    # Gathered from the logits as given: from the cast it would make XLA write the cast out once more.
    t_C = _label_logit(logits_CV, target_C).astype(wide_CV.dtype)
    return _without_ignored(RowState(m_C, s_C, t_C), target_C == IGNORED)


def _one_look(logits_TV: jax.Array, target_T: jax.Array) -> RowState:
    """`_row_state` with one look at the logits where `near_largest` gives an m for every row, else with two more."""
    ignored_T = target_T == IGNORED
    t_T = _label_logit(logits_TV, target_T)
    near_T = lax.stop_gradient(near_largest(jnp, logits_TV[:, :NEAR_COLUMNS], t_T))
    sum_T = _sum_exp(logits_TV, near_T, target_T)
    enough = jnp.all(ignored_T | near_enough(sum_T))

    def look_twice(logits_TV: jax.Array) -> tuple[jax.Array, jax.Array]:
        m_T = lax.stop_gradient(jnp.max(logits_TV, axis=-1))
        return m_T, _sum_exp(logits_TV, m_T, target_T)

    m_T, s_T = lax.cond(enough, lambda _: (near_T, sum_T), look_twice, logits_TV)
    return _without_ignored(RowState(m_T, s_T, t_T), ignored_T)


def _without_ignored(state: RowState, ignored_T: jax.Array) -> RowState:
    """The state with ignored rows as zeros (what it adds to s is of no interest): their NaN reaches nothing behind."""
    return RowState(*(jnp.where(ignored_T, other, stat) for other, stat in zip((0, 1, 0), state, strict=True)))


def _label_logit(logits_CV: jax.Array, target_C: jax.Array) -> jax.Array:
    """The logit of each row's class, of class 0 where the label is none."""
    return jnp.take_along_axis(logits_CV, jnp.maximum(target_C, 0)[:, None], axis=-1)[:, 0]


@jax.custom_jvp
def _sum_exp(rows: jax.Array, m: jax.Array, target: jax.Array) -> jax.Array:
    """Sum of exp(row - m) over the last axis; m is held constant."""
    # The rows as they are: zeros in place of ignored ones would be a copy of all, made before the sum.
    return jnp.sum(jnp.exp(rows - m[..., None]), axis=-1)


@_sum_exp.defjvp
def _sum_exp_jvp(primals: tuple[jax.Array, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    rows, m, target = primals
    # For second derivatives: without the zeros a NaN in an ignored row would meet a cotangent of 0.
    exp = jnp.exp(counted_or_zero(rows, target) - jnp.where(target == IGNORED, 0, m)[..., None])
    return _sum_exp(rows, m, target), jnp.sum(exp * counted_or_zero(tangents[0], target), axis=-1)


def logits_gradient(logits: jax.Array, target: jax.Array, m: jax.Array, s: jax.Array, grad: jax.Array) -> jax.Array:
    """Gradient of the logits [..., V], given the state of each row and its upstream gradient, [...] each."""
    z = counted_or_zero(logits, target)
    onehot = lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1) == target[..., None]
    grad = jnp.where(target == IGNORED, 0, nan_if_invalid(grad, target))
    # exp(z - m) / s rather than exp(z - lse): at logits of 1e4 the lse has lost the digits that count. One division
    # per row, not per logit.
    dlogits = jnp.exp(z - m[..., None]) * (grad / s)[..., None] - jnp.where(onehot, grad[..., None], 0)
    return dlogits.astype(logits.dtype)


def losses_of_counted(loss_T: jax.Array, target_T: jax.Array) -> jax.Array:
    """The losses, 0 where the row is ignored and NaN where its label is invalid."""
    return jnp.where(target_T == IGNORED, 0, nan_if_invalid(loss_T, target_T))


def nan_if_invalid(value_T: jax.Array, target_T: jax.Array) -> jax.Array:
    """The values, NaN where the row's label is invalid."""
    return jnp.where(target_T == INVALID, jnp.nan, value_T)


def counted_or_zero(rows: jax.Array, target_T: jax.Array) -> jax.Array:
    """Rows in the dtype of the arithmetic; ignored ones are 0, so that their inf or NaN reaches no product."""
    return jnp.where(target_T[..., None] == IGNORED, 0, rows.astype(arithmetic_dtype(rows)))
