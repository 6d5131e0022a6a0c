"""The fused linear loss with its weight sharded over the vocabulary, for any layout.

The states of all rows come first, then one all-gather, then the gradients in the backward, which makes each
chunk's logits again (four products): one collective on the states however many chunks there are. The gradient
of hidden states that are the same on all devices is summed in one more; the weight's needs none.
"""

# T = tokens, N = chunks, C = tokens of a chunk, V = vocabulary (or a share of it), H = hidden

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from loss_core.row_stats import RowState, finish
from loss_core_jax.checks import IGNORED
from loss_core_jax.chunked import vary, varying_axes, zeros_for_loop
from loss_core_jax.cross_entropy import losses_of_counted
from loss_core_jax.fused_linear import gradients_again, row_states
from loss_core_jax.layout import Axes, Layout, hinted, lead_spec, over_mesh
from loss_core_jax.sharded import fold_over, local_target, no_rows, types_tell, whole_cotangent
from loss_core_jax.vocab_tiles import Gradients, Plan, chunk_gradients, fold_tiles, plan_for


class _Problem(NamedTuple):
    """What is static in a call; hashable."""

    axes: Axes
    whole: bool
    vocab: int  # classes of the full problem; a share may hold padding beyond them
    softcap: float
    sequence_parallel: bool


def linear_rows(
    hidden: jax.Array,
    weight_VH: jax.Array,
    target: jax.Array,
    softcap: float,
    layout: Layout,
    sequence_parallel: bool,
) -> jax.Array:
    """Cross entropy per row, as `loss_core_jax.fused_linear.linear_rows`, for any layout.

    Args:
        hidden: [..., H]; inside `jax.shard_map` with sequence_parallel, this device's share of the first dimension.
        weight_VH: the full weight; inside `jax.shard_map`, this device's share.
        target: [...] int32, classes of the full vocabulary or IGNORED or INVALID.
    """
    if not target.size:
        return no_rows(hidden, target)
    # Without axes of its own, nothing is this device's share.
    problem = _Problem(
        layout.axes,
        layout.whole,
        layout.vocab(weight_VH.shape[0]),
        softcap,
        sequence_parallel and bool(layout.axes),
    )
    inside = functools.partial(_inside, problem=problem)
    if not layout.manual:
        return inside(hidden, hinted(weight_VH, 0, layout), target)
    # Rows of zeros; their logits are taken for -inf.
    padded_VH = jnp.pad(weight_VH, [(0, -weight_VH.shape[0] % layout.num_shards), (0, 0)])
    hidden_lead = layout.lead
    if sequence_parallel:
        hidden_lead = ((*layout.lead[0], *layout.axes), *layout.lead[1:])
    specs = (
        lead_spec(layout._replace(lead=hidden_lead), ()),
        lead_spec(layout._replace(lead=()), layout.axes, ()),
        lead_spec(layout),
    )
    return over_mesh(inside, layout, (hidden, padded_VH, target), specs)


def gathered(hidden: Any, layout: Layout) -> Any:
    """Shape and dtype of all hidden states, for sequence-parallel ones.

    Raises:
        ValueError: there is no sequence dimension, or it does not divide by the axis.
    """
    shape = hidden.shape
    if len(shape) < 2 or (not layout.inside and shape[0] % layout.num_shards):
        raise ValueError(
            f"hidden_states has shape {shape}; with sequence_parallel=True its first dimension must be the sequence, "
            f"in {layout.num_shards} equal shares over the mesh axes {', '.join(map(repr, layout.axes))}."
        )
    return jax.ShapeDtypeStruct((layout.vocab(shape[0]), *shape[1:]), hidden.dtype)


def _inside(hidden: jax.Array, weight_VH: jax.Array, target: jax.Array, problem: _Problem) -> jax.Array:
    axes = problem.axes
    if types_tell(axes):
        weight_VH = vary(weight_VH, frozenset(axes))
        hidden = vary(hidden, frozenset(axes)) if problem.sequence_parallel else hidden
    return _sharded_linear(hidden, weight_VH, target, problem)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _sharded_linear(hidden: jax.Array, weight_VH: jax.Array, target: jax.Array, problem: _Problem) -> jax.Array:
    return _forward(hidden, weight_VH, target, problem)[0]


def _forward(hidden: jax.Array, weight_VH: jax.Array, target: jax.Array, problem: _Problem) -> tuple[jax.Array, Any]:
    if problem.sequence_parallel:
        hidden = lax.all_gather(hidden, problem.axes, axis=0, tiled=True)
    local = local_target(target, weight_VH.shape[0], problem.axes)
    states = _whole_states if problem.whole else row_states
    state = states(hidden, weight_VH, local, softcap=problem.softcap, num_classes=_num_classes(weight_VH, problem))
    state = fold_over(problem.axes, problem.whole, state)
    loss_T = losses_of_counted(finish(jnp, state), target.reshape(-1))
    return loss_T.reshape(target.shape), (hidden, weight_VH, target, state)


def _backward(problem: _Problem, residuals: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    hidden, weight_VH, target, state = residuals
    axes = problem.axes
    grad = whole_cotangent(axes, grad)
    local = local_target(target, weight_VH.shape[0], axes)
    again = _whole_gradients if problem.whole else gradients_again
    dhidden, dweight_VH = again(
        hidden, weight_VH, local, state, grad, softcap=problem.softcap, num_classes=_num_classes(weight_VH, problem)
    )
    if problem.sequence_parallel:
        dhidden = lax.psum_scatter(dhidden, axes, scatter_dimension=0, tiled=True)
    elif axes and not types_tell(axes):
        # JAX sums the copies of the cotangent over the devices once more.
        dhidden = lax.pmean(dhidden, axes)
    else:
        dhidden = _summed_over_copies(dhidden, hidden)
    dweight_VH = _summed_over_copies(dweight_VH, weight_VH)
    return dhidden.astype(hidden.dtype), dweight_VH.astype(weight_VH.dtype), None


_sharded_linear.defvjp(_forward, _backward)


def _summed_over_copies(gradient: Any, primal: jax.Array) -> jax.Array:
    """The gradient of an array that is the same on several devices, from each device's part.

    JAX would sum by itself, but gradients that are rounded already; here they are in the dtype of the arithmetic.
    """
    copies = tuple(sorted(varying_axes((gradient,)) - varying_axes((primal,))))
    total: jax.Array = lax.psum(gradient, copies) if copies else gradient
    return total


def _num_classes(weight_VH: jax.Array, problem: _Problem) -> jax.Array | None:
    """How many of this share's rows are classes; None for all."""
    num_local = weight_VH.shape[0]
    if not problem.axes or num_local * lax.axis_size(problem.axes) == problem.vocab:
        return None
    return jnp.clip(problem.vocab - lax.axis_index(problem.axes) * num_local, 0, num_local)


@functools.partial(jax.jit, static_argnames="softcap")
def _whole_states(
    hidden: jax.Array, weight_VH: jax.Array, target: jax.Array, *, softcap: float, num_classes: jax.Array | None
) -> RowState:
    """As `row_states`, slicing no dimension that may be sharded."""
    hidden, weight_VH = _unsharded_last(hidden), _unsharded_last(weight_VH)
    num_rows = target.size
    num_chunks, plan = _whole_plan(num_rows, weight_VH, softcap)

    def body(_: None, piece: Any) -> tuple[None, RowState]:
        hidden_CH, target_C = piece
        return None, fold_tiles(hidden_CH, weight_VH, target_C, plan, keep=False, num_classes=num_classes)[0]

    pieces = (
        _pieces(hidden.reshape(num_rows, hidden.shape[-1]), num_chunks, 0),
        _pieces(target.reshape(-1), num_chunks, IGNORED),
    )
    _, state = lax.scan(body, None, pieces)
    return RowState(*(_joined(x, num_rows) for x in state))


@functools.partial(jax.jit, static_argnames="softcap")
def _whole_gradients(
    hidden: jax.Array,
    weight_VH: jax.Array,
    target: jax.Array,
    state: RowState,
    grad: jax.Array,
    *,
    softcap: float,
    num_classes: jax.Array | None,
) -> Gradients:
    """As `gradients_again`, slicing no dimension that may be sharded."""
    hidden, weight_VH = _unsharded_last(hidden), _unsharded_last(weight_VH)
    num_rows = target.size
    num_chunks, plan = _whole_plan(num_rows, weight_VH, softcap)

    def body(dweight_VH: jax.Array, piece: Any) -> tuple[jax.Array, jax.Array | None]:
        hidden_CH, target_C, grad_C, *state_C = piece
        dhidden_CH, dweight = chunk_gradients(
            hidden_CH,
            weight_VH,
            target_C,
            grad_C,
            jnp.ones(target_C.shape, bool),
            RowState(*state_C),
            None,
            dweight_VH,
            plan,
            True,
            num_classes,
        )
        return _unsharded_last(dweight), dhidden_CH

    pieces = (
        _pieces(hidden.reshape(num_rows, hidden.shape[-1]), num_chunks, 0),
        _pieces(target.reshape(-1), num_chunks, IGNORED),
        *(_pieces(x.reshape(-1), num_chunks, 0) for x in (grad, *state)),
    )
    zeros_VH = zeros_for_loop(weight_VH.shape, plan.dtype, hidden, weight_VH, target, grad)
    dweight_VH, dhidden_NCH = lax.scan(body, zeros_VH, pieces)
    return Gradients(_joined(dhidden_NCH, num_rows).reshape(hidden.shape), dweight_VH)


def _unsharded_last(array: Any) -> jax.Array:
    """The array with its last dimension on every device: XLA gathers an FSDP weight, and not its products."""
    free = [P.UNCONSTRAINED] * (array.ndim - 1)
    whole: jax.Array = lax.with_sharding_constraint(array, P(*free, None))
    return whole


def _whole_plan(num_rows: int, weight_VH: jax.Array, softcap: float) -> tuple[int, Plan]:
    """Number of chunks, and a plan with the whole vocabulary as one tile."""
    plan = plan_for(num_rows, weight_VH, softcap)
    mesh = jax.sharding.get_abstract_mesh()
    # XLA spreads each chunk over the devices of the axes that are its own.
    num_devices = max(mesh.size, 1)
    for axis in mesh.manual_axes:
        num_devices //= mesh.shape[axis]
    num_chunks = max(-(-num_rows // (plan.chunk * num_devices)), 1)
    return num_chunks, plan._replace(chunk=-(-num_rows // num_chunks), tile=weight_VH.shape[0], partitioned=True)


def _pieces(rows: jax.Array, num_chunks: int, fill: int) -> jax.Array:
    """[T, ...] as [N, C, ...]: chunk i holds rows i, N + i, 2N + i, ..., so that each has rows of every device."""
    missing = -rows.shape[0] % num_chunks
    if missing:
        rows = jnp.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1), constant_values=fill)
    return jnp.moveaxis(rows.reshape(-1, num_chunks, *rows.shape[1:]), 1, 0)


def _joined(pieces: Any, num_rows: int) -> jax.Array:
    """Undo `_pieces`."""
    rows: jax.Array = jnp.moveaxis(pieces, 0, 1).reshape(-1, *pieces.shape[2:])[:num_rows]
    return rows
