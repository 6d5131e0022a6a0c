"""The host callback of a torch loss in JAX: under vmap, with megabytes, and on one core."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.stand_ins import JaxCE, TorchCE, case
from loss_core_bridge import torch_loss_as_jax


def test_torch_in_jax_vmap():
    logits, labels = case()
    x, y = jnp.asarray(logits.numpy()), jnp.asarray(labels.numpy())
    f = torch_loss_as_jax(TorchCE())
    np.testing.assert_allclose(jax.vmap(f)(x, y), jax.vmap(JaxCE())(x, y), rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(f, (0, None))(x, y[0]), jax.vmap(JaxCE(), (0, None))(x, y[0]), rtol=1e-5)
    got = jax.jit(jax.vmap(jax.grad(f)))(x, y)
    np.testing.assert_allclose(got, jax.vmap(jax.grad(JaxCE()))(x, y), rtol=1e-5, atol=1e-6)


def test_torch_in_jax_repeated_with_megabytes():
    x = jax.random.normal(jax.random.key(0), (512, 2048))
    y = jnp.zeros(512, jnp.int32)
    f = torch_loss_as_jax(TorchCE("mean"))
    step = jax.jit(lambda x: x - jax.grad(lambda x: f(x * 2, y))(x))
    for _ in range(10):
        x = step(x)
    assert jnp.isfinite(x).all()


ONE_CORE = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax, jax.numpy as jnp, torch
from loss_core_bridge import torch_loss_as_jax
class Sum(torch.nn.Module):
    def forward(self, x): return x.square().sum()
step = jax.jit(jax.grad(torch_loss_as_jax(Sum())))
x = jnp.ones((1024, 1024))
for _ in range(5):
    x = step(x) * 0.5
print(float(x.sum()))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this platform can't restrict a process to one core")
def test_torch_in_jax_on_one_core():
    """With jax.pure_callback this deadlocks: the callback waits for the thread that it runs on."""
    done = subprocess.run(
        [sys.executable, "-c", ONE_CORE],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.stdout.strip() == "1048576.0", done.stderr
