"""Times of calls on CUDA: of the device by events, and of the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from loss_core_bench.torch_ranks import Ranks

# Of the device's clock, in one second of a sleep: more than any has.
_CYCLES = 2.5e9


def cuda_times(step: Callable[[], Any], budget: float, most: int, ranks: Ranks, device: str) -> list[float]:
    """Seconds of each call by events on the device, which leaves out what the host does beside it.

    The device sleeps before each call while the host asks for it: a queue that is empty would show the host's time.
    """
    host = host_seconds(step)
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    count = ranks.least(max(1, min(most, int(budget / max(time.perf_counter() - start + host, 1e-6)))))
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for before, after in marks:
        torch.cuda._sleep(int(_CYCLES * host))
        ranks.line_up(device)
        before.record()
        result = step()
        after.record()
        del result
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in marks]


def host_seconds(step: Callable[[], Any]) -> float:
    """What the host takes to ask for a call, the second of two."""
    step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds
