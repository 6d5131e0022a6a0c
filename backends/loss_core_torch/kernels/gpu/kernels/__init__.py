"""The kernels of `torch:triton`. Launches are in `launch`, sizes in `sizes`.

A program has a row of its own, or a piece of a long one, whatever the other rows of the call are. Each thread keeps
terms of its own until the end: the loops over the vocabulary hold no barrier, no shuffle and no shared memory
(`make kernels` counts).

Where a gradient follows, logits are read twice, the second time from the last to the first: what was read last is the
likeliest to be still in a cache, and on average half of them has to be. Stores leave the cache first. A long row is
shared by several programs, so that what each reads twice stays near it.
"""

from loss_core_torch.kernels.gpu.kernels.pairs import (
    pair_grad_kernel,
    pair_kernel,
    pair_mixture_kernel,
    pair_terms_kernel,
)
from loss_core_torch.kernels.gpu.kernels.pieces import TOLD, UNTOLD
from loss_core_torch.kernels.gpu.kernels.rows import row_grad_kernel, row_kernel, row_terms_kernel
from loss_core_torch.kernels.gpu.kernels.scaled import scaled_kernel

__all__ = [
    "TOLD",
    "UNTOLD",
    "pair_grad_kernel",
    "pair_kernel",
    "pair_mixture_kernel",
    "pair_terms_kernel",
    "row_grad_kernel",
    "row_kernel",
    "row_terms_kernel",
    "scaled_kernel",
]
