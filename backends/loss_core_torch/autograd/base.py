"""What the autograd functions share."""

from __future__ import annotations

import torch
from torch import Tensor

from loss_core_torch import compat


def check_upstream(upstream: Tensor) -> None:
    """Refuse a batch of upstream gradients.

    Raises:
        RuntimeError: the backward runs under torch.func.vmap (is_grads_batched, jacrev).
    """
    if torch.compiler.is_compiling():
        return
    if compat.is_batched(upstream) or "Vmap" in compat.functorch_transforms():
        raise RuntimeError(
            "This kernel of loss_core has no batching rule for its backward (torch.func.vmap, jacrev, "
            "is_grads_batched=True). Build the loss with backend='torch:plain' there."
        )
