"""Matrix products of the fused loss on GPUs: the vendor's, of 16-bit operands into float32 where it can."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from loss_core_torch.tracing import compute_dtype


def operand_dtype(product_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Dtype in which the logits' gradient enters its two products.

    Args:
        product_dtype: to which hidden states and weight are rounded.
        device: GPUs multiply 16-bit operands many times faster; elsewhere it is the dtype of the arithmetic.
    """
    # Under TunableOp out_dtype= raises, too, and it may be turned on at any time.
    if device.type == "cuda" and not torch.cuda.tunable.is_enabled() and adds_to_float32(device):
        return product_dtype
    return compute_dtype(product_dtype)


@cache
def adds_to_float32(device: torch.device) -> bool:
    """Whether torch adds a product of 16-bit matrices to a float32 one on this device; tried once per process.

    What takes no float32 addend would raise in the second chunk of a training step only. ROCm takes no out_dtype= at
    all ("float output with half input is not enabled", aten/src/ATen/native/cuda/Blas.cpp).
    """
    a, total = (torch.zeros((16, 16), dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.float32))
    try:
        multiply(a, a, total, add=True)
    except (RuntimeError, TypeError):
        return False
    return True


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a @ b, or out += a @ b, in out's dtype whatever that of the operands; no temporary of out's size.

    out_dtype= exists on CUDA alone, for float32 from float16 or bfloat16, with any transposition of the operands (run
    with torch 2.11 on an H200). `mm` passes `out` on as the addend with beta 0, which is not read, NaN or not. `addmm`
    takes a float32 addend since pull request 167931 (November 2025; before, only one of the operands' dtype), and
    copies it only where it is another tensor than `out`.
    """
    if a.dtype == out.dtype or a.device.type == "cpu":
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=float(add), out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


class Products:
    """See `kernels.Products`: operands of any dtype, out in float32, float64 or theirs."""

    columns = 0

    def into(self, out_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
        multiply(a_MK, b_KN, out_MN)

    def add(self, out_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
        multiply(a_MK, b_KN, out_MN, add=True)

    def turned(self, b_KN: Tensor) -> Tensor:
        return b_KN

    def accumulate(self, out_MN: Tensor, a_KM: Tensor, b_KN: Tensor, turned: Tensor, first: bool, last: bool) -> None:
        multiply(a_KM.t(), b_KN, out_MN, add=not first)
