"""Timing on CUDA: device time by events, and host time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from loss_core_bench.torch_ranks import Ranks

# Converts seconds to cycles of a device's sleep; above the clock rate of every device.
_CYCLES_PER_SECOND = 2.5e9


def cuda_times(
    step: Callable[[], Any],
    budget: float,
    max_calls: int,
    ranks: Ranks,
    device: str,
    sleep: Callable[[int], None] = torch.cuda._sleep,
) -> list[float]:
    """Seconds of each call on the device, measured by events.

    The device sleeps before each call until the host has launched all of it: with an empty queue the events would
    measure the host.

    Args:
        sleep: occupies the device for a number of cycles (PyTorch's is private; seen in torch 2.11 and 2.13).
    """
    host = host_seconds(step)
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    count = ranks.all_reduce_min(max(1, min(max_calls, int(budget / max(time.perf_counter() - start + host, 1e-6)))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for before, after in events:
        sleep(int(_CYCLES_PER_SECOND * host))
        ranks.device_barrier(device)
        before.record()
        result = step()
        after.record()
        del result
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in events]


def host_seconds(step: Callable[[], Any]) -> float:
    """Seconds that the host takes to launch a call, the second of two."""
    step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds
