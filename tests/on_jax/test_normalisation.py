"""The results of micro-batches, each divided by the count of the step, add up to those of the full batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given

from helpers.normalisation import assert_adds_up, losses, repeatable, steps


@functools.partial(jax.jit, static_argnames="loss")
def value_and_grads(loss, varied, fixed, upstream):
    value, pull_back = jax.vjp(lambda floats: loss(**floats, **fixed), varied)
    return value, pull_back(upstream.astype(value.dtype))[0]


def call(config, arrays, grad_of, upstream):
    with jax.enable_x64(True):
        varied, fixed = {n: arrays[n] for n in grad_of}, {n: x for n, x in arrays.items() if n not in grad_of}
        value, grads = value_and_grads(config.build(backend="jax:xla"), varied, fixed, jnp.asarray(upstream))
        return {name: np.asarray(x) for name, x in {"loss": value, **grads}.items()}


# One config (with smoothing, z-loss and softcap) and one set of arguments for each loss: any other would be compiled.
@losses()
@repeatable
@given(step=steps(fields=4, optional=True))
def test_calls_add_up(loss, step):
    assert_adds_up(loss, step, call)
