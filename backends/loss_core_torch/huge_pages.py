"""Memory for large results on Linux, in pages of 2 MiB.

A new tensor of 250 MiB is 64,000 pages of 4 KiB, and writing each for the first time costs a page fault: measured,
100 ms, where the writing itself takes 8. In huge pages it is 16.
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

import torch
from torch import Tensor

# malloc gives every request of this size a mapping of its own (its largest threshold), so that the advice ends
# with the tensor.
_LARGE = 32 << 20


def empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty, advised to the kernel as huge pages where that helps; the same values (none) in any case."""
    x = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and x.nbytes >= _LARGE and (advise := _madvise()):
        first = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (x.data_ptr() + x.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        # Only advice: where the kernel refuses it, ordinary pages do.
        advise(first, last - first, mmap.MADV_HUGEPAGE)
    return x


@cache
def _madvise() -> Any:
    """The C library's madvise, None where there are no huge pages to ask for."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
