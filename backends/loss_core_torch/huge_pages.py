"""Memory for large results on Linux, in pages of 2 MiB.

A new tensor of 250 MiB is 64,000 pages of 4 KiB, and writing each for the first time costs a page fault: measured on
two cores, 43 ms in all, where the writing itself takes 4. In huge pages it is 8.

Not on a virtual machine that reports its free pages to the host, which then takes them away: it reports blocks of
2 MiB, those that huge pages come from, and seconds after they were freed they are gone. Measured on one, cross entropy
over 250 MiB of logits, call after call: 68 ms, with huge pages 35; with six seconds between the calls: 72, and 420.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# 1 or 0: to ask for huge pages, or not to, whatever machine this is.
VARIABLE = "LOSS_CORE_HUGE_PAGES"

_BALLOONS = Path("/sys/bus/virtio/drivers/virtio_balloon")
# VIRTIO_BALLOON_F_REPORTING: its place in the string of feature bits.
_REPORTING = 5

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
    """The C library's madvise, None where huge pages are not to be asked for."""
    if not hasattr(mmap, "MADV_HUGEPAGE") or not _wanted():
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def _wanted() -> bool:
    named = os.environ.get(VARIABLE, "")
    if named not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {named!r}.")
    return named == "1" if named else not _free_pages_are_reported()


def _free_pages_are_reported() -> bool:
    """Whether this is a virtual machine that tells its host which pages are free."""
    try:
        features = [path.read_text() for path in _BALLOONS.glob("virtio*/features")]
    except OSError:
        return False
    return any(bits[_REPORTING : _REPORTING + 1] == "1" for bits in features)
