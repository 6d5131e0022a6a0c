"""Measuring on JAX: our losses by flag, the peers, and the rates of the floor where torch is not installed."""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

import gc
import importlib.metadata
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from loss_core.bench_job import GRADS, Job, Tiled, kind_of
from loss_core.build import build_loss_module
from loss_core_bench import jax_peers
from loss_core_bench.runner import Runner, Unusable, host_peak, timed, timed_calls


def versions() -> dict[str, str]:
    """Versions that a time depends on."""
    return {"jax": jax.__version__, "jaxlib": importlib.metadata.version("jaxlib")}


def device_name(device: str) -> str:
    """The accelerator's name, or "cpu".

    Raises:
        Unusable: JAX sees no such device.
    """
    return "cpu" if device == "cpu" else str(_device(device).device_kind)


def _device(name: str) -> jax.Device:
    platform, _, index = name.partition(":")
    try:
        return jax.devices(platform)[int(index or 0)]
    except (RuntimeError, IndexError) as error:
        raise Unusable(f"JAX has no device {name!r} here ({str(error).splitlines()[0]}).") from error


def make_runner(job: Job, kind: str, name: str) -> Runner:
    """The runner of a flag, a peer, or the floor."""
    jax.config.update("jax_enable_x64", job.dtype == "float64")
    jax.config.update("jax_default_device", _device(job.device))
    if kind == "floor":
        return FloorRunner(job)
    config = job.loss_config()
    if kind == "peer":
        return LossRunner(job, jax_peers.peer_loss(name, config, job), "")
    loss = build_loss_module(config, backend=name)
    choice = getattr(loss, "kernel_choice", None)
    return LossRunner(job, loss, f"runs {choice.flag}" if choice is not None and choice.flag != name else "")


def _place(tile: Tiled, dtype: str) -> jax.Array:
    """The whole array, repeated on the device."""
    block = jnp.asarray(tile.block, dtype)
    size = int(np.prod(tile.shape))
    whole: jax.Array = jnp.tile(block, -(-size // len(block)))[:size].reshape(tile.shape)
    return whole


class LossRunner:
    """A loss under jit, forward and backward, or forward only."""

    def __init__(self, job: Job, loss: Any, note: str) -> None:
        self.job = job
        self.note = note
        self.grad_of = GRADS[kind_of(job.loss_config())]
        self.inputs: dict[str, Any] = {}

        def step(floats: dict[str, jax.Array], others: dict[str, jax.Array]) -> Any:
            if job.forward_only:
                return loss(**floats, **others)
            value, pull_back = jax.vjp(lambda varied: loss(**varied, **others), floats)
            return value, pull_back(jnp.ones_like(value))[0]

        # A new function, so that every runner compiles its own: first calls are comparable.
        self.step = jax.jit(step)

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

    def evaluate(self, tiles: Mapping[str, Tiled], labels: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        results = self.step(*self._split(self._inputs(tiles, labels)))
        value, grads = (results, {}) if self.job.forward_only else results
        return {name: _to_float64(x) for name, x in {"loss": value, **grads}.items()}

    def prepare(self, tokens: NDArray[np.int64]) -> tuple[dict[str, Any], dict[str, NDArray[np.float64]]]:
        start = time.perf_counter()
        result = self._call()
        first = time.perf_counter() - start
        sample = self._sample(result, tokens)
        del result
        return {"first_call": first, "peak": self._peak(), "note": self.note}, sample

    def _sample(self, result: Any, tokens: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        if self.job.forward_only:
            return {"loss": _to_float64(result)}
        value, grads = result
        sample = {"loss": _to_float64(value), "rows": _to_float64(grads[self.grad_of[0]][tokens])}
        if len(grads) > 1:
            sample["inner"] = np.array([_inner(self.inputs[name], grads[name]) for name in self.grad_of])
        return sample

    def warm_up(self) -> None:
        self._call()

    def round(self, budget: float, most: int) -> dict[str, Any]:
        return {"seconds": timed_calls(self._call, budget, most)}

    def _inputs(self, tiles: Mapping[str, Tiled], labels: NDArray[np.int64]) -> dict[str, Any]:
        placed: dict[str, Any] = {name: _place(tile, self.job.dtype) for name, tile in tiles.items()}
        placed["labels"] = jnp.asarray(labels, jnp.int32)
        return placed

    def _split(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        floats = {name: inputs[name] for name in self.grad_of}
        return floats, {name: value for name, value in inputs.items() if name not in floats}

    def _call(self) -> Any:
        return jax.block_until_ready(self.step(*self._split(self.inputs)))

    def _peak(self) -> int:
        if self.job.device == "cpu":
            return host_peak(self._call)
        # The allocator's mark can't be set back; what XLA planned for this program is exact.
        plan = self.step.lower(*self._split(self.inputs)).compile().memory_analysis()
        assert plan is not None, "XLA on accelerators has a plan"
        return int(plan.temp_size_in_bytes + plan.output_size_in_bytes)


class FloorRunner:
    """How fast this machine copies and multiplies, on arrays of the size of the job's."""

    _MOST_BYTES, _MOST_TOKENS, _MOST_VOCAB = 2**28, 1024, 8192

    def __init__(self, job: Job) -> None:
        self.job = job
        self.loaded = False
        self.negate = jax.jit(jnp.negative)
        self.multiply = jax.jit(lambda hidden_TH, weight_VH: hidden_TH @ weight_VH.T)

    def load(self, tiles: Mapping[str, Tiled], labels: NDArray[np.int64]) -> None:
        self.products: list[tuple[jax.Array, jax.Array]] = []
        if len(self.job.shape) == 3:
            tokens, vocab, hidden = self.job.shape
            hidden_TH = Tiled(tiles["hidden_states"].block, (min(tokens, self._MOST_TOKENS), hidden)).full()
            weight_VH = Tiled(tiles["lm_weight"].block, (min(vocab, self._MOST_VOCAB), hidden)).full()
            self.products = [
                (jnp.asarray(hidden_TH, d), jnp.asarray(weight_VH, d)) for d in {self.job.dtype, "float32"}
            ]
        size = jnp.dtype(self.job.dtype).itemsize
        length = min(self.job.shape[0] * self.job.shape[1], self._MOST_BYTES // size)
        self.source = _place(Tiled(next(iter(tiles.values())).block, (length,)), self.job.dtype)
        self.loaded = True

    def unload(self) -> None:
        self.products, self.loaded = [], False
        self.source = jnp.zeros(0)

    def evaluate(self, tiles: Mapping[str, Tiled], labels: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        return {}

    def prepare(self, tokens: NDArray[np.int64]) -> tuple[dict[str, Any], dict[str, NDArray[np.float64]]]:
        return {"first_call": timed(self.warm_up), "peak": 0, "note": ""}, {}

    def warm_up(self) -> None:
        self.round(0.0, 1)

    def round(self, budget: float, most: int) -> dict[str, Any]:
        """The copy rate in bytes read and written per second, the product rate in operations per second."""
        moved = 2 * self.source.nbytes
        seconds = timed_calls(lambda: jax.block_until_ready(self.negate(self.source)), budget, most)
        rates = [0.0]
        for a, b in self.products:
            times = timed_calls(lambda a=a, b=b: jax.block_until_ready(self.multiply(a, b)), budget, most)  # type: ignore[misc]
            rates.append(2 * a.size * b.shape[0] / float(np.median(times)))
        return {"copy_rate": moved / float(np.median(seconds)), "product_rate": max(rates)}


def _inner(x: jax.Array, y: jax.Array) -> float:
    """The inner product, block by block in float32, the blocks added in float64."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    blocks = range(0, len(x), 1024)
    return sum(float(jnp.vdot(x[i : i + 1024].astype(wide), y[i : i + 1024].astype(wide))) for i in blocks)


def _to_float64(x: jax.Array) -> NDArray[np.float64]:
    return np.asarray(x).astype(np.float64)
