"""What may be asked of a tensor: its values, or only its shape; and the dtype of the arithmetic for it.

That a call is being compiled is asked of `torch.compiler.is_dynamo_compiling`, here and everywhere: `is_compiling` is
true in every thread while one compiles.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from loss_core_torch import compat


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the arithmetic inside: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_traced(*tensors: Tensor) -> bool:
    """Whether a call records rather than computes: torch.compile, make_fx, fake or meta tensors."""
    if torch.compiler.is_dynamo_compiling():
        return True
    for mode in compat.MODES:
        if compat.dispatch_mode(mode) is not None:
            return True
    return any(x.is_meta or isinstance(x, compat.FakeTensor) for x in tensors)


def is_transformed(*tensors: Tensor) -> bool:
    """Whether a call is traced, or differentiated or batched by torch.func: what it makes is no memory to hand on."""
    return is_traced(*tensors) or compat.in_functorch_transform()


def may_read(x: Tensor) -> bool:
    """Whether the program may depend on values: on a CPU, outside of traces and torch.func transforms.

    On an accelerator, reading a value would be a host synchronisation. A tensor that one process holds for many ranks
    (LocalTensorMode) has no one value.
    """
    if x.device.type != "cpu" or is_transformed(x):
        return False
    return type(x) in (Tensor, torch.nn.Parameter) or not hasattr(x, "_local_tensors")


def is_differentiated(x: Tensor) -> bool:
    """Whether a gradient by x may be asked for."""
    # Under Dynamo, a torch.func transform does not show in requires_grad.
    return torch.is_grad_enabled() and (x.requires_grad or compat.in_functorch_transform())


def ordinary(x: Tensor) -> Tensor:
    """x, or where x was made under torch.inference_mode a tensor on the same memory that autograd can save."""
    if torch.compiler.is_dynamo_compiling() or not x.is_inference() or torch.is_inference_mode_enabled():
        return x
    alias = torch.empty(0, dtype=x.dtype, device=x.device)
    return alias.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def no_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Kernels choose their own dtypes; autocast must not change them from outside."""
    if like.is_meta or not torch.is_autocast_enabled(like.device.type):
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)
