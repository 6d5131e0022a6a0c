"""Matrix products, on a CPU by the faster of the libraries that PyTorch carries.

PyTorch gives float32 products on x86 to MKL, which on processors of AMD leaves the AVX-512 units unused. oneDNN, which
PyTorch carries for compiled graphs, uses them: measured on an EPYC with 2 threads, 0.22 against 0.45 TFLOP/s for
384 x 512 by 512 x 1024. Both sum in float32, within the same bound. Which one is taken depends on the processor
alone, so that the same inputs give the same bits.
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
    """Products of matrices of one dtype on one device.

    Args:
        by_onednn: whether oneDNN makes them; None: where it is the faster.
        columns: most classes of one product; 0: any number.
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
        # A matrix that is a part of a wider one goes to a reference kernel, at a thousandth of the speed.
        b_KN = b_KN if b_KN.t().is_contiguous() else b_KN.contiguous()
        return compat.onednn_product(a_MK.contiguous(), b_KN)

    def into(self, out_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
        """out = a @ b, where out shares no memory with a or b."""
        if self.by_onednn:
            out_MN.copy_(self.new(a_MK, b_KN))
        else:
            torch.mm(a_MK, b_KN, out=out_MN)

    def add(self, out_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
        """out += a @ b."""
        if self.by_onednn:
            out_MN.add_(self.new(a_MK, b_KN))
        else:
            # Not addmm_, which FlopCounterMode does not count.
            torch.addmm(out_MN, a_MK, b_KN, out=out_MN)

    def turned(self, b_KN: Tensor) -> Tensor:
        """The transpose of b, contiguous, where `accumulate` uses it."""
        return b_KN.t().contiguous() if self.by_onednn else b_KN

    def accumulate(self, out_MN: Tensor, a_KM: Tensor, b_KN: Tensor, b_NK: Tensor, first: bool, last: bool) -> None:
        """One of the products of a sum: out = a.T @ b for the first, out += a.T @ b for the others.

        oneDNN wants the left operand dense as it is, and takes the right one in either order: to multiply by a.T from
        the left it would be transposed each time. So the transpose of the sum is made, b.T @ a, and turned once.

        Args:
            b_NK: `turned(b)`.
            first, last: of the sum. Before the last, out holds what belongs to this method.
        """
        if not self.by_onednn:
            if first:
                self.into(out_MN, a_KM.t(), b_KN)
            else:
                self.add(out_MN, a_KM.t(), b_KN)
            return
        kept_NM = out_MN.view(out_MN.shape[1], out_MN.shape[0])
        new_NM = self.new(b_NK, a_KM)
        if last:
            out_MN.copy_((new_NM if first else new_NM.add_(kept_NM)).t())
        elif first:
            kept_NM.copy_(new_NM)
        else:
            kept_NM.add_(new_NM)


class ProductKernels:
    """What a `KernelSet` lends to products."""

    sizes: Sizes

    def operand_dtype(self, product_dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """That of the arithmetic, on every device."""
        return compute_dtype(product_dtype)

    def products(self, operand_dtype: torch.dtype, device: torch.device) -> Products:
        """Those of the library that is faster."""
        return Products(operand_dtype, device, columns=self.sizes.product_columns(device))

    def chunks(self, sizes: HeadSizes) -> Blocks:
        """As many tokens as the memory of a block holds."""
        return self.sizes.chunks(sizes)

    def tiles(self, sizes: HeadSizes, together: bool) -> Blocks:
        """All tokens and a tile of the vocabulary."""
        return self.sizes.tiles(sizes, together)

    def scaled(self, grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """A gradient times a scalar, in its memory if the dtype is the same."""
        return grad.mul_(factor).to(dtype)


def _flops(x_shape: Any, w_shape: Any, *rest: Any, **kwargs: Any) -> int:
    return int(2 * x_shape[0] * x_shape[1] * w_shape[0])


# FlopCounterMode knows PyTorch's own products, not oneDNN's.
if (_operator := compat.onednn_operator()) is not None:
    register_flop_formula(_operator)(_flops)
