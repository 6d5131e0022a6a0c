"""Losses per row over logits whose vocabulary is sharded, and the collectives that all sharded losses share.

Forward: each device makes the state of its rows over its share of the vocabulary; one all-gather, folded in the
order of the axis, gives every device the same state, bitwise. Backward is local, given that state.

What a gradient is: that of the full problem. Under `check_vma=True` (JAX's default) the types say which arrays
differ between devices, and that holds for `jax.grad` inside and outside of `jax.shard_map`. Under
`check_vma=False` JAX counts the cotangent of a replicated result as the sum over its devices' copies; that is
followed here, so that `jax.grad` outside of `jax.shard_map` is right, and inside it differentiates the sum of
the loss over the devices, as it does for every `psum` there.
"""

# T = tokens (any leading dimensions), V = vocabulary, V_local = this device's share, R = shards; tau = temperature

from __future__ import annotations

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from loss_core.row_stats import KDRowState, RowState, combine, combine_kd, finish, finish_kd
from loss_core_jax.checks import ELSEWHERE, IGNORED
from loss_core_jax.chunked import Arrays, map_chunks, vary, varying_axes
from loss_core_jax.cross_entropy import (
    arithmetic_dtype,
    chunk_of,
    counted_or_zero,
    logits_gradient,
    losses_of_counted,
)
from loss_core_jax.distillation import Rows, chunk_rows, student_gradient, teacher_gradient
from loss_core_jax.layout import Axes, Layout, hinted, lead_spec, over_mesh


def cross_entropy_rows(logits: jax.Array, target: jax.Array, layout: Layout) -> jax.Array:
    """Cross entropy per row, as `loss_core_jax.cross_entropy.cross_entropy_rows`, for any layout.

    Args:
        logits: [..., V], or [..., V_local] inside `jax.shard_map`.
        target: [...] int32, classes of the full vocabulary or IGNORED or INVALID.
    """
    if not target.size:
        return no_rows(logits, target)
    if not layout.manual:
        return _cross_entropy_inside(hinted(logits, -1, layout), target, layout)
    inside = functools.partial(_cross_entropy_inside, layout=layout)
    specs = (lead_spec(layout, layout.axes), lead_spec(layout))
    return over_mesh(inside, layout, (pad_vocab(logits, layout), target), specs)


def distillation_rows(
    student: jax.Array, teacher: jax.Array, target: jax.Array, temperature: float, chunk_size: int, layout: Layout
) -> jax.Array:
    """T^2 * KL per row, as `loss_core_jax.distillation.distillation_rows`, for any layout."""
    if not target.size:
        return no_rows(student, target)

    def inside(student: jax.Array, teacher: jax.Array, target: jax.Array) -> jax.Array:
        rows = align(layout.axes, (student, teacher), (target,))
        return _sharded_distillation(*rows, temperature, chunk_size, layout.axes, layout.whole)

    if not layout.manual:
        return inside(hinted(student, -1, layout), hinted(teacher, -1, layout), target)
    spec = lead_spec(layout, layout.axes)
    arrays = (pad_vocab(student, layout), pad_vocab(teacher, layout), target)
    return over_mesh(inside, layout, arrays, (spec, spec, lead_spec(layout)))


def no_rows(scores: jax.Array, target: jax.Array) -> jax.Array:
    """The losses of no rows. JAX forgets what its empty arrays vary over."""
    return jnp.zeros(target.shape, arithmetic_dtype(scores))


def pad_vocab(logits: jax.Array, layout: Layout) -> jax.Array:
    """The logits with classes of probability 0 added, so that every shard has the same size."""
    missing = -logits.shape[-1] % layout.num_shards
    if not missing:
        return logits
    return jnp.pad(logits, [(0, 0)] * (logits.ndim - 1) + [(0, missing)], constant_values=-jnp.inf)


def _cross_entropy_inside(logits: jax.Array, target: jax.Array, layout: Layout) -> jax.Array:
    logits, target = align(layout.axes, (logits,), (target,))
    return _sharded_cross_entropy(logits, target, layout.axes, layout.whole)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _sharded_cross_entropy(logits: jax.Array, target: jax.Array, axes: Axes, whole: bool) -> jax.Array:
    return _ce_forward(logits, target, axes, whole)[0]


def _ce_forward(logits: jax.Array, target: jax.Array, axes: Axes, whole: bool) -> tuple[jax.Array, Arrays]:
    local = local_target(target, logits.shape[-1], axes)
    state = RowState(*_by_chunks(_row_state, (logits, local), None if whole else chunk_of(logits)))
    state = fold_over(axes, whole, state)
    return losses_of_counted(finish(jnp, state), target), (logits, target, state.m, state.s)


def _ce_backward(axes: Axes, whole: bool, residuals: Arrays, grad: jax.Array) -> tuple[jax.Array, None]:
    logits, target, m, s = residuals
    local = local_target(target, logits.shape[-1], axes)
    return logits_gradient(logits, local, m, s, whole_cotangent(axes, grad)), None


_sharded_cross_entropy.defvjp(_ce_forward, _ce_backward)


def _row_state(logits: jax.Array, local: jax.Array) -> RowState:
    """State of each row over this share; reductions of whole rows only, which XLA can partition over anything."""
    z = counted_or_zero(logits, local)
    # The loss does not depend on m, so it may be held constant.
    m = lax.stop_gradient(jnp.max(z, axis=-1))
    s = jnp.sum(jnp.exp(z - _finite(m)[..., None]), axis=-1)
    # Not a gather, which XLA partitions by moving the logits.
    onehot = lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1) == local[..., None]
    t = jnp.where(local >= 0, jnp.sum(jnp.where(onehot, z, 0), axis=-1), -jnp.inf)
    return RowState(m, s, jnp.where(local == IGNORED, 0, t))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _sharded_distillation(
    student: jax.Array,
    teacher: jax.Array,
    target: jax.Array,
    temperature: float,
    chunk_size: int,
    axes: Axes,
    whole: bool,
) -> jax.Array:
    return _kd_forward(student, teacher, target, temperature, chunk_size, axes, whole)[0]


def _kd_forward(
    student: jax.Array,
    teacher: jax.Array,
    target: jax.Array,
    temperature: float,
    chunk_size: int,
    axes: Axes,
    whole: bool,
) -> tuple[jax.Array, Any]:
    dtype = arithmetic_dtype(student, teacher)
    row_state = functools.partial(_kd_row_state, temperature=temperature, dtype=dtype)
    chunk = None if whole else chunk_rows(chunk_size, student.shape[-1], dtype)
    local = KDRowState(*_by_chunks(row_state, (student, teacher, target), chunk))
    state, m_t, m_s = _fold_kd(axes, whole, local, temperature)
    kl = finish_kd(jnp, state)
    loss = losses_of_counted(temperature**2 * kl, target)
    return loss, (student, teacher, target, kl, m_t, state.s_t, m_s, state.s_s)


def _kd_backward(
    temperature: float, chunk_size: int, axes: Axes, whole: bool, residuals: Any, grad: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    rows = Rows(*(*residuals, whole_cotangent(axes, grad)))
    dtype = arithmetic_dtype(rows.student, rows.teacher)
    return student_gradient(rows, temperature, dtype), teacher_gradient(rows, temperature, dtype), None


_sharded_distillation.defvjp(_kd_forward, _kd_backward)


def _kd_row_state(
    student: jax.Array, teacher: jax.Array, target: jax.Array, *, temperature: float, dtype: Any
) -> KDRowState:
    """State of each row over this share. m is in units of the logits, the rest belongs to logits / tau."""

    def shifted(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = jnp.where(target[..., None] == IGNORED, 0, logits.astype(dtype))
        m = lax.stop_gradient(jnp.max(z, axis=-1))
        return (z - _finite(m)[..., None]) / temperature, m

    (u_t, m_t), (u_s, m_s) = shifted(teacher), shifted(student)
    e_t = jnp.exp(u_t)
    # Probability 0 times a difference of inf or NaN must be 0.
    difference = jnp.where(e_t == 0, 0, u_t - u_s)
    return KDRowState(m_t, jnp.sum(e_t, -1), jnp.sum(e_t * difference, -1), m_s, jnp.sum(jnp.exp(u_s), -1))


def _fold_kd(axes: Axes, whole: bool, local: KDRowState, temperature: float) -> tuple[KDRowState, jax.Array, jax.Array]:
    """The state of whole rows relative to their maxima, and these maxima."""
    pieces = [KDRowState(*piece) for piece in _gathered(axes, whole, local)]
    m_t = functools.reduce(jnp.maximum, [piece.m_t for piece in pieces])
    m_s = functools.reduce(jnp.maximum, [piece.m_s for piece in pieces])

    def relative(piece: KDRowState) -> KDRowState:
        # Divided after the subtraction: m / tau at 1e4 would lose digits that the difference keeps.
        return piece._replace(
            m_t=(piece.m_t - _finite(m_t)) / temperature, m_s=(piece.m_s - _finite(m_s)) / temperature
        )

    return functools.reduce(functools.partial(combine_kd, jnp), map(relative, pieces)), m_t, m_s


def _finite(m: jax.Array) -> jax.Array:
    """The maxima, 0 for a row of -inf: -inf minus -inf is NaN, and an empty share must stay the identity."""
    return jnp.where(m == -jnp.inf, 0, m)


def _by_chunks(fn: Any, rows: Arrays, chunk: int | None) -> Arrays:
    """`fn(*rows)` by chunks of rows, or in one piece for None; leading dimensions are kept."""
    if chunk is None:
        return cast(Arrays, fn(*rows))
    lead = rows[-1].shape
    flat = tuple(x.reshape(-1, *x.shape[len(lead) :]) for x in rows)
    return tuple(x.reshape(lead) for x in map_chunks(fn, flat, chunk))


def local_target(target: jax.Array, num_local: int, axes: Axes) -> jax.Array:
    """The target within this device's share: its class there, ELSEWHERE, or IGNORED or INVALID as before."""
    if not axes:
        return target
    local = target - lax.axis_index(axes) * num_local
    owned = (local >= 0) & (local < num_local)
    return jnp.where(target < 0, target, jnp.where(owned, local, ELSEWHERE))


def fold_over(axes: Axes, whole: bool, state: RowState) -> RowState:
    """The state of whole rows, the same on every device."""
    return functools.reduce(
        functools.partial(combine, jnp), [RowState(*piece) for piece in _gathered(axes, whole, state)]
    )


def _gathered(axes: Axes, whole: bool, state: Arrays) -> list[Any]:
    """Every device's state, in the order of the axes, by one collective."""
    if not axes:
        return [state]
    packed = jnp.stack(state)
    if not whole and jax.__version_info__ >= (0, 10):
        gather: Any = lax.all_gather
        every = gather(packed, axes, to="invarying")
    else:
        # A sum with zeros. XLA would gather rows that are sharded, too, and JAX before 0.10 has no all-gather whose
        # result counts as the same on all devices.
        mine = jnp.arange(lax.axis_size(axes)) == lax.axis_index(axes)
        every = lax.psum(jnp.where(mine.reshape(-1, *(1,) * packed.ndim), packed, 0), axes)
    return [tuple(every[shard]) for shard in range(every.shape[0])]


def align(axes: Axes, shards: Arrays, rows: Arrays) -> Arrays:
    """Shards and rows made to vary over the same mesh axes, except that only the shards vary over `axes`.

    JAX then sums the gradient of what was the same on several devices before.
    """
    others = varying_axes((*shards, *rows)) - set(axes)
    over = others | set(axes) if types_tell(axes) else others
    return (*(vary(x, over) for x in shards), *(vary(x, others) for x in rows))


def types_tell(axes: Axes) -> bool:
    """Whether types say what varies over the axes (`check_vma=True`)."""
    return bool(axes) and set(axes) <= varying_axes((lax.axis_index(axes),))


def whole_cotangent(axes: Axes, grad: jax.Array) -> jax.Array:
    """The cotangent of a result that is the same on all devices of the axes, from each device's part of it."""
    if not axes or (types_tell(axes) and not set(axes) & varying_axes((grad,))):
        return grad
    return lax.psum(grad, axes)
