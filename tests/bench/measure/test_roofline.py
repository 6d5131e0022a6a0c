"""The least work of a call."""

from __future__ import annotations

import pytest

from loss_core import FusedLinearCEConfig, KDLossConfig, MaskedCrossEntropyConfig
from loss_core.bench.measure.job import Job, input_bytes
from loss_core.bench.measure.roofline import counted_text, least_work, uncounted_text


def test_the_roofline_counts_the_least_work():
    ce = Job(MaskedCrossEntropyConfig().to_dict(), (100, 1000), "bfloat16", ignored=0.5)
    assert least_work(ce).num_bytes == 2 * (50 * 1000 + 100 * 1000)
    kd = Job(KDLossConfig().to_dict(), (100, 1000), "float32")
    assert least_work(kd).num_bytes == 4 * 3 * 100 * 1000
    fused = Job(FusedLinearCEConfig().to_dict(), (100, 1000, 10), "float32", ignored=0.5)
    assert least_work(fused).num_flops == 3 * 2 * 50 * 1000 * 10
    forward = Job(FusedLinearCEConfig().to_dict(), (100, 1000, 10), "float32", forward_only=True)
    assert least_work(forward).num_flops == 2 * 100 * 1000 * 10
    assert least_work(forward).seconds(copy_rate=1e9, product_rate=1e6) == pytest.approx(2.0)


def test_the_roofline_is_that_of_the_largest_shard():
    ce = Job(MaskedCrossEntropyConfig().to_dict(), (100, 1001), "bfloat16", tp=4)
    assert least_work(ce).num_bytes == 2 * 2 * 100 * 251
    assert counted_text(ce) == "1 read + 1 write of the logits, of the largest of 4 parts,"
    fused = Job(FusedLinearCEConfig().to_dict(), (100, 1000, 10), "float32", tp=2)
    assert least_work(fused).num_flops == 3 * 2 * 100 * 500 * 10
    assert "the sum of the gradients of hidden_states" in uncounted_text(fused)
    assert "5 numbers per token" in uncounted_text(Job(KDLossConfig().to_dict(), (100, 1000), "float32", tp=2))
    assert input_bytes(fused) == 4 * (2 * 100 * 10 + 1000 * 10)
    assert uncounted_text(Job(KDLossConfig().to_dict(), (100, 1000), "float32")) == ""
