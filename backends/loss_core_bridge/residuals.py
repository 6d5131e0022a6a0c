"""Forward and backward of a JAX loss as two compiled programs, with as little as possible between them.

`jax.vjp`'s closure is a pytree of residuals and can cross `jax.jit`, but a residual that is an input
(the logits, usually) would come out as a copy of it: jit does not forward inputs to outputs. So the
residuals that are an input, or one reshaped or converted, are not returned at all; the backward
program makes them again from the inputs, which the caller still holds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jax_core

# One operand, no arithmetic: cheaper to do again than to keep the result. By name, because the
# primitives' modules are not public.
_REPEATED = frozenset(
    {"broadcast_in_dim", "convert_element_type", "copy", "reshape", "squeeze", "stop_gradient", "transpose"}
)


@dataclass(frozen=True)
class _Rebuilt:
    """A residual that backward makes from an input."""

    argument: str
    equations: tuple[Any, ...]


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class Plan:
    """How backward puts the residuals together. Made once per trace, static to both programs.

    Attributes:
        inputs: names of the arguments that backward needs.
        treedef: of the vjp closure.
        rebuilt: for each residual, how to make it; None when forward returns it.
    """

    inputs: tuple[str, ...]
    treedef: Any
    rebuilt: tuple[_Rebuilt | None, ...]


@functools.partial(jax.jit, static_argnums=(0, 1))
def value(loss: Callable[..., Any], static: tuple[tuple[str, Any], ...], arrays: Mapping[str, jax.Array]) -> jax.Array:
    """The loss alone."""
    return _checked(loss, loss(**arrays, **dict(static)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_residuals(
    loss: Callable[..., Any],
    static: tuple[tuple[str, Any], ...],
    wanted: Mapping[str, jax.Array],
    others: Mapping[str, jax.Array],
) -> tuple[jax.Array, list[jax.Array], Plan]:
    """The loss, and what `gradients` needs to differentiate it by `wanted`.

    Args:
        loss: hashable callable.
        static: arguments that are no arrays, as sorted (name, value) pairs.
    """
    treedefs: list[Any] = []

    def forward(wanted: Mapping[str, jax.Array], others: Mapping[str, jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        def of_wanted(arrays: Mapping[str, jax.Array]) -> jax.Array:
            return _checked(loss, loss(**arrays, **others, **dict(static)))

        result, vjp = jax.vjp(of_wanted, wanted)
        leaves, treedef = jax.tree.flatten(vjp)
        treedefs.append(treedef)
        return result, leaves

    closed = jax.make_jaxpr(forward)(wanted, others)
    # Dicts flatten in sorted order.
    names = (*sorted(wanted), *sorted(others))
    rebuilt = tuple(_from_input(closed.jaxpr, var, names) for var in closed.jaxpr.outvars[1:])
    plan = Plan(
        inputs=tuple(sorted({r.argument for r in rebuilt if r is not None})),
        treedef=treedefs[-1],
        rebuilt=rebuilt,
    )
    result, *leaves = jax_core.jaxpr_as_fun(closed)(*jax.tree.leaves((wanted, others)))
    return result, [leaf for leaf, how in zip(leaves, rebuilt, strict=True) if how is None], plan


@functools.partial(jax.jit, static_argnums=0)
def gradients(
    plan: Plan, inputs: Sequence[jax.Array], kept: Sequence[jax.Array], upstream: jax.Array
) -> dict[str, jax.Array]:
    """Gradient by name of each argument that was `wanted`.

    Args:
        inputs: the arguments named by `plan.inputs`, unchanged since the forward.
        kept: the residuals that `value_and_residuals` returned.
        upstream: gradient of the loss, of its shape and dtype.
    """
    arguments = dict(zip(plan.inputs, inputs, strict=True))
    remaining = iter(kept)
    leaves = [next(remaining) if how is None else _rebuild(how, arguments) for how in plan.rebuilt]
    (grads,) = jax.tree.unflatten(plan.treedef, leaves)(upstream)
    return dict(grads)


def _from_input(jaxpr: Any, var: Any, names: tuple[str, ...]) -> _Rebuilt | None:
    """The way from an argument to `var`, when it is one of `_REPEATED` steps only."""
    if isinstance(var, jax_core.Literal):
        return None
    producers = {out: equation for equation in jaxpr.eqns for out in equation.outvars}
    equations: list[Any] = []
    while var in producers:
        equation = producers[var]
        if equation.primitive.name not in _REPEATED or len(equation.invars) != 1:
            return None
        equations.append(equation)
        (var,) = equation.invars
        if isinstance(var, jax_core.Literal):
            return None
    if var not in jaxpr.invars:
        return None
    return _Rebuilt(names[jaxpr.invars.index(var)], tuple(reversed(equations)))


def _rebuild(how: _Rebuilt, arguments: Mapping[str, jax.Array]) -> Any:
    array: Any = arguments[how.argument]
    for equation in how.equations:
        array = equation.primitive.bind(array, **equation.params)
    return array


def _checked(loss: Callable[..., Any], result: Any) -> jax.Array:
    if not isinstance(result, jax.Array) or not jnp.issubdtype(result.dtype, jnp.floating):
        what = f"an array of {result.dtype}" if isinstance(result, jax.Array) else f"a {type(result).__name__}"
        raise TypeError(f"The loss {loss!r} returned {what}; the bridge takes losses that return one floating array.")
    return result
