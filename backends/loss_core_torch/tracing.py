"""Whether a call is traced, transformed or differentiated, whether values are readable; the dtype of the arithmetic.

Use `torch.compiler.is_dynamo_compiling` here and everywhere to detect compilation: `is_compiling` is true in every
thread while one compiles.
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
    """Whether a call is traced, or differentiated or batched by torch.func: its results then alias no real memory."""
    return is_traced(*tensors) or compat.in_functorch_transform()


def is_readable(x: Tensor) -> bool:
    """Whether the host may read the values of x: on a CPU, outside of traces and torch.func transforms.

    On an accelerator, reading a value would be a host synchronisation. A LocalTensor stands for the tensors of many
    ranks, whose values differ.
    """
    if x.device.type != "cpu" or is_transformed(x):
        return False
    return type(x) in (Tensor, torch.nn.Parameter) or not hasattr(x, "_local_tensors")


def is_differentiated(x: Tensor) -> bool:
    """Whether a gradient with respect to x may be needed."""
    # Under Dynamo, a torch.func transform does not show in requires_grad.
    return torch.is_grad_enabled() and (x.requires_grad or compat.in_functorch_transform())


def as_normal_tensor(x: Tensor) -> Tensor:
    """x, or for an inference tensor outside of inference mode an alias of it that autograd can save."""
    if torch.compiler.is_dynamo_compiling() or not x.is_inference() or torch.is_inference_mode_enabled():
        return x
    alias = torch.empty(0, dtype=x.dtype, device=x.device)
    return alias.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def no_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Context without autocast on the device of `like`: kernels choose the dtypes of their operations themselves."""
    if like.is_meta or not torch.is_autocast_enabled(like.device.type):
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)
