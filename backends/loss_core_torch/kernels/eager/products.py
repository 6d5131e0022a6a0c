"""Matrix products, on a CPU by the faster of the two libraries that PyTorch includes.

PyTorch computes float32 products on x86 with MKL, which on AMD processors does not use the AVX-512 units. oneDNN, which
PyTorch includes for compiled graphs, does: on an EPYC with 2 threads, 0.45 TFLOP/s against MKL's 0.22 for 384 x 512 by
512 x 1024. Both accumulate in float32, within the same bound. The choice depends on the processor alone, so that the
same inputs give bitwise the same results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from loss_core_torch import compat
from loss_core_torch.kernels import Blocks, HeadSizes
from loss_core_torch.kernels.eager.sizes import Sizes
from loss_core_torch.tracing import compute_dtype


class Products:
    """Products of matrices of one dtype on one device; see `kernels.Products`.

    Args:
        by_onednn: whether oneDNN computes them; None: if it is faster here.
        columns: maximum number of classes per product; 0: no limit.
    """

    def __init__(
        self, dtype: torch.dtype, device: torch.device, by_onednn: bool | None = None, columns: int = 0
    ) -> None:
        self.columns = columns
        if by_onednn is None:
            by_onednn = bool(torch.backends.mkldnn.enabled) and compat.onednn_is_faster()
        self.by_onednn = by_onednn and dtype == torch.float32 and device.type == "cpu"

    def new(self, a_MK: Tensor, b_KN: Tensor) -> Tensor:
        """a @ b."""
        if not (self.by_onednn and a_MK.numel() and b_KN.numel()):
            return torch.mm(a_MK, b_KN)
        # A slice of the columns of a wider matrix would go to a reference kernel, a thousand times slower.
        b_KN = b_KN if b_KN.t().is_contiguous() else b_KN.contiguous()
        return compat.onednn_product(a_MK.contiguous(), b_KN)

    def into(self, out_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
        """out = a @ b; out must share no memory with a or b."""
        if self.by_onednn:
            out_MN.copy_(self.new(a_MK, b_KN))
        else:
            torch.mm(a_MK, b_KN, out=out_MN)

    def add(self, out_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
        """out += a @ b."""
        if self.by_onednn:
            out_MN.add_(self.new(a_MK, b_KN))
        else:
            # Not addmm_: FlopCounterMode does not count it.
            torch.addmm(out_MN, a_MK, b_KN, out=out_MN)

    def turned(self, b_KN: Tensor) -> Tensor:
        """The contiguous transpose of b if `accumulate` uses it, else b."""
        return b_KN.t().contiguous() if self.by_onednn else b_KN

    def accumulate(self, out_MN: Tensor, a_KM: Tensor, b_KN: Tensor, b_NK: Tensor, first: bool, last: bool) -> None:
        """One product of a sum: out = a.T @ b for the first, out += a.T @ b for the others.

        oneDNN requires a row-major left operand, and accepts either order of the right one; a.T on the left would be
        copied each time. So the transpose of the sum is accumulated, b.T @ a, and transposed once after the last.

        Args:
            b_NK: `turned(b)`.
            first, last: whether this is the first, the last, of the sum. Until the last, out holds the transposed sum.
        """
        if not self.by_onednn:
            if first:
                self.into(out_MN, a_KM.t(), b_KN)
            else:
                self.add(out_MN, a_KM.t(), b_KN)
            return
        sum_NM = out_MN.view(out_MN.shape[1], out_MN.shape[0])
        product_NM = self.new(b_NK, a_KM)
        if last:
            out_MN.copy_((product_NM if first else product_NM.add_(sum_NM)).t())
        elif first:
            sum_NM.copy_(product_NM)
        else:
            sum_NM.add_(product_NM)


class ProductKernels:
    """The methods of a `KernelSet` for the fused losses."""

    sizes: Sizes

    def operand_dtype(self, product_dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """The dtype of the arithmetic, on every device."""
        return compute_dtype(product_dtype)

    def products(self, operand_dtype: torch.dtype, device: torch.device) -> Products:
        """Products of the library that is faster here."""
        return Products(operand_dtype, device, columns=self.sizes.product_columns(device))

    def chunks(self, sizes: HeadSizes) -> Blocks:
        """All classes, and as many tokens as fit the memory of a block."""
        return self.sizes.chunks(sizes)

    def tiles(self, sizes: HeadSizes, together: bool) -> Blocks:
        """All tokens and a tile of the vocabulary."""
        return self.sizes.tiles(sizes, together)

    def scaled(self, grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """grad * factor, in place if the dtype is the same."""
        return grad.mul_(factor).to(dtype)


def _flops(x_shape: Any, w_shape: Any, *rest: Any, **kwargs: Any) -> int:
    return int(2 * x_shape[0] * x_shape[1] * w_shape[0])


# FlopCounterMode counts PyTorch's own products, not oneDNN's.
if (_operator := compat.onednn_operator()) is not None:
    register_flop_formula(_operator)(_flops)
