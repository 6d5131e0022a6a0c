"""Rounding of operands, and the 16-bit log-softmaxes of torch and JAX, which are within the predicted intervals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loss_core.dtypes import round_to
from loss_core.mismatch.predict.interval import Interval
from loss_core.mismatch.predict.log_softmax import log_softmax_at
from loss_core.mismatch.predict.precision import SOFTMAX_STEPS, STORED_STEPS, rounded_operand


def test_operands_are_rounded_as_float_formats_are():
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(50_000) * 10.0 ** rng.integers(-37, 37, 50_000)).astype(np.float32)
    special = np.array([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, np.inf, -np.inf, np.nan, -0.0], np.float32)
    values = np.concatenate([values, special])
    np.testing.assert_array_equal(rounded_operand(values, "bfloat16"), round_to(values, "bfloat16"))
    # 11 bits, as float16 has them in its normal range.
    normal = values[(np.abs(values) > 1e-4) & (np.abs(values) < 6e4)]
    np.testing.assert_array_equal(rounded_operand(normal, "tf32-even"), round_to(normal, "float16"))
    halves = np.array([1 + 2**-11, -1 - 2**-11, 1 + 3 * 2**-11])
    assert rounded_operand(halves, "tf32-away").tolist() == [1 + 2**-10, -1 - 2**-10, 1 + 2**-9]
    assert rounded_operand(halves, "tf32-even").tolist() == [1, -1, 1 + 2**-9]
    assert rounded_operand(halves, "tf32-truncated").tolist() == [1, -1, 1 + 2**-10]


def explaining(z, labels, observed, fmt):
    """Which stored steps explain the observed log-probabilities."""
    exact = Interval(z, z, z)
    found = {steps: log_softmax_at(exact, labels, fmt, steps) for steps in STORED_STEPS}
    return [steps for steps, p in found.items() if np.all((p.low <= observed) & (observed <= p.high))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_the_log_softmaxes_of_torch(dtype, scale):
    fmt = str(dtype).removeprefix("torch.")
    logits = (scale * torch.randn(200, 300, generator=torch.Generator().manual_seed(0))).to(dtype)
    labels = torch.arange(200)
    z, at = logits.double().numpy(), (torch.arange(200), labels)
    on_cpu = logits.log_softmax(-1)[at].double().numpy()
    assert explaining(z, labels.numpy(), on_cpu, fmt) == [("sum", "log")]
    once = logits.float().log_softmax(-1).to(dtype)[at].double().numpy()
    assert explaining(z, labels.numpy(), once, fmt) == [()]
    by_lse = (logits[at] - logits.logsumexp(-1)).double().numpy()
    assert explaining(z, labels.numpy(), by_lse, fmt) == [SOFTMAX_STEPS]


def test_the_log_softmax_of_jax():
    jax = pytest.importorskip("jax")
    z = np.random.default_rng(0).standard_normal((200, 300)).astype(np.float32)
    logits = jax.numpy.asarray(z, jax.numpy.bfloat16)
    found = np.asarray(jax.nn.log_softmax(logits)[:, 7].astype(np.float32))
    exact = np.asarray(logits.astype(np.float32), np.float64)
    assert explaining(exact, np.full(200, 7), found, "bfloat16") == [("shifted", "sum", "log")]
