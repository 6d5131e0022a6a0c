"""Shapes of real models."""

from __future__ import annotations

from loss_core.bench.workloads import WORKLOADS


def test_workloads_have_sizes_and_a_source():
    for name, workload in WORKLOADS.items():
        assert workload.name == name
        assert all(size > 0 for size in workload.shape)
        assert "/" in workload.source
