"""Add a custom loss for both backends without changing the library: cross entropy with a z-loss.

    python examples/custom_loss.py

The z-loss adds weight * (log Z)^2 per token, Z the softmax's denominator, which keeps logits from
drifting (PaLM, arXiv:2204.02311, section 5). The script registers a config, a builder per backend
and a definition in float64, checks both builders against the definition, and trains a torch head
on either by the flag. The command line serves the loss as well:

    loss-core check --import custom_loss --config ZLoss      # in the folder of this file
    loss-core bench --import custom_loss --config ZLoss --shape 2048,32000
"""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from loss_core import LossConfig, register_loss
from loss_core.check import check
from loss_core.losses import LABELS, Argument, LossDef
from loss_core.losses.cross_entropy import over_logits, token_cross_entropy


@dataclass
class ZLossConfig(LossConfig):
    """Cross entropy plus weight * (log Z)^2, summed over valid tokens.

    Attributes:
        weight: of the z-loss; a number >= 0.
        ignore_index: label of the positions to ignore.
    """

    weight: float = 1e-4
    ignore_index: int = -100

    def validate(self) -> None:
        """Called when a config is created, and again when it is built."""
        if not self.weight >= 0:
            raise ValueError(f"weight must be a number >= 0, got {self.weight!r}.")


def build_torch_z_loss(config: ZLossConfig) -> Any:
    import torch  # in the builder, so that the config works where torch is not installed

    class ZLoss(torch.nn.Module):
        def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            keep = labels != config.ignore_index
            # Ignored rows may hold anything, such as NaN, which must reach neither loss nor gradient.
            logits = torch.where(keep[..., None], logits, 0).to(torch.promote_types(logits.dtype, torch.float32))
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
        logits = jnp.where(keep[..., None], logits, 0).astype(jnp.promote_types(logits.dtype, jnp.float32))
        lse = jax.nn.logsumexp(logits, -1)
        target = jnp.take_along_axis(logits, jnp.where(keep, labels, 0)[..., None], -1)[..., 0]
        return jnp.sum(jnp.where(keep, lse - target + weight * lse**2, 0.0))

    return z_loss  # any hashable callable


def token_z_loss(config: ZLossConfig, logits_TV: Any, labels_T: Any, keep_T: Any) -> tuple[Any, Any]:
    """Loss of each token, and its derivative by the logits, in float64: the reference for both builders."""
    loss_T, grad_TV = token_cross_entropy(config, logits_TV, labels_T, keep_T)
    max_T1 = logits_TV.max(axis=1, keepdims=True)
    lse_T1 = max_T1 + np.log(np.exp(logits_TV - max_T1).sum(axis=1, keepdims=True))
    p_TV = np.exp(logits_TV - lse_T1)
    return loss_T + config.weight * lse_T1[:, 0] ** 2, grad_TV + 2 * config.weight * lse_T1 * p_TV


# Without an error bound, `check` estimates one from the definition.
DEFINITION = LossDef("z_loss", (Argument("logits", ("T", "V")), LABELS), over_logits(token_z_loss))

register_loss("ZLoss", ZLossConfig, {"torch": build_torch_z_loss, "jax": build_jax_z_loss}, definition=DEFINITION)


def main() -> int:
    report = check(ZLossConfig(weight=1e-2), ["torch", "jax"], dtypes=["float32", "bfloat16"])
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
