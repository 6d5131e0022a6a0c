"""Matrix products, on a CPU by the faster of the libraries that PyTorch carries.

PyTorch gives float32 products on x86 to MKL, which on processors of AMD leaves the AVX-512 units unused. oneDNN, which
PyTorch carries for compiled graphs, uses them: measured on an EPYC with 2 threads, 0.22 against 0.45 TFLOP/s for
384 x 512 by 512 x 1024. Both sum in float32, within the same bound. Which one is taken depends on the processor
alone, so that the same inputs give the same bits.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Products:
    """Products of matrices of one dtype on one device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.by_onednn = (
            dtype == torch.float32
            and device.type == "cpu"
            and bool(torch.backends.mkldnn.enabled)
            and onednn_is_faster()
        )

    def new(self, a_MK: Tensor, b_KN: Tensor) -> Tensor:
        """a @ b."""
        if not (self.by_onednn and a_MK.numel() and b_KN.numel()):
            return torch.mm(a_MK, b_KN)
        # A linear layer without bias, which takes its weight as [N, K]; fast where that is dense in either order.
        product: Tensor = torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.t(), None, "none", [], "")
        return product

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
            out_MN.addmm_(a_MK, b_KN)


@cache
def onednn_is_faster() -> bool:
    """Whether float32 products go to oneDNN on this processor: AMD's with AVX-512, where PyTorch would take MKL."""
    operators: Any = torch.ops.mkldnn
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in _processor()
        # An operator that Inductor's graphs call; it has no public name.
        and hasattr(operators, "_linear_pointwise")
    )


def _processor() -> str:
    """What tells whose processor this is: the first lines of Linux's list, elsewhere Python's own word."""
    listed = Path("/proc/cpuinfo")
    return listed.read_text()[:200] if listed.is_file() else platform.processor()
