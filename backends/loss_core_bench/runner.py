"""What the worker asks of a runner, whatever the framework; timing and memory that both frameworks share."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from loss_core.bench.measure.job import Tiled
from loss_core.bench.measure.processes import Prepared, Rates
from loss_core.bench.measure.shards import Arrays


class Runner(Protocol):
    """One implementation, ready to be measured."""

    @property
    def loaded(self) -> bool:
        """Whether the inputs are on the device."""
        ...

    def evaluate(self, tiles: Mapping[str, Tiled], labels: NDArray[np.int64]) -> Arrays:
        """Loss and gradients ("loss", and by argument name) of one call."""
        ...

    def load(self, tiles: Mapping[str, Tiled], labels: NDArray[np.int64]) -> None:
        """Put the inputs on the device."""
        ...

    def unload(self) -> None:
        """Take them away again."""
        ...

    def prepare(self, tokens: NDArray[np.int64]) -> Prepared:
        """The first calls at the full shape; `tokens` are those whose gradients are kept."""
        ...

    def warm_up(self) -> None:
        """One call that is not timed."""
        ...

    def round(self, budget: float, most: int) -> list[float] | Rates:
        """Seconds of timed calls; of the roofline the rates."""
        ...


class MeasuresRates:
    """What is no loss: a `Runner` but for `load`, `unload` and `round`."""

    def evaluate(self, tiles: Mapping[str, Tiled], labels: NDArray[np.int64]) -> Arrays:
        return {}

    def prepare(self, tokens: NDArray[np.int64]) -> Prepared:
        return Prepared(timed(self.warm_up), 0, "", {})

    def warm_up(self) -> None:
        self.round(0.0, 1)

    def round(self, budget: float, most: int) -> Rates:
        raise NotImplementedError


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call; what it returns is freed outside of the time."""
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result
    return seconds


def timed_calls(call: Callable[[], Any], budget: float, most: int, ready: Callable[[bool], bool] = bool) -> list[float]:
    """Seconds of each call, as many as fit the budget, at least one.

    Args:
        ready: asked before each call with whether this process wants it; over ranks it waits for the others, and gives
            all of them the same answer.
    """
    gc.collect()
    seconds: list[float] = []
    end = time.perf_counter() + budget
    while ready(not seconds or (len(seconds) < most and time.perf_counter() < end)):
        seconds.append(timed(call))
    return seconds


def host_peak(call: Callable[[], Any]) -> int:
    """Most memory of this process during a call, above what it held before, in bytes.

    On Linux the high-water mark of resident memory, which is set back first. Elsewhere it can't be set back, and
    the growth of the mark of the whole life is a lower bound.
    """
    gc.collect()
    if sys.platform != "linux":
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        del_result(call())
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # so that what is free counts as free
    Path("/proc/self/clear_refs").write_text("5", "ascii")
    before = _status_bytes("VmRSS")
    del_result(call())
    return max(_status_bytes("VmHWM") - before, 0)


def del_result(result: Any) -> None:
    """Drop a result that is not needed."""
    del result


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0
