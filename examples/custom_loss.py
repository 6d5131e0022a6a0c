"""Add a loss of your own, for both backends, without touching the library: cross entropy with a z-loss.

    python examples/custom_loss.py

The z-loss adds weight * (log Z)^2 per token, Z the softmax's denominator, which keeps logits from
drifting (PaLM, arXiv:2204.02311, section 5). The script registers a config and a builder per
backend, proves that the two builders agree, and trains a torch head on either by the flag.
"""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from loss_core import LossConfig, build_loss_module, register_loss
from loss_core.check import compare


@dataclass
class ZLossConfig(LossConfig):
    """Cross entropy plus weight * (log Z)^2, summed over the tokens that count.

    Attributes:
        weight: of the z-loss; a number >= 0.
        ignore_index: label that marks a position to leave out.
    """

    weight: float = 1e-4
    ignore_index: int = -100

    def validate(self) -> None:
        """Runs when a config is made, and again when it is built."""
        if not self.weight >= 0:
            raise ValueError(f"weight must be a number >= 0, got {self.weight!r}.")


def build_torch_z_loss(config: ZLossConfig) -> Any:
    import torch  # in the builder, so that the config works where torch is not installed

    class ZLoss(torch.nn.Module):
        def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            keep = labels != config.ignore_index
            lse = torch.logsumexp(logits, -1)
            target = logits.gather(-1, torch.where(keep, labels, 0)[..., None])[..., 0]
            return torch.where(keep, lse - target + config.weight * lse.square(), 0.0).sum()

    return ZLoss()


def build_jax_z_loss(config: ZLossConfig) -> Any:
    import jax
    import jax.numpy as jnp

    weight, ignore_index = config.weight, config.ignore_index

    def z_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        keep = labels != ignore_index
        lse = jax.nn.logsumexp(logits, -1)
        target = jnp.take_along_axis(logits, jnp.where(keep, labels, 0)[..., None], -1)[..., 0]
        return jnp.sum(jnp.where(keep, lse - target + weight * lse**2, 0.0))

    return z_loss  # any hashable callable will do


def main() -> int:
    register_loss("ZLoss", ZLossConfig, {"torch": build_torch_z_loss, "jax": build_jax_z_loss})

    rng = np.random.default_rng(0)
    labels_T = rng.integers(0, 507, 64)
    labels_T[::5] = -100
    inputs = {"logits": 3 * rng.standard_normal((64, 507)), "labels": labels_T}
    losses = [build_loss_module("ZLoss", backend=flag, weight=1e-2) for flag in ("torch", "jax")]
    report = compare(losses[0], losses[1], inputs)
    print(report)

    for flag in ("torch", "jax"):
        print(f"head trained with --backend {flag}: loss per token {train_head(flag):.6f}")
    return 0 if report.passed else 1


def train_head(flag: str, steps: int = 20) -> float:
    """A few steps of a torch head; `build_torch_loss` finds the registered name and wraps the JAX loss."""
    import torch

    from loss_core_bridge import build_torch_loss

    torch.manual_seed(0)
    loss_fn = build_torch_loss("ZLoss", backend=flag, weight=1e-2)
    hidden_TH, labels_T = torch.randn(256, 32), torch.randint(0, 64, (256,))
    head = torch.nn.Linear(32, 64)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    for _ in range(steps):
        loss = loss_fn(head(hidden_TH), labels_T) / len(labels_T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


if __name__ == "__main__":
    sys.exit(main())
