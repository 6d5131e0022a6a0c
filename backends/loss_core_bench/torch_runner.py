"""Measurement on PyTorch, CPU and CUDA: our losses by flag, the baselines, and the rates of the roofline."""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

import functools
import gc
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from loss_core.bench.measure.job import Job, Tiled, count_argument
from loss_core.bench.measure.processes import Prepared, Rates
from loss_core.bench.measure.shards import Arrays
from loss_core.bench.report import BASELINE, ROOFLINE
from loss_core.bench.tables import time_text
from loss_core.build import build_loss_module
from loss_core.dispatch.protocol import BackendUnavailable
from loss_core_bench import torch_baselines
from loss_core_bench.cuda_times import cuda_times, host_seconds
from loss_core_bench.runner import RatesRunner, Runner, host_peak, timed, timed_calls
from loss_core_bench.torch_inputs import DTYPES, place, place_columns
from loss_core_bench.torch_ranks import Ranks, join
from loss_core_torch.evaluate import as_one
from loss_core_torch.kernels.eager.products import Products

__all__ = ["device_name", "join", "make_runner", "versions"]


def versions() -> dict[str, str]:
    """Versions that timings depend on."""
    result = {"torch": str(torch.__version__)}
    if torch.version.cuda:
        result["cuda"] = torch.version.cuda
    return result


def device_name(device: str) -> str:
    """The accelerator's name, or "cpu".

    Raises:
        BackendUnavailable: if torch has no such device.
    """
    if device == "cpu":
        return "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BackendUnavailable(f"torch has no device {device!r} here ({str(error).splitlines()[0]}).") from error
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def make_runner(job: Job, kind: str, name: str, ranks: Ranks) -> Runner:
    """Runner of a flag, a baseline, or the roofline, for the rank of this process."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if kind == ROOFLINE:
        return RooflineRunner(job, ranks)
    config: Any = job.loss_config()
    if kind == BASELINE:
        return LossRunner(replace(job, count_known=False), torch_baselines.candidates(name, config, job), ranks)
    if ranks.world_size > 1:
        config = replace(config, tp_group=dist.group.WORLD)
    loss = build_loss_module(config, backend=name)
    choice = getattr(loss, "kernel_choice", None)
    notes = [f"runs {choice.flag}"] if choice is not None and choice.flag != name else []
    notes += ["is given num_valid_tokens"] if job.count_known else []
    return LossRunner(job, [("; ".join(notes), loss)], ranks)


class LossRunner:
    """A loss, forward and backward, or forward only; over ranks, on one rank's shard."""

    def __init__(self, job: Job, candidates: torch_baselines.Candidates, ranks: Ranks) -> None:
        self.job = job
        self.ranks = ranks
        self.device = ranks.device(job.device)
        self.candidates = candidates
        self.note, self.loss = candidates[0]
        self.grad_of = job.trained
        self.input_sets: list[dict[str, Any]] = []
        self.set_index = 0

    @property
    def loaded(self) -> bool:
        """Whether the inputs are on the device."""
        return bool(self.input_sets)

    def load(self, tiles: Mapping[str, Tiled], labels: NDArray[np.int64]) -> None:
        first = self._inputs(tiles, labels)
        self.input_sets = [first]
        if self._on_cuda:
            # Inputs that fit the L2 cache would be read from it: rotate among copies that exceed it.
            size = sum(x.numel() * x.element_size() for x in first.values() if isinstance(x, Tensor))
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            self.input_sets += [self._inputs(tiles, labels) for _ in range(min(int(3 * cache // size), 64))]

    def unload(self) -> None:
        self.input_sets = []
        gc.collect()
        if self._on_cuda:
            torch.cuda.empty_cache()

    def evaluate(self, tiles: Mapping[str, Tiled], labels: NDArray[np.int64]) -> Arrays:
        inputs = self._inputs(tiles, labels)
        if self.job.forward_only:
            with torch.no_grad():
                return {"loss": _to_numpy(as_one(self.loss(**inputs)))}
        value, grads = self._forward_backward(inputs)
        return {"loss": _to_numpy(value), **{name: _to_numpy(g) for name, g in zip(self.grad_of, grads, strict=True)}}

    def prepare(self, tokens: NDArray[np.int64]) -> Prepared:
        self.ranks.all_ready(True)
        start = time.perf_counter()
        result = self._call()
        first = time.perf_counter() - start
        if len(self.candidates) > 1:
            self.note, self.loss = min(self.candidates, key=self._time_second_call)
            result = self._call()
        sample = self._sample(result, tokens)
        del result
        if self._on_cuda:
            host = f"host {time_text(host_seconds(self._step))}"
            self.note = f"{self.note}; {host}" if self.note else host
        return Prepared(first, self._peak(), self.note, sample)

    def _sample(self, result: Any, tokens: NDArray[np.int64]) -> Arrays:
        if self.job.forward_only:
            return {"loss": _to_numpy(result)}
        value, grads = result
        rows = grads[0][torch.from_numpy(tokens).to(self.device)]
        sample = {"loss": _to_numpy(value), "rows": _to_numpy(rows)}
        if self.job.definition.products:
            inputs = self.input_sets[self.set_index]
            pairs = zip(self.grad_of, grads, strict=True)
            sample["inner"] = np.array([_inner(inputs[name].detach(), grad) for name, grad in pairs])
        return sample

    def _time_second_call(self, candidate: tuple[str, torch_baselines.Loss]) -> float:
        _, self.loss = candidate
        self._call()
        return timed(self._call)

    def warm_up(self) -> None:
        self._call()

    def round(self, budget: float, max_calls: int) -> list[float]:
        if not self._on_cuda:
            return timed_calls(self._call, budget, max_calls, self.ranks.all_ready)
        return cuda_times(self._step, budget, max_calls, self.ranks, self.device)

    @property
    def _on_cuda(self) -> bool:
        return self.job.device.startswith("cuda")

    def _inputs(self, tiles: Mapping[str, Tiled], labels: NDArray[np.int64]) -> dict[str, Any]:
        dtype = DTYPES[self.job.dtype]
        inputs: dict[str, Any] = {name: self._shard(name, tile, dtype) for name, tile in tiles.items()}
        if not self.job.forward_only:
            for name in self.grad_of:
                inputs[name].requires_grad_()
        inputs["labels"] = torch.from_numpy(labels).to(self.device)
        return inputs | count_argument(self.job, labels)

    def _shard(self, name: str, tile: Tiled, dtype: torch.dtype) -> Tensor:
        """This rank's shard of an input."""
        axis = self.job.definition.vocab_axes.get(name)
        if self.ranks.world_size == 1 or axis is None:
            return place(tile, dtype, self.device)
        start = sum(self.job.sizes[: self.ranks.rank])
        stop = start + self.job.sizes[self.ranks.rank]
        if axis == 0:
            return place(tile.row_range(start, stop), dtype, self.device)
        return place_columns(tile, start, stop, dtype, self.device)

    def _step(self) -> Any:
        """One call on the next set of inputs; does not wait for the device."""
        self.set_index = (self.set_index + 1) % len(self.input_sets)
        inputs = self.input_sets[self.set_index]
        if self.job.forward_only:
            with torch.no_grad():
                return self.loss(**inputs)
        return self._forward_backward(inputs)

    def _call(self) -> Any:
        result = self._step()
        if self._on_cuda:
            torch.cuda.synchronize(self.device)
        return result

    def _forward_backward(self, inputs: dict[str, Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
        value = as_one(self.loss(**inputs))
        upstream = None if value.dim() == 0 else torch.ones_like(value)
        return value, torch.autograd.grad(value, [inputs[name] for name in self.grad_of], upstream)

    def _peak(self) -> int:
        if not self._on_cuda:
            return host_peak(self._call)
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self._call()
        return torch.cuda.max_memory_allocated(self.device) - before


# By device type: bytes of a copy, rows and columns of a product, beyond which the rates do not grow.
_MAX_SIZES = {"cpu": (2**28, 1024, 8192), "cuda": (2**30, 8192, 32768)}


class RooflineRunner(RatesRunner):
    """Rates of a copy and of a matrix product on this machine, on arrays of the sizes of the job, up to a limit."""

    def __init__(self, job: Job, ranks: Ranks) -> None:
        # All ranks measure at the same time, on arrays of the size of the largest shard.
        self.job = job.of_largest_rank()
        self.ranks = ranks
        self.device = ranks.device(job.device)
        self.device_type = "cuda" if job.device.startswith("cuda") else "cpu"
        self.max_bytes, self.max_tokens, self.max_vocab = _MAX_SIZES[self.device_type]
        self.loaded = False

    def load(self, tiles: Mapping[str, Tiled], labels: NDArray[np.int64]) -> None:
        job = self.job
        # On a CPU without 16-bit matrix units float32 is faster: the roofline uses the faster of the two.
        dtypes = {DTYPES[job.dtype]} | ({torch.float32} if self.device_type == "cpu" else set())
        self.products: list[tuple[Tensor, Tensor]] = []
        if job.definition.products:
            tokens, vocab, hidden = job.shape
            # The first head, where there are two.
            rows, weight = (argument.name for argument in job.definition.inputs[:2])
            hidden_TH = place(Tiled(tiles[rows].block, (min(tokens, self.max_tokens), hidden)),
                               torch.float32, self.device)  # fmt: skip
            weight_VH = place(Tiled(tiles[weight].block, (min(vocab, self.max_vocab), hidden)),
                               torch.float32, self.device)  # fmt: skip
            self.products = [(hidden_TH.to(d), weight_VH.to(d)) for d in dtypes]
        size = torch.empty(0, dtype=DTYPES[job.dtype]).element_size()
        length = min(job.shape[0] * job.shape[1], self.max_bytes // size)
        name = next(iter(tiles))
        self.source = place(Tiled(tiles[name].block, (length,)), DTYPES[job.dtype], self.device)
        self.target = torch.zeros_like(self.source)
        self.loaded = True

    def unload(self) -> None:
        self.products, self.loaded = [], False
        self.source = self.target = torch.empty(0)
        if self.device_type == "cuda":
            torch.cuda.empty_cache()

    def round(self, budget: float, max_calls: int) -> Rates:
        """The copy rate in bytes read and written per second, and the product rate in operations per second."""
        num_bytes = 2 * self.source.numel() * self.source.element_size()
        copy_seconds = self._seconds(lambda: self.target.copy_(self.source), budget, max_calls)
        rates = [0.0]
        for hidden_TH, weight_VH in self.products:
            operations = 2 * hidden_TH.numel() * weight_VH.shape[0]
            # The roofline is that of the machine, not of the library that PyTorch uses by default.
            for multiply in (torch.mm, Products(hidden_TH.dtype, hidden_TH.device).new):
                step = functools.partial(multiply, hidden_TH, weight_VH.T)
                rates.append(operations / self._seconds(step, budget, max_calls))
        return Rates(num_bytes / copy_seconds, max(rates))

    def _seconds(self, step: Callable[[], Any], budget: float, max_calls: int) -> float:
        if self.device_type == "cuda":
            return float(np.median(cuda_times(step, budget, max_calls, self.ranks, self.device)))
        return float(np.median(timed_calls(step, budget, max_calls, self.ranks.all_ready)))


def _inner(x: Tensor, y: Tensor) -> float:
    """The inner product in float64, block by block."""
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(x.split(1024), y.split(1024), strict=True))


def _to_numpy(x: Tensor) -> NDArray[np.float64]:
    return x.detach().to(device="cpu", dtype=torch.float64).numpy()
