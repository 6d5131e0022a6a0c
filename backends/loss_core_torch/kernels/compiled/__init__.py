"""Kernels of `torch:compile`: rows and pairs of rows, each as one loop over rows compiled by TorchInductor.

A row is read from memory once, and no [T, V] temporary exists. The first call for each dtype, layout and set of options
compiles for seconds; other numbers of tokens or classes use the same program.

Of the losses over hidden states, only distillation (pairs) is supported. The time of the others is that of their matrix
products, which a compiler does not make faster.
"""

from __future__ import annotations

import torch

from loss_core_torch.kernels.compiled.pairs import PairKernels
from loss_core_torch.kernels.compiled.rows import RowKernels
from loss_core_torch.kernels.eager.products import ProductKernels
from loss_core_torch.kernels.eager.sizes import SIZES


class CompiledKernels(RowKernels, PairKernels, ProductKernels):
    """A `KernelSet`, each method documented there, but `row_terms_and_grad` does not do what `linear_rows` requires."""

    flag = "torch:compile"
    sizes = SIZES

    def batch_invariant(self, row_bytes: int) -> bool:
        return True

    def grad_in_forward(self, device: torch.device) -> bool:
        """As in `torch:eager`."""
        return device.type == "cpu"


KERNELS = CompiledKernels()
