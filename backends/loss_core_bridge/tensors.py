"""Conversion between torch tensors and JAX or NumPy arrays: dtypes, DLPack, and checks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from loss_core import BackendUnavailable

# The dtypes of loss arguments that both frameworks have.
NUMPY_DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.bool: np.dtype(np.bool_),
    torch.int8: np.dtype(np.int8),
    torch.int16: np.dtype(np.int16),
    torch.int32: np.dtype(np.int32),
    torch.int64: np.dtype(np.int64),
    torch.uint8: np.dtype(np.uint8),
    torch.uint16: np.dtype(np.uint16),
    torch.uint32: np.dtype(np.uint32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(jnp.bfloat16),
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}
TORCH_DTYPES = {numpy: of_torch for of_torch, numpy in NUMPY_DTYPES.items()}

INT32 = np.iinfo(np.int32)

# XLA's CPU programs require it; JAX copies a buffer that is not aligned, with a line on stderr each time.
_CPU_ALIGNMENT = 64


def check_tensor(name: str, tensor: torch.Tensor) -> None:
    """Raise for a tensor that can't be converted to a jax.Array.

    Raises:
        TypeError: a DTensor, fake, meta, functorch-wrapped or sparse tensor, or a dtype not in `NUMPY_DTYPES`.
        ValueError: on a device that DLPack does not connect to JAX.
    """
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(
            f"{name} is a {type(tensor).__name__}; a JAX loss takes plain tensors. For a DTensor pass "
            f"{name}.full_tensor() (or .to_local(), if the loss is meant per rank), or use a torch backend."
        )
    if tensor.is_meta:
        raise TypeError(f"{name} is a meta tensor, which holds no data; a JAX loss needs a tensor on cpu or cuda.")
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise TypeError(
            f"{name} is inside a torch.func transform (grad, vmap, jvp), which can't see into JAX; use jax.grad or "
            "jax.vmap on the JAX loss, or a torch backend."
        )
    if tensor.layout is not torch.strided or tensor.dtype not in NUMPY_DTYPES:
        raise TypeError(
            f"{name} is {tensor.dtype} in layout {tensor.layout}; a JAX loss takes strided tensors of "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in NUMPY_DTYPES)}."
        )
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} is on {tensor.device}; the JAX bridge takes tensors on cpu or cuda.")


def check_platform(device: torch.device) -> None:
    """Raise BackendUnavailable when this JAX has no backend for a torch device."""
    platforms = ("cpu",) if device.type == "cpu" else ("rocm",) if torch.version.hip else ("cuda",)
    try:
        jax.devices(*platforms)
    except RuntimeError as error:
        raise BackendUnavailable(
            f"the tensors are on {device}, but JAX has no {platforms[0]} backend here ({error}): "
            "pip install 'jax[cuda13]' (or the extra for this machine), or move the tensors."
        ) from error


def to_jax(name: str, tensor: torch.Tensor, *, x64: bool) -> jax.Array:
    """The tensor as an array: the same memory if it is contiguous (and, on CPU, aligned), else a copy.

    Args:
        x64: keep 64-bit integers, under `jax.enable_x64`. Otherwise they are copied as int32: values that do not fit
            are a ValueError on CPU and saturate elsewhere, where reading them would cost a synchronisation.
    """
    tensor = tensor.detach().resolve_neg()
    if tensor.dtype == torch.int64 and not x64:
        tensor = _as_int32(name, tensor)
    tensor = tensor.contiguous()
    if tensor.device.type == "cpu" and tensor.data_ptr() % _CPU_ALIGNMENT:
        tensor = tensor.clone()
    return jax.dlpack.from_dlpack(tensor)


def _as_int32(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type != "cpu":
        # A label that saturates is still out of range, so that its loss is NaN.
        return tensor.clamp(INT32.min, INT32.max).to(torch.int32)
    narrow = tensor.to(torch.int32)
    differs = (narrow != tensor).nonzero()
    if len(differs):
        position = tuple(differs[0].tolist())
        raise ValueError(
            f"{name}{list(position) if position else ''} is {tensor[position].item()}, which does not fit JAX's int32 "
            f"({INT32.min} to {INT32.max}). Correct the value, or set jax.config.update('jax_enable_x64', True)."
        )
    return narrow


def to_torch(array: jax.Array) -> torch.Tensor:
    """The array as a tensor on the same memory."""
    # torch reads CPU memory immediately: there is no stream on which it could wait for JAX.
    if on_cpu(array):
        array.block_until_ready()
    tensor: torch.Tensor = torch.from_dlpack(array)  # type: ignore[attr-defined]
    return tensor


def on_cpu(array: jax.Array) -> bool:
    """Whether an array is on the CPU."""
    return all(device.platform == "cpu" for device in array.devices())


def numpy_to_torch(array: np.ndarray[Any, Any], device: str) -> torch.Tensor:
    """A copy of a NumPy array as a tensor."""
    copied = np.array(array, order="C", copy=True)
    if copied.dtype == jnp.bfloat16:
        return torch.from_numpy(copied.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(copied).to(device)


def torch_to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor as a NumPy array, which shares its memory if the tensor is on the CPU and contiguous."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()
