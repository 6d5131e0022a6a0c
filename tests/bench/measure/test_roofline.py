"""The least work of a call."""

from __future__ import annotations

import pytest

from loss_core import FusedLinearCEConfig, KDLossConfig, MaskedCrossEntropyConfig
from loss_core.bench.measure.job import Job, input_bytes
from loss_core.bench.measure.roofline import least_work, left_out, words


def test_the_roofline_counts_what_must_be_done():
    ce = Job(MaskedCrossEntropyConfig().to_dict(), (100, 1000), "bfloat16", ignored=0.5)
    assert least_work(ce).moved == 2 * (50 * 1000 + 100 * 1000)
    kd = Job(KDLossConfig().to_dict(), (100, 1000), "float32")
    assert least_work(kd).moved == 4 * 3 * 100 * 1000
    fused = Job(FusedLinearCEConfig().to_dict(), (100, 1000, 10), "float32", ignored=0.5)
    assert least_work(fused).operations == 3 * 2 * 50 * 1000 * 10
    forward = Job(FusedLinearCEConfig().to_dict(), (100, 1000, 10), "float32", forward_only=True)
    assert least_work(forward).operations == 2 * 100 * 1000 * 10
    assert least_work(forward).seconds(copy_rate=1e9, product_rate=1e6) == pytest.approx(2.0)


def test_the_roofline_is_that_of_the_largest_part():
    ce = Job(MaskedCrossEntropyConfig().to_dict(), (100, 1001), "bfloat16", tp=4)
    assert least_work(ce).moved == 2 * 2 * 100 * 251
    assert words(ce) == "1 read + 1 write of the logits, of the largest of 4 parts,"
    fused = Job(FusedLinearCEConfig().to_dict(), (100, 1000, 10), "float32", tp=2)
    assert least_work(fused).operations == 3 * 2 * 100 * 500 * 10
    assert "the sum of the gradients of hidden_states" in left_out(fused)
    assert "5 numbers per token" in left_out(Job(KDLossConfig().to_dict(), (100, 1000), "float32", tp=2))
    assert input_bytes(fused) == 4 * (2 * 100 * 10 + 1000 * 10)
    assert left_out(Job(KDLossConfig().to_dict(), (100, 1000), "float32")) == ""
