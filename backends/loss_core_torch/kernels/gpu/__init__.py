"""The kernels of `torch:triton`: Triton kernels for NVIDIA and AMD GPUs, around the vendor's matrix products.

With TRITON_INTERPRET=1 in the environment before the first import, they run on a CPU, slowly.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from loss_core_torch.kernels import Blocks, HeadSizes
from loss_core_torch.kernels.gpu import kernels, sizes
from loss_core_torch.kernels.gpu.launch import Launcher
from loss_core_torch.kernels.gpu.pairs import PairKernels
from loss_core_torch.kernels.gpu.products import Products
from loss_core_torch.kernels.gpu.rows import RowKernels


class GpuKernels(RowKernels, PairKernels):
    """Implements `KernelSet`, where each method is documented."""

    flag = "torch:triton"

    def __init__(self, launcher: Launcher | None = None) -> None:
        self._launcher = launcher or Launcher()

    def batch_invariant(self, row_bytes: int) -> bool:
        """Whether each row begins at a vector: else the order of its sum depends on its alignment."""
        return row_bytes % sizes.VECTOR_BYTES == 0

    def grad_in_forward(self, device: torch.device) -> bool:
        """True: the second read of a row hits a cache."""
        return True

    def operand_dtype(self, product_dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return self._launcher.operand_dtype(product_dtype, device)

    def products(self, operand_dtype: torch.dtype, device: torch.device) -> Products:
        return Products()

    def chunks(self, sizes: HeadSizes) -> Blocks:
        return self._launcher.chunks(sizes)

    def tiles(self, sizes: HeadSizes, together: bool) -> Blocks:
        return self._launcher.tiles(sizes, together)

    def scaled(self, grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """In one pass over memory: mul_ and a cast take two and a half."""
        if dtype == grad.dtype or not grad.numel():
            return grad.mul_(factor).to(dtype)
        out, size = torch.empty_like(grad, dtype=dtype), sizes.ELEMENTWISE
        grid = (triton.cdiv(grad.numel(), size.block_v),)
        self._launcher.launch(
            kernels.scaled_kernel, grid, out, grad, factor, grad.numel(), size=size, BLOCK=size.block_v
        )
        return out


KERNELS = GpuKernels()
