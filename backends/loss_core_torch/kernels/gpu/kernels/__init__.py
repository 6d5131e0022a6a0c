"""The kernels of `torch:triton`. `gpu.launch` launches them, `gpu.sizes` chooses their sizes.

A program computes one row, or one piece of a long row, whatever the other rows of the call are. Each thread keeps its
own partial terms until the end: the loops over the vocabulary have no barrier, no shuffle and no shared memory
(`make kernels` counts them).

For a gradient, logits are read twice, the second time from the last to the first: those read last are the likeliest to
be in a cache still, which on average must hold half of them. Stores are evicted first. A long row is shared by several
programs, so that the L1 cache holds what each reads twice.
"""

from loss_core_torch.kernels.gpu.kernels.pairs import (
    pair_grad_kernel,
    pair_kernel,
    pair_mixture_kernel,
    pair_terms_kernel,
)
from loss_core_torch.kernels.gpu.kernels.pieces import PARTIAL_TERMS, UNPUBLISHED
from loss_core_torch.kernels.gpu.kernels.rows import row_grad_kernel, row_kernel, row_terms_kernel
from loss_core_torch.kernels.gpu.kernels.scaled import scaled_kernel

__all__ = [
    "PARTIAL_TERMS",
    "UNPUBLISHED",
    "pair_grad_kernel",
    "pair_kernel",
    "pair_mixture_kernel",
    "pair_terms_kernel",
    "row_grad_kernel",
    "row_kernel",
    "row_terms_kernel",
    "scaled_kernel",
]
