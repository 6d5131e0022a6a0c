"""Calls with a sharded vocabulary for `loss_core check --tp`: all ranks are CPU devices of one process."""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from loss_core.dispatch.protocol import Evaluation, RankSetup
from loss_core.workers.ranks import Request
from loss_core.workers.vocab_split import shard, vocab_axes
from loss_core_jax.evaluate import as_one, to_float64, to_jax
from loss_core_jax.kernels import kernels_in

_AXIS = "tp"


def rank_setup(ranks: int) -> RankSetup:
    """One process for all ranks. No custom splits: JAX pads a vocabulary that is not divisible by the ranks."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={ranks}"
    return RankSetup(1, {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, ("whole", "even", "uneven"))


def join_ranks(rank: int, ranks: int, folder: Path) -> None:
    """RuntimeError unless JAX has a CPU device for each rank."""
    if len(jax.devices("cpu")) < ranks:
        raise RuntimeError(f"JAX shows {len(jax.devices('cpu'))} CPU devices where {ranks} were asked for.")


def evaluate_shards(request: Request) -> list[Evaluation]:
    """Every rank's part of a call.

    Even shards go through `jax.shard_map`, as in a training step written with it. With uneven ones, the loss gets the
    full arrays, and pads and shards them itself.
    """
    ranks = len(request.sizes)
    mesh = Mesh(np.array(jax.devices("cpu")[:ranks]), (_AXIS,))
    config: Any = replace(request.config, tp_group=_AXIS)
    with jax.enable_x64(request.dtype == "float64"), jax.set_mesh(mesh):
        loss = config.build(backend=request.flag)
        axes = vocab_axes(request.config)
        # The arguments that the loss gets as shards.
        sharded = tuple(axes.items()) if len(set(request.sizes)) == 1 else ()
        inputs = {
            name: jax.device_put(
                to_jax(array, request.dtype), NamedSharding(mesh, _spec(name, np.ndim(array), sharded))
            )
            for name, array in request.arrays.items()
        }
        differentiated = {name: inputs.pop(name) for name in request.grad_of}

        upstream = None if request.upstream is None else jnp.asarray(request.upstream)
        arguments = (differentiated, inputs, upstream)
        program = _value_and_grads.lower(loss, *arguments, sharded).compile()
        value, grads = program(*arguments)
        copies = {name: _per_rank(x, mesh) for name, x in {"loss": value, **grads}.items()}
        dtypes = {name: str(x.dtype) for name, x in {"loss": value, **grads}.items()}
        return [
            Evaluation(
                loss=copies["loss"][rank],
                grads={
                    name: shard(axes[name], to_float64(grads[name]), request.sizes, rank)
                    if name in axes
                    else copies[name][rank]
                    for name in request.grad_of
                },
                dtypes=dtypes,
                mutated=(),  # a jax.Array can't be changed
                kernel=kernels_in(program),
            )
            for rank in range(ranks)
        ]


def _spec(name: str, ndim: int, sharded: tuple[tuple[str, int], ...]) -> PartitionSpec:
    if name not in dict(sharded):
        return PartitionSpec()
    axes: list[str | None] = [None] * ndim
    axes[dict(sharded)[name]] = _AXIS
    return PartitionSpec(*axes)


# Under jit, so that calls of a loss with the same shapes share a program: compilation takes most of the time here.
@functools.partial(jax.jit, static_argnames=("loss", "sharded"))
def _value_and_grads(
    loss: Any,
    differentiated: dict[str, jax.Array],
    fixed: dict[str, jax.Array],
    upstream: jax.Array | None,
    sharded: tuple[tuple[str, int], ...],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    def call(differentiated: dict[str, jax.Array], fixed: dict[str, jax.Array]) -> jax.Array:
        return as_one(loss(**differentiated, **fixed))

    if sharded:
        in_specs = tuple(
            {name: _spec(name, x.ndim, sharded) for name, x in args.items()} for args in (differentiated, fixed)
        )
        call = jax.shard_map(call, in_specs=in_specs, out_specs=PartitionSpec())
    value, pull_back = jax.vjp(lambda floats: call(floats, fixed), differentiated)
    seed = jnp.ones(value.shape) if upstream is None else upstream
    return value, pull_back(seed.astype(value.dtype))[0]


def _per_rank(x: jax.Array, mesh: Mesh) -> list[np.ndarray]:
    """Each device's copy of a replicated array."""
    copies = {piece.device: to_float64(piece.data) for piece in x.addressable_shards}
    return [copies.get(device, next(iter(copies.values()))) for device in mesh.devices.flat]
