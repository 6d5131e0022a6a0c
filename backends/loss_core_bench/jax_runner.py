"""Measurement on JAX: our losses by flag, the baselines, and without torch the rates of the roofline."""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

import gc
import importlib.metadata
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from loss_core.bench.measure.job import Job, Tiled, count_argument
from loss_core.bench.measure.processes import Prepared, Rates
from loss_core.bench.measure.shards import Arrays
from loss_core.bench.report import BASELINE, ROOFLINE
from loss_core.build import build_loss_module
from loss_core.dispatch.protocol import BackendUnavailable
from loss_core_bench import jax_baselines
from loss_core_bench.runner import RatesRunner, Runner, host_peak, timed_calls
from loss_core_jax.evaluate import as_one

# Mesh axis over which the vocabulary is sharded.
_AXIS = "tp"


def versions() -> dict[str, str]:
    """Versions that timings depend on."""
    return {"jax": jax.__version__, "jaxlib": importlib.metadata.version("jaxlib")}


def device_name(device: str) -> str:
    """The accelerator's name, or "cpu".

    Raises:
        BackendUnavailable: if JAX has no such device.
    """
    return "cpu" if device == "cpu" else str(_device(device).device_kind)


def _device(name: str) -> jax.Device:
    platform, _, index = name.partition(":")
    try:
        return jax.devices(platform)[int(index or 0)]
    except (RuntimeError, IndexError) as error:
        raise BackendUnavailable(f"JAX has no device {name!r} here ({str(error).splitlines()[0]}).") from error


def join(rank: int, ranks: int, rendezvous: str, device: str) -> Mesh | None:
    """Mesh of the devices of all ranks, which this process drives; None for one rank.

    Raises:
        BackendUnavailable: if there are fewer devices than ranks.
    """
    if ranks == 1:
        return None
    devices = jax.devices(device)
    if len(devices) < ranks:
        raise BackendUnavailable(f"{ranks} ranks need {ranks} devices; JAX sees {len(devices)} for device {device!r}.")
    mesh = Mesh(np.array(devices[:ranks]), (_AXIS,))
    # For the life of the process: a loss that shards its own arguments uses the mesh that is set.
    jax.set_mesh(mesh)
    return mesh


def make_runner(job: Job, kind: str, name: str, mesh: Mesh | None) -> Runner:
    """Runner of a flag, a baseline, or the roofline, over the ranks of a mesh."""
    jax.config.update("jax_enable_x64", job.dtype == "float64")
    if mesh is None:
        jax.config.update("jax_default_device", _device(job.device))
    if kind == ROOFLINE:
        return RooflineRunner(job, mesh)
    config: Any = job.loss_config()
    layout = Layout(mesh, job)
    if kind == BASELINE:
        if not layout.even:
            raise BackendUnavailable(
                f"JAX arrays are sharded in equal parts, and {job.tp} does not divide {job.shape[1]}."
            )
        return LossRunner(replace(job, count_known=False), jax_baselines.baseline_loss(name, config, job), "", layout)
    loss = build_loss_module(config if mesh is None else replace(config, tp_group=_AXIS), backend=name)
    choice = getattr(loss, "kernel_choice", None)
    notes = [f"runs {choice.flag}"] if choice is not None and choice.flag != name else []
    if not layout.even:
        notes.append(f"{job.tp} does not divide {job.shape[1]}: takes whole arrays, which it pads and shards itself")
    notes += ["is given num_valid_tokens"] if job.count_known else []
    return LossRunner(job, layout.under_shard_map(loss) if mesh and layout.even else loss, "; ".join(notes), layout)


class Layout:
    """Placement of the arrays of a call: on one device, or sharded over the ranks of a mesh."""

    def __init__(self, mesh: Mesh | None, job: Job) -> None:
        self.mesh = mesh
        self.even = len(set(job.sizes)) == 1
        self.axes = job.definition.vocab_axes

    def spec(self, name: str) -> PartitionSpec:
        """Partition of an argument or its gradient: over the vocabulary if ranks divide it, else replicated."""
        if name not in self.axes or not self.even:
            return PartitionSpec()
        return PartitionSpec(_AXIS) if self.axes[name] == 0 else PartitionSpec(None, _AXIS)

    def sharding(self, name: str) -> NamedSharding | None:
        """Sharding of an argument or its gradient; None for one device."""
        return None if self.mesh is None else NamedSharding(self.mesh, self.spec(name))

    def put(self, name: str, x: jax.Array) -> jax.Array:
        """The argument, placed with its sharding."""
        return x if self.mesh is None else jax.device_put(x, self.sharding(name))

    def under_shard_map(self, loss: Any) -> Any:
        """The loss under shard_map, as in a training step that uses it."""

        def over_ranks(**arguments: jax.Array) -> jax.Array:
            specs = {name: self.spec(name) for name in arguments}
            # One positional dict: shard_map has specs for positional arguments only.
            call = jax.shard_map(
                lambda local: loss(**local), mesh=self.mesh, in_specs=(specs,), out_specs=PartitionSpec()
            )
            value: jax.Array = call(arguments)
            return value

        return over_ranks


def place(tile: Tiled, dtype: str) -> jax.Array:
    """The full array, repeated on the device; integers as int32."""
    block = jnp.asarray(tile.block, dtype if tile.block.dtype.kind == "f" else np.int32)
    size = int(np.prod(tile.shape))
    array: jax.Array = jnp.tile(block, -(-size // len(block)))[:size].reshape(tile.shape)
    return array


class LossRunner:
    """A loss under jit, forward and backward, or forward only."""

    def __init__(self, job: Job, loss: Any, note: str, layout: Layout) -> None:
        self.job = job
        self.note = note
        self.layout = layout
        self.grad_of = job.trained
        self.inputs: dict[str, Any] = {}

        def step(floats: dict[str, jax.Array], others: dict[str, jax.Array], fixed: tuple[tuple[str, int], ...]) -> Any:
            arguments = {**others, **dict(fixed)}
            if job.forward_only:
                return as_one(loss(**floats, **arguments))
            value, vjp_fn = jax.vjp(lambda primals: as_one(loss(**primals, **arguments)), floats)
            return value, vjp_fn(jnp.ones_like(value))[0]

        # A new function per runner, so that none reuses another's compilation: first calls are comparable.
        self.step = jax.jit(step, static_argnums=2, out_shardings=self._out_shardings())

    @property
    def loaded(self) -> bool:
        """Whether the inputs are on the device."""
        return bool(self.inputs)

    def load(self, tiles: Mapping[str, Tiled], labels: NDArray[np.int64]) -> None:
        self.inputs = self._inputs(tiles, labels)
        jax.block_until_ready(self.inputs)

    def unload(self) -> None:
        self.inputs = {}
        gc.collect()

    def evaluate(self, tiles: Mapping[str, Tiled], labels: NDArray[np.int64]) -> Arrays:
        results = self.step(*self._split(self._inputs(tiles, labels)))
        value, grads = (results, {}) if self.job.forward_only else results
        return {name: _to_float64(x) for name, x in {"loss": value, **grads}.items()}

    def prepare(self, tokens: NDArray[np.int64]) -> Prepared:
        start = time.perf_counter()
        result = self._call()
        first = time.perf_counter() - start
        sample = self._sample(result, tokens)
        del result
        return Prepared(first, self._peak(), self.note, sample)

    def _sample(self, result: Any, tokens: NDArray[np.int64]) -> Arrays:
        if self.job.forward_only:
            return {"loss": _to_float64(result)}
        value, grads = result
        sample = {"loss": _to_float64(value), "rows": _to_float64(grads[self.grad_of[0]][tokens])}
        if self.job.definition.products:
            sample["inner"] = np.array([_inner(self.inputs[name], grads[name]) for name in self.grad_of])
        return sample

    def warm_up(self) -> None:
        self._call()

    def round(self, budget: float, max_calls: int) -> list[float]:
        return timed_calls(self._call, budget, max_calls)

    def _out_shardings(self) -> Any:
        """Shardings of the loss and the gradients: those of the inputs, the same for all implementations."""
        loss_sharding = self.layout.sharding("loss")
        if loss_sharding is None or self.job.forward_only:
            return loss_sharding
        return loss_sharding, {name: self.layout.sharding(name) for name in self.grad_of}

    def _inputs(self, tiles: Mapping[str, Tiled], labels: NDArray[np.int64]) -> dict[str, Any]:
        placed: dict[str, Any] = {
            name: self.layout.put(name, place(tile, self.job.dtype)) for name, tile in tiles.items()
        }
        placed["labels"] = self.layout.put("labels", jnp.asarray(labels, jnp.int32))
        return placed | count_argument(self.job, labels)

    def _split(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], tuple[tuple[str, int], ...]]:
        """Inputs with a gradient, the other arrays, and those that are static under jit."""
        fixed = tuple((name, value) for name, value in inputs.items() if isinstance(value, int))
        floats = {name: inputs[name] for name in self.grad_of}
        return floats, {name: inputs[name] for name in inputs if name not in (*floats, *dict(fixed))}, fixed

    def _call(self) -> Any:
        return jax.block_until_ready(self.step(*self._split(self.inputs)))

    def _peak(self) -> int:
        if self.job.device == "cpu" and self.layout.mesh is None:
            return host_peak(self._call)
        # The allocator's peak can't be reset, and the memory of a process with several devices is not that of one.
        # XLA's plan for this program on each device is exact.
        plan = self.step.lower(*self._split(self.inputs)).compile().memory_analysis()
        assert plan is not None, "XLA has a plan on the CPU and on accelerators"
        return int(plan.temp_size_in_bytes + plan.output_size_in_bytes)


class RooflineRunner(RatesRunner):
    """Rates of a copy and of a matrix product on this machine, on arrays of the sizes of the job, up to a limit."""

    _MAX_BYTES, _MAX_TOKENS, _MAX_VOCAB = 2**28, 1024, 8192

    def __init__(self, job: Job, mesh: Mesh | None) -> None:
        self.mesh = mesh
        # All ranks measure at the same time, on arrays of the size of the largest shard.
        self.job = job.of_largest_rank()
        self.loaded = False
        self.negate = jax.jit(jnp.negative)
        self.multiply = jax.jit(lambda hidden_TH, weight_VH: hidden_TH @ weight_VH.T)

    def load(self, tiles: Mapping[str, Tiled], labels: NDArray[np.int64]) -> None:
        self.products: list[tuple[jax.Array, jax.Array]] = []
        if self.job.definition.products:
            tokens, vocab, hidden = self.job.shape
            # The first head, where there are two.
            rows, weight = (argument.name for argument in self.job.definition.inputs[:2])
            hidden_TH = Tiled(tiles[rows].block, (min(tokens, self._MAX_TOKENS), hidden)).full()
            weight_VH = Tiled(tiles[weight].block, (min(vocab, self._MAX_VOCAB), hidden)).full()
            self.products = [
                (self._copy_per_rank(jnp.asarray(hidden_TH, d)), jnp.asarray(weight_VH, d))
                for d in {self.job.dtype, "float32"}
            ]
        size = jnp.dtype(self.job.dtype).itemsize
        length = min(self.job.shape[0] * self.job.shape[1], self._MAX_BYTES // size)
        self.source = self._copy_per_rank(place(Tiled(next(iter(tiles.values())).block, (length,)), self.job.dtype))
        self.loaded = True

    def _copy_per_rank(self, x: jax.Array) -> jax.Array:
        """Copies of an array, concatenated along the first axis and sharded over it: one for each rank."""
        if self.mesh is None:
            return x
        copies = jnp.concatenate([x] * self.mesh.size)
        return jax.device_put(copies, NamedSharding(self.mesh, PartitionSpec(_AXIS)))

    def unload(self) -> None:
        self.products, self.loaded = [], False
        self.source = jnp.zeros(0)

    def round(self, budget: float, max_calls: int) -> Rates:
        """The copy rate in bytes read and written per second, and the product rate in operations per second."""
        ranks = 1 if self.mesh is None else self.mesh.size
        num_bytes = 2 * self.source.nbytes / ranks
        copy_times = timed_calls(lambda: jax.block_until_ready(self.negate(self.source)), budget, max_calls)
        rates = [0.0]
        for a, b in self.products:
            times = timed_calls(lambda a=a, b=b: jax.block_until_ready(self.multiply(a, b)), budget, max_calls)  # type: ignore[misc]
            rates.append(2 * a.size / ranks * b.shape[0] / float(np.median(times)))
        return Rates(num_bytes / float(np.median(copy_times)), max(rates))


def _inner(x: jax.Array, y: jax.Array) -> float:
    """Inner product, in float32 within a block of rows, summed over the blocks in float64."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    blocks = range(0, len(x), 1024)
    return sum(float(jnp.vdot(x[i : i + 1024].astype(wide), y[i : i + 1024].astype(wide))) for i in blocks)


def _to_float64(x: jax.Array) -> NDArray[np.float64]:
    return np.asarray(x).astype(np.float64)
