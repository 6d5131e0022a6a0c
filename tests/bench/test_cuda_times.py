"""Calls on CUDA are launched while the device still sleeps, shown here with a stand-in for the device."""

import time

import pytest
import torch

from loss_core_bench.cuda_times import cuda_times
from loss_core_bench.torch_ranks import Ranks

HOST = 3e-3


@pytest.fixture
def device(monkeypatch):
    """Operations of the device, in the order of their launch."""
    launched = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            launched.append("event")

        def elapsed_time(self, other):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: launched.append("synchronize"))
    return launched


def test_the_device_sleeps_while_the_host_launches_a_call(device):
    """And then waits for the other ranks, which may sleep longer."""

    class RecordingRanks(Ranks):
        def device_barrier(self, name):
            device.append(f"barrier on {name}")

    def step():
        time.sleep(HOST)
        device.append("call")

    assert cuda_times(step, 1.0, 3, RecordingRanks(), "cuda", sleep=device.append) == [2e-3] * 3
    calls = device[device.index("event") - 2 : -1]
    assert len(calls) == 3 * 5
    for sleep, *rest in zip(*[iter(calls)] * 5, strict=True):
        assert rest == ["barrier on cuda", "event", "call", "event"]
        # No device has a clock faster than 2.5 GHz.
        assert sleep >= 2.5e9 * HOST
    assert device[-1] == "synchronize"
