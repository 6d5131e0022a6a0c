"""The kernels of `torch:compile`: rows and pairs of rows, each as one loop that TorchInductor compiles.

A row is read from memory once, and no temporary of [T, V] exists. The first call of each kind of input compiles, for
seconds; another number of tokens or classes is no other kind.

Of the losses over hidden states the distillation is here, whose rows are pairs. The time of the others is that of their
matrix products, which are no compiler's to make faster.
"""

from __future__ import annotations

import torch

from loss_core_torch.kernels.compiled.pairs import PairKernels
from loss_core_torch.kernels.compiled.rows import RowKernels
from loss_core_torch.kernels.eager.products import ProductKernels
from loss_core_torch.kernels.eager.sizes import SIZES


class CompiledKernels(RowKernels, PairKernels, ProductKernels):
    """A `KernelSet` but for what `linear_rows` needs of `row_terms_and_grad`; see there for each method."""

    flag = "torch:compile"
    sizes = SIZES

    def batch_invariant(self, row_bytes: int) -> bool:
        return True

    def grad_in_forward(self, device: torch.device) -> bool:
        """As in `torch:eager`."""
        return device.type == "cpu"


KERNELS = CompiledKernels()
