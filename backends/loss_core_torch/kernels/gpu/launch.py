"""Launches of the kernels of `torch:triton`: device, memory layout, and constants of each kernel."""

# T = tokens (rows), V = vocabulary (of this rank)

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from loss_core.dispatch.protocol import BackendUnavailable
from loss_core_torch import compat
from loss_core_torch.kernels import Blocks, HeadSizes
from loss_core_torch.kernels.gpu import kernels, products, sizes
from loss_core_torch.kernels.gpu.sizes import LaunchParameters

# Triton reads TRITON_INTERPRET when the kernels are decorated, so this does not change within a process.
_INTERPRETED = not isinstance(kernels.row_kernel, triton.JITFunction)


class Layout(NamedTuple):
    """Layout of a tensor [..., V], a kernel's argument. Leading dimensions are merged where the strides allow it.

    Attributes:
        sizes: sizes of the leading dimensions, from the last to the second.
        strides: strides of all leading dimensions, from the last to the first, in elements.
        stride_v: stride of the vocabulary.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    stride_v: int


def layout(x: Tensor) -> Layout:
    """The layout of [..., V]. A matrix has no sizes, so that the offset of its rows needs no division."""
    return _layout(tuple(x.shape), x.stride())


# Called several times for each loss, with the same few layouts.
@lru_cache(maxsize=1024)
def _layout(shape: tuple[int, ...], strides: tuple[int, ...]) -> Layout:
    merged: list[tuple[int, int]] = []
    for size, stride in zip(shape[:-1], strides[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == stride * size:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    inner_first = merged[::-1] or [(1, 0)]
    merged_sizes, merged_strides = (tuple(column) for column in zip(*inner_first, strict=True))
    return Layout(merged_sizes[:-1], merged_strides, strides[-1])


def same_alignment(vector: int, *tensors: Tensor) -> bool:
    """Whether each row begins at the same offset, modulo `vector` columns, in all of these tensors [..., V]."""
    alignments = {_alignment(vector, x) for x in _with_memory(tensors)}
    return len(alignments) == 1 and None not in alignments


def _alignment(vector: int, x: Tensor) -> tuple[int, ...] | None:
    """What determines the offset of each row modulo `vector`; None if the columns are not contiguous."""
    x_layout = layout(x)
    if x_layout.stride_v != 1 or x.data_ptr() % x.itemsize:
        return None
    strides = tuple(stride % vector for stride in x_layout.strides)
    return (x.data_ptr() // x.itemsize % vector, *((*x_layout.sizes, *strides) if any(strides) else ()))


def column_constants(size: LaunchParameters, *tensors: Tensor) -> dict[str, int]:
    """Constants of a kernel's blocks over the columns of these tensors [..., V]."""
    if same_alignment(size.vector, *tensors):
        block_v, width = size.block_v, size.vector
    else:
        # Each column then has its own pointer: half a block, else registers spill.
        block_v, width = max(size.block_v // 2, 1), 1
    return {"BLOCK_V": block_v, "L": min(32 * size.num_warps, block_v // width), "W": width}


def piece_constants(size: LaunchParameters, vocab: int) -> dict[str, Any]:
    """Constants of the pieces of a row."""
    num_pieces = size.num_pieces(vocab)
    power_of_2 = triton.next_power_of_2(num_pieces)
    return {"NUM_PIECES": num_pieces, "P": power_of_2, "PIECE_V": size.piece_v, "PUBLISH_ONLY": False}


def new_partials(num_rows: int, num_pieces: int, like: Tensor) -> Tensor | None:
    """Memory where the programs of a row publish partial terms of the dtype of `like`; None for one piece."""
    if num_pieces == 1:
        return None
    bits = torch.int64 if like.dtype == torch.float64 else torch.int32
    shape = (num_rows, kernels.PARTIAL_TERMS.value, num_pieces)
    return torch.full(shape, kernels.UNPUBLISHED.value, dtype=bits, device=like.device)


def new_grad(logits: Tensor) -> Tensor:
    """Uninitialized contiguous memory for a gradient."""
    # Not empty_like, which would keep the strides.
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


# Dynamo would trace a launch in a backward that runs between two of its graphs.
@compat.outside_of_graphs
def launch(kernel: Any, grid: tuple[int, ...], *args: Any, size: LaunchParameters, **constants: Any) -> None:
    """Launch one kernel on the device of its first tensor.

    Raises:
        BackendUnavailable: if tensors are on a CPU and Triton does not interpret the kernels.
    """
    device = args[0].device
    check_device(device, _INTERPRETED)
    # Triton launches on the current device, which need not be the tensors'.
    on_device: AbstractContextManager[Any] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    warps = sizes.warps_on(size, amd=torch.version.hip is not None)
    args = _with_memory(args)
    # enable_fp_fusion is explicit, since Triton's default changes in 3.10.
    options = {"num_warps": warps, "num_stages": size.num_stages, "enable_fp_fusion": True}
    with on_device, compat.outside_of_functorch():
        if _INTERPRETED and constants.get("NUM_PIECES", 1) > 1:
            # The interpreter runs programs one after another. A first launch publishes all partial terms, so that no
            # program waits for those of a later one.
            kernel[grid](*args, **{**constants, "PUBLISH_ONLY": True}, **options)
        kernel[grid](*args, **constants, **options)


def _with_memory(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values without functorch's wrappers, which have no memory for a kernel to access."""
    return tuple(map(compat.without_wrappers, values)) if compat.in_functorch_transform() else values


def check_device(device: torch.device, interpreted: bool) -> None:
    """Raise BackendUnavailable for a CPU, unless kernels are interpreted."""
    if device.type == "cpu" and not interpreted:
        raise BackendUnavailable(
            "'torch:triton' got tensors on the cpu; it needs them on a GPU. Use 'torch:eager' for the CPU, or set "
            "TRITON_INTERPRET=1 before the first import to run the kernels there, slowly."
        )


class Launcher(NamedTuple):
    """How kernels are launched, and with which sizes. Tests and the offline compilation pass their own.

    Sizes are not autotuned: that would take host time in the first steps, and results would depend on the sizes found.

    Attributes:
        launch: launches one kernel; see `launch`.
        parameters: sizes of a launch; see `sizes.launch_parameters`.
        chunks: blocks of full rows of a fused loss; see `sizes.chunks`.
        tiles: its other blocks; see `sizes.tiles`.
        operand_dtype: dtype of the operands of matrix products; see `products.operand_dtype`.
    """

    launch: Callable[..., None] = launch
    parameters: Callable[..., LaunchParameters] = sizes.launch_parameters
    chunks: Callable[[HeadSizes], Blocks] = sizes.chunks
    tiles: Callable[[HeadSizes, bool], Blocks] = sizes.tiles
    operand_dtype: Callable[[torch.dtype, torch.device], torch.dtype] = products.operand_dtype


def contiguous(x_T: Tensor | None) -> Tensor | None:
    """The tensor stored contiguously: labels may be a column of a matrix, an upstream gradient an expanded scalar."""
    return None if x_T is None else x_T.contiguous()
