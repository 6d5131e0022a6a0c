"""The interface of a runner, which the worker calls; timing and memory code for both frameworks."""

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
    """One implementation to measure, on one framework."""

    @property
    def loaded(self) -> bool:
        """Whether the inputs are on the device."""
        ...

    def evaluate(self, tiles: Mapping[str, Tiled], labels: NDArray[np.int64]) -> Arrays:
        """Return the loss (under "loss") and the gradients (by argument name) of one call."""
        ...

    def load(self, tiles: Mapping[str, Tiled], labels: NDArray[np.int64]) -> None:
        """Copy the inputs to the device."""
        ...

    def unload(self) -> None:
        """Free the inputs."""
        ...

    def prepare(self, tokens: NDArray[np.int64]) -> Prepared:
        """Run the first calls at the full shape; the sample holds the gradient rows of `tokens`."""
        ...

    def warm_up(self) -> None:
        """Run one call that is not timed."""
        ...

    def round(self, budget: float, max_calls: int) -> list[float] | Rates:
        """Return the seconds of each timed call; for the roofline the rates."""
        ...


class RatesRunner:
    """Base of the roofline runners, which compute no loss; they add `load`, `unload` and `round`."""

    def evaluate(self, tiles: Mapping[str, Tiled], labels: NDArray[np.int64]) -> Arrays:
        return {}

    def prepare(self, tokens: NDArray[np.int64]) -> Prepared:
        return Prepared(timed(self.warm_up), 0, "", {})

    def warm_up(self) -> None:
        self.round(0.0, 1)

    def round(self, budget: float, max_calls: int) -> Rates:
        raise NotImplementedError


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call; its result is freed outside of the timed region."""
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result
    return seconds


def timed_calls(
    call: Callable[[], Any], budget: float, max_calls: int, all_ready: Callable[[bool], bool] = bool
) -> list[float]:
    """Seconds of each call, as many as fit the budget, at least one.

    Args:
        all_ready: called before each call with whether this process is to go on; over ranks it is a barrier that
            returns the same value on all of them.
    """
    gc.collect()
    seconds: list[float] = []
    end = time.perf_counter() + budget
    while all_ready(not seconds or (len(seconds) < max_calls and time.perf_counter() < end)):
        seconds.append(timed(call))
    return seconds


def host_peak(call: Callable[[], Any]) -> int:
    """Peak resident memory of this process during a call, above that before it, in bytes.

    On Linux the high-water mark, reset before the call. Elsewhere it can't be reset, and its growth over the life of
    the process is a lower bound.
    """
    gc.collect()
    if sys.platform != "linux":
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        call()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # otherwise freed memory would be part of the baseline
    Path("/proc/self/clear_refs").write_text("5", "ascii")
    before = _status_bytes("VmRSS")
    call()
    return max(_status_bytes("VmHWM") - before, 0)


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0
