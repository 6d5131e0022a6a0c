"""The kernels of `torch:compile`: rows and pairs of rows, each as one loop that TorchInductor compiles.

A row is read from memory once, and no temporary of [T, V] exists. The first call of each kind of input compiles, for
seconds; another number of tokens or classes is no other kind.

The fused linear loss is not here: its time is that of its matrix products, which are no compiler's to make faster.
"""

from __future__ import annotations

import torch

from loss_core_torch.kernels.compiled.pairs import PairKernels
from loss_core_torch.kernels.compiled.rows import RowKernels


class CompiledKernels(RowKernels, PairKernels):
    """A `KernelSet` without the `linear_` methods; see there for each method."""

    flag = "torch:compile"

    def grad_in_forward(self, device: torch.device) -> bool:
        """As in `torch:eager`."""
        return device.type == "cpu"


KERNELS = CompiledKernels()
