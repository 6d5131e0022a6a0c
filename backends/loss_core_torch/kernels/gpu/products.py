"""Matrix products of the fused loss on GPUs: the vendor library's, of 16-bit operands into float32 if supported."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from loss_core_torch.tracing import compute_dtype


def operand_dtype(product_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Dtype in which the logits' gradient enters its two products.

    Args:
        product_dtype: dtype to which hidden states and weight are rounded.
        device: a GPU, which multiplies 16-bit operands many times faster; elsewhere the result is `compute_dtype`.
    """
    # With TunableOp, which may be enabled at any time, out_dtype= raises.
    if device.type == "cuda" and not torch.cuda.tunable.is_enabled() and adds_to_float32(device):
        return product_dtype
    return compute_dtype(product_dtype)


@cache
def adds_to_float32(device: torch.device) -> bool:
    """Whether torch adds a product of 16-bit matrices to a float32 one on this device; tried once per process.

    Without support for a float32 addend, a training step would raise in its second chunk only. ROCm does not support
    out_dtype= ("float output with half input is not enabled", aten/src/ATen/native/cuda/Blas.cpp).
    """
    a, out = (torch.zeros((16, 16), dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.float32))
    try:
        multiply(a, a, out, add=True)
    except (RuntimeError, TypeError):
        return False
    return True


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a @ b, or out += a @ b, in out's dtype for operands of any dtype, without a temporary of out's size.

    out_dtype= is supported on CUDA only, for float32 from float16 or bfloat16, with any transposition of the operands
    (run with torch 2.11 on an H200). `mm` passes `out` as the addend with beta 0, which is not read, NaN or not.
    `addmm` accepts a float32 addend since pull request 167931 (November 2025; before, only one of the operands' dtype),
    and copies it only if it is not `out` itself.
    """
    if a.dtype == out.dtype or a.device.type == "cpu":
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=float(add), out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


class Products:
    """See `kernels.Products`: operands of any dtype, out in float32, float64 or the operands' dtype."""

    columns = 0

    def into(self, out_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
        multiply(a_MK, b_KN, out_MN)

    def add(self, out_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
        multiply(a_MK, b_KN, out_MN, add=True)

    def turned(self, b_KN: Tensor) -> Tensor:
        return b_KN

    def accumulate(self, out_MN: Tensor, a_KM: Tensor, b_KN: Tensor, turned: Tensor, first: bool, last: bool) -> None:
        multiply(a_KM.t(), b_KN, out_MN, add=not first)
