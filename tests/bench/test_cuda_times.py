"""Calls on CUDA are timed while the device is behind the host, which a stand-in for the device shows here."""

import time

import pytest
import torch

from loss_core_bench.cuda_times import cuda_times
from loss_core_bench.torch_ranks import Ranks

HOST = 3e-3


@pytest.fixture
def device(monkeypatch):
    """What the device was asked for, in order."""
    asked = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            asked.append("mark")

        def elapsed_time(self, other):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: asked.append("waited for"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: asked.append(cycles))
    return asked


def test_the_device_sleeps_while_the_host_asks_for_a_call(device):
    """And then waits for the other ranks, which may have slept longer."""

    class Meeting(Ranks):
        def line_up(self, where):
            device.append(f"meeting on {where}")

    def step():
        time.sleep(HOST)
        device.append("call")

    assert cuda_times(step, 1.0, 3, Meeting(), "cuda") == [2e-3] * 3
    calls = device[device.index("mark") - 2 : -1]
    assert len(calls) == 3 * 5
    for sleep, *rest in zip(*[iter(calls)] * 5, strict=True):
        assert rest == ["meeting on cuda", "mark", "call", "mark"]
        # No chip's clock is faster than 2.5 GHz.
        assert sleep >= 2.5e9 * HOST
    assert device[-1] == "waited for"
