"""The same cross entropy as a JAX loss and as a torch loss, for tests that compare them over the bridge."""

# T = tokens, V = vocabulary

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F

import loss_core

# One entry for each trace of JaxCE.
TRACES: list[str] = []


@dataclasses.dataclass(frozen=True)
class JaxCE:
    """Stand-in for a JAX loss. Its residuals are the logits and the lse, not the exponentials."""

    reduction: str = "sum"
    ignore_index: int = -100

    @property
    def kernel_choice(self):
        return loss_core.KernelChoice("jax:xla", "stand-in")

    def __call__(self, logits, labels, mask=None, num_label_tokens=None, loss_weights=None):
        TRACES.append("loss")
        keep = labels != self.ignore_index
        if mask is not None:
            keep = keep & (mask != 0)
        rows = _rows(logits.reshape(-1, logits.shape[-1]), jnp.where(keep, labels, 0).reshape(-1))
        # Compared before any cast: JAX's gather would wrap an int64 index to int32.
        valid = (labels >= 0) & (labels < logits.shape[-1])
        rows = jnp.where(keep, jnp.where(valid, rows.reshape(labels.shape), jnp.nan), 0)
        if loss_weights is not None:
            rows = rows * loss_weights.astype(rows.dtype)
        if self.reduction == "none":
            return rows
        total = rows.sum()
        if self.reduction == "mean":
            return total / jnp.maximum(keep.sum(), 1)
        return total if num_label_tokens is None else total / num_label_tokens


@jax.custom_vjp
def _rows(logits_TV, labels):
    return _rows_forward(logits_TV, labels)[0]


def _wide(logits):
    return logits if logits.dtype == jnp.float64 else logits.astype(jnp.float32)


def _rows_forward(logits_TV, labels):
    z = _wide(logits_TV)
    lse = jax.nn.logsumexp(z, axis=-1)
    return lse - jnp.take_along_axis(z, labels[:, None], axis=-1)[:, 0], (logits_TV, labels, lse)


def _rows_backward(saved, g):
    logits_TV, labels, lse = saved
    p = jnp.exp(_wide(logits_TV) - lse[:, None])
    onehot = jnp.arange(p.shape[1]) == labels[:, None]
    return ((p - onehot) * g[:, None]).astype(logits_TV.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)


class TorchCE(torch.nn.Module):
    """Stand-in for a torch loss."""

    def __init__(self, reduction="sum", ignore_index=-100):
        super().__init__()
        self.reduction = reduction
        self.ignore_index = ignore_index

    def forward(self, logits, labels, mask=None, num_label_tokens=None, loss_weights=None):
        labels = labels.long()
        if mask is not None:
            labels = torch.where(mask.bool(), labels, self.ignore_index)
        z = logits if logits.dtype == torch.float64 else logits.float()
        rows = F.cross_entropy(
            z.reshape(-1, z.shape[-1]), labels.reshape(-1), ignore_index=self.ignore_index, reduction="none"
        ).reshape(labels.shape)
        if loss_weights is not None:
            rows = rows * loss_weights
        if self.reduction == "none":
            return rows
        total = rows.sum()
        if self.reduction == "mean":
            return total / (labels != self.ignore_index).sum().clamp(min=1)
        return total if num_label_tokens is None else total / num_label_tokens


def case(dtype=torch.float32, shape=(3, 5), V=37, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, V, generator=generator).to(dtype)
    labels = torch.randint(0, V, shape, generator=generator)
    labels.view(-1)[1] = -100
    return logits, labels


TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def run_torch(loss, logits, labels, upstream=None, **others):
    leaf = logits.detach().clone().requires_grad_()
    result = loss(leaf, labels, **others)
    result.backward(torch.ones_like(result) if upstream is None else upstream)
    return result.detach(), leaf.grad
