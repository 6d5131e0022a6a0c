"""Kernels of `torch:eager`: PyTorch operations on blocks of rows, on any torch device."""

from __future__ import annotations

import torch

from loss_core_torch.kernels.eager.pairs import PairKernels
from loss_core_torch.kernels.eager.products import ProductKernels
from loss_core_torch.kernels.eager.rows import RowKernels
from loss_core_torch.kernels.eager.sizes import SIZES, Sizes


class EagerKernels(RowKernels, PairKernels, ProductKernels):
    """A `KernelSet`; each method is documented there.

    Args:
        sizes: block sizes; they change results by rounding alone.
    """

    flag = "torch:eager"

    def __init__(self, sizes: Sizes = SIZES) -> None:
        self.sizes = sizes

    def batch_invariant(self, row_bytes: int) -> bool:
        """True: blocks hold full rows, and branches on values depend on those of the row alone."""
        return True

    def grad_in_forward(self, device: torch.device) -> bool:
        """On a CPU a block of rows stays in cache between its terms and its gradient."""
        return device.type == "cpu"


KERNELS = EagerKernels()
