"""Matrix products of the fused loss on GPUs: the vendor's, of 16-bit operands into float32 where it can."""

from __future__ import annotations

import torch
from torch import Tensor

from loss_core_torch.tracing import compute_dtype


def operand_dtype(product_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Dtype in which the logits' gradient enters its two products.

    Args:
        product_dtype: to which hidden states and weight are rounded.
        device: GPUs multiply 16-bit operands many times faster; elsewhere it is the dtype of the arithmetic.
    """
    if device.type == "cuda" and _multiplies_into_float32():
        return product_dtype
    return compute_dtype(product_dtype)


def _multiplies_into_float32() -> bool:
    """Whether torch multiplies 16-bit matrices into a float32 one on this kind of GPU.

    Its out_dtype= overloads raise on ROCm ("float output with half input is not enabled") and under TunableOp
    (aten/src/ATen/native/cuda/Blas.cpp); float32 operands serve there.
    """
    return torch.version.hip is None and not torch.cuda.tunable.is_enabled()


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a @ b, or out += a @ b, in out's dtype whatever that of the operands; no temporary of out's size.

    Read in torch's sources, not run on a GPU yet: out_dtype= exists on CUDA alone, for float32 from float16 or
    bfloat16, with any transposition of the operands. `mm` passes `out` on as the addend with beta 0, which is not
    read, NaN or not. `addmm` takes a float32 addend since pull request 167931 (November 2025; before, only one of the
    operands' dtype), and copies it only where it is another tensor than `out`.
    """
    if a.dtype == out.dtype or a.device.type != "cuda":
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=float(add), out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
