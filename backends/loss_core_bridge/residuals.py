"""Forward and backward of a JAX loss as two compiled programs, with the fewest residuals between them.

`jax.vjp`'s closure is a pytree of residuals that `jax.jit` can return, but a residual that is an input (the logits,
usually) would be returned as a copy of it: jit does not alias outputs to inputs. So the forward does not return the
residuals that are an input, or one reshaped or converted; the backward program recomputes them from the inputs, which
the caller still has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jax_core

# Primitives of one operand, without arithmetic: cheaper to recompute than to save. By name, because the
# primitives' modules are not public.
_RECOMPUTED = frozenset(
    {"broadcast_in_dim", "convert_element_type", "copy", "reshape", "squeeze", "stop_gradient", "transpose"}
)


@dataclass(frozen=True)
class _Recomputed:
    """A residual that backward recomputes from an input."""

    argument: str
    equations: tuple[Any, ...]


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class Plan:
    """How backward assembles the residuals. Computed once per trace, static in both programs.

    Attributes:
        inputs: names of the arguments that backward needs.
        treedef: of the vjp closure.
        recomputed: for each residual, how to recompute it; None if forward returns it.
    """

    inputs: tuple[str, ...]
    treedef: Any
    recomputed: tuple[_Recomputed | None, ...]


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
    """The loss, the residuals to save, and the plan by which `gradients` computes the gradients of `wanted`.

    Args:
        loss: hashable callable.
        static: arguments that are not arrays, as sorted (name, value) pairs.
        wanted, others: arrays to differentiate, and all other arrays, by name.
    """
    treedefs: list[Any] = []

    def forward(wanted: Mapping[str, jax.Array], others: Mapping[str, jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        def loss_fn(arrays: Mapping[str, jax.Array]) -> jax.Array:
            return _checked(loss, loss(**arrays, **others, **dict(static)))

        result, vjp = jax.vjp(loss_fn, wanted)
        leaves, treedef = jax.tree.flatten(vjp)
        treedefs.append(treedef)
        return result, leaves

    closed = jax.make_jaxpr(forward)(wanted, others)
    # Dicts flatten in sorted order.
    names = (*sorted(wanted), *sorted(others))
    recomputed = tuple(_from_input(closed.jaxpr, var, names) for var in closed.jaxpr.outvars[1:])
    plan = Plan(
        inputs=tuple(sorted({r.argument for r in recomputed if r is not None})),
        treedef=treedefs[-1],
        recomputed=recomputed,
    )
    result, *leaves = jax_core.jaxpr_as_fun(closed)(*jax.tree.leaves((wanted, others)))
    return result, [leaf for leaf, recipe in zip(leaves, recomputed, strict=True) if recipe is None], plan


@functools.partial(jax.jit, static_argnums=0)
def gradients(
    plan: Plan, inputs: Sequence[jax.Array], saved: Sequence[jax.Array], upstream: jax.Array
) -> dict[str, jax.Array]:
    """Gradients of the `wanted` arguments, by name.

    Args:
        inputs: the arguments named by `plan.inputs`, unchanged since the forward.
        saved: the residuals that `value_and_residuals` returned.
        upstream: gradient of the loss, of its shape and dtype.
    """
    arguments = dict(zip(plan.inputs, inputs, strict=True))
    remaining = iter(saved)
    leaves = [next(remaining) if recipe is None else _recompute(recipe, arguments) for recipe in plan.recomputed]
    (grads,) = jax.tree.unflatten(plan.treedef, leaves)(upstream)
    return dict(grads)


def _from_input(jaxpr: Any, var: Any, names: tuple[str, ...]) -> _Recomputed | None:
    """How to recompute `var` from an argument, if `_RECOMPUTED` primitives suffice; else None."""
    if isinstance(var, jax_core.Literal):
        return None
    producers = {out: equation for equation in jaxpr.eqns for out in equation.outvars}
    equations: list[Any] = []
    while var in producers:
        equation = producers[var]
        if equation.primitive.name not in _RECOMPUTED or len(equation.invars) != 1:
            return None
        equations.append(equation)
        (var,) = equation.invars
        if isinstance(var, jax_core.Literal):
            return None
    if var not in jaxpr.invars:
        return None
    return _Recomputed(names[jaxpr.invars.index(var)], tuple(reversed(equations)))


def _recompute(recipe: _Recomputed, arguments: Mapping[str, jax.Array]) -> Any:
    array: Any = arguments[recipe.argument]
    for equation in recipe.equations:
        array = equation.primitive.bind(array, **equation.params)
    return array


def _checked(loss: Callable[..., Any], result: Any) -> jax.Array:
    if not isinstance(result, jax.Array) or not jnp.issubdtype(result.dtype, jnp.floating):
        what = f"an array of {result.dtype}" if isinstance(result, jax.Array) else f"a {type(result).__name__}"
        raise TypeError(f"The loss {loss!r} returned {what}; the bridge takes losses that return one floating array.")
    return result
