"""Port a custom loss from PyTorch to JAX, and find the error in the port with `compare`.

    python examples/port_a_loss.py

The loss is PPO's clipped objective over the tokens of a completion (arXiv:1707.06347, equation 7).
The first port has a common mistake. `compare` runs both functions, value and gradients, in float32
and in float64, and names the tensor, the position and both values where they differ by more than
rounding explains. Neither function depends on loss_core.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import torch

from loss_core.check import compare

CLIP = 0.2


def ppo_torch(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The loss to port; every argument is [B, S]."""
    ratio = torch.exp(logprobs - old_logprobs)
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    return -(gain * mask).sum() / mask.sum()


def first_port(logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array) -> jax.Array:
    ratio = jnp.exp(logprobs - old_logprobs)
    gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantages)
    return -jnp.mean(gain * mask)  # the mistake: a mean over all tokens, padding included


def second_port(logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array) -> jax.Array:
    ratio = jnp.exp(logprobs - old_logprobs)
    gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantages)
    return -jnp.sum(gain * mask) / jnp.sum(mask)


def main() -> int:
    # Better: arrays captured in a real run, np.load("captured.npz").
    rng = np.random.default_rng(0)
    shape = (8, 100)
    old_logprobs = -rng.exponential(1.0, shape)
    inputs: dict[str, np.ndarray] = {
        "logprobs": old_logprobs + 0.2 * rng.standard_normal(shape),  # some ratios are clipped, some are not
        "old_logprobs": old_logprobs,
        "advantages": rng.standard_normal(shape),
        "mask": (np.arange(100) < rng.integers(20, 100, (8, 1))).astype(np.int32),
    }
    reports = []
    for port in (first_port, second_port):
        report = compare(ppo_torch, port, inputs, grad_of=["logprobs"])
        reports.append(report)
        print(f"{port.__name__}: {'agrees' if report.passed else 'DIFFERS'}\n{report}\n")
    return 0 if [report.passed for report in reports] == [False, True] else 1


if __name__ == "__main__":
    sys.exit(main())
