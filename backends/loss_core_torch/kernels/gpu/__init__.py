"""The kernels of `torch:triton`: Triton kernels for NVIDIA and AMD GPUs, around the vendor's matrix products.

With TRITON_INTERPRET=1 in the environment before the first import, they run on a CPU, slowly.
"""

from __future__ import annotations

import torch

from loss_core_torch.kernels import Blocks, LinearPairs
from loss_core_torch.kernels.gpu import products, sizes
from loss_core_torch.kernels.gpu.launch import Launcher
from loss_core_torch.kernels.gpu.linear import LinearKernels
from loss_core_torch.kernels.gpu.linear_tiles import TiledLinearKernels
from loss_core_torch.kernels.gpu.pairs import PairKernels
from loss_core_torch.tracing import compute_dtype


class GpuKernels(PairKernels, LinearKernels, TiledLinearKernels):
    """A `KernelSet`; see there for each method."""

    flag = "torch:triton"

    def __init__(self, launcher: Launcher | None = None) -> None:
        self._launcher = launcher or Launcher()

    def batch_invariant(self, row_bytes: int) -> bool:
        """Where each row begins at a whole vector; else the order of its sum depends on where it begins."""
        return row_bytes % sizes.VECTOR_BYTES == 0

    def grad_in_forward(self, device: torch.device) -> bool:
        """The second read of a row finds it in the L2 cache."""
        return True

    def operand_dtype(self, product_dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return self._launcher.operand_dtype(product_dtype, device)

    def products(self, operand_dtype: torch.dtype, device: torch.device) -> products.Products:
        return products.Products()

    def linear_blocks(self, linear: LinearPairs) -> Blocks:
        """Chunks as the fused cross entropy's, of the memory of both logits; the whole vocabulary."""
        student_TH, dtype = linear.student_TH, compute_dtype(linear.student_TH.dtype)
        operand = self.operand_dtype(linear.student_dtype, student_TH.device)
        num_tokens, vocab = len(student_TH), len(linear.student_VH)
        both = 2 * dtype.itemsize + (operand.itemsize if operand != dtype else 0)
        tokens, _ = self._launcher.chunk_tokens(num_tokens, vocab, both, both, 0)
        return Blocks(tokens, vocab)


KERNELS = GpuKernels()
