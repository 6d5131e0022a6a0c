"""Starting kernels of `torch:triton`: on which device, for which layout of memory, in how many programs."""

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

# Triton decides when the kernels are decorated, so this holds for the life of the process.
_INTERPRETED = not isinstance(kernels.row_kernel, triton.JITFunction)


class Layout(NamedTuple):
    """How a kernel finds the rows of a tensor [..., V]; handed to it as it is.

    Attributes:
        sizes: of the leading dimensions, from the last to the second; as few as walk through the rows in C order.
        strides: of all leading dimensions, from the last to the first, in elements.
        stride_v: of the vocabulary.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    stride_v: int


def layout(x: Tensor) -> Layout:
    """The layout of [..., V]. A plain matrix has no sizes: its rows need no division."""
    return _layout(tuple(x.shape), x.stride())


# Asked several times in each call, for the same few layouts.
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
    sizes_, steps = (tuple(column) for column in zip(*inner_first, strict=True))
    return Layout(sizes_[:-1], steps, strides[-1])


def alike(vector: int, *tensors: Tensor) -> bool:
    """Whether rows of these tensors [..., V] begin at the same place between two multiples of `vector` columns."""
    places = {_place(vector, x) for x in _with_memory(tensors)}
    return len(places) == 1 and None not in places


def _place(vector: int, x: Tensor) -> tuple[int, ...] | None:
    """Of each row, as far as the layout tells; None where columns do not lie side by side."""
    where = layout(x)
    if where.stride_v != 1 or x.data_ptr() % x.itemsize:
        return None
    steps = tuple(stride % vector for stride in where.strides)
    return (x.data_ptr() // x.itemsize % vector, *((*where.sizes, *steps) if any(steps) else ()))


def columns(size: LaunchParameters, *tensors: Tensor) -> dict[str, Any]:
    """Constants of how a kernel walks through the columns of these tensors [..., V]."""
    if alike(size.vector, *tensors):
        block_v, width, vectors = size.block_v, size.vector, True
    else:
        # Each column then has a pointer of its own: half of them, else registers spill.
        block_v, width, vectors = max(size.block_v // 2, 1), 1, False
    return {"BLOCK_V": block_v, "L": min(32 * size.num_warps, block_v // width), "W": width, "ALIKE": vectors}


def pieces(size: LaunchParameters, vocab: int) -> dict[str, Any]:
    """Constants of how programs share a row."""
    number = size.pieces(vocab)
    power_of_2 = 1 << (number - 1).bit_length()
    return {"PIECES": number, "P": power_of_2, "PIECE_V": size.piece_v, "TELL_ONLY": False}


def untold(num_rows: int, num_pieces: int, like: Tensor) -> Tensor | None:
    """Where programs that share a row tell each other numbers of the dtype of `like`; None where none do."""
    if num_pieces == 1:
        return None
    bits = torch.int64 if like.dtype == torch.float64 else torch.int32
    shape = (num_rows, kernels.TOLD.value, num_pieces)
    return torch.full(shape, kernels.UNTOLD.value, dtype=bits, device=like.device)


# Dynamo would follow a launch that it meets in a backward between two of its graphs.
@compat.outside_of_graphs
def start(kernel: Any, grid: tuple[int, ...], *args: Any, size: LaunchParameters, **constants: Any) -> None:
    """Start one kernel on the device of its first tensor.

    Raises:
        BackendUnavailable: tensors on a CPU, where kernels run in Triton's interpreter alone.
    """
    device = args[0].device
    check_device(device, _INTERPRETED)
    # Triton launches on the current device, which need not be the tensors'.
    here: AbstractContextManager[Any] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    warps = sizes.warps_on(size, amd=torch.version.hip is not None)
    args = _with_memory(args)
    # Spelled out: Triton's default for products that are added to changes in 3.10.
    options = {"num_warps": warps, "num_stages": size.num_stages, "enable_fp_fusion": True}
    with here, compat.outside_of_functorch():
        if _INTERPRETED and constants.get("PIECES", 1) > 1:
            # Programs run one after another there: a round before lets none wait for one behind it.
            kernel[grid](*args, **{**constants, "TELL_ONLY": True}, **options)
        kernel[grid](*args, **constants, **options)


def _with_memory(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """A kernel takes memory, and a tensor that functorch has wrapped has none of its own."""
    return tuple(map(compat.without_wrappers, values)) if compat.in_functorch_transform() else values


def check_device(device: torch.device, interpreted: bool) -> None:
    """Refuse tensors on a CPU, unless kernels are interpreted."""
    if device.type == "cpu" and not interpreted:
        raise BackendUnavailable(
            "'torch:triton' got tensors on the cpu; it needs them on a GPU. Use 'torch:eager' for the CPU, or set "
            "TRITON_INTERPRET=1 before the first import to run the kernels there, slowly."
        )


class Launcher(NamedTuple):
    """What decides how kernels are launched. Tests, and the compilation without a GPU, bring their own.

    Nothing is tuned at run time: that would cost the host time in the first steps, and results would depend on which
    sizes won.

    Attributes:
        start: starts one kernel; see `start`.
        parameters: sizes of a launch; see `sizes.launch_parameters`.
        chunks: blocks of a fused loss that have whole rows; see `sizes.chunks`.
        tiles: its other blocks; see `sizes.tiles`.
        operand_dtype: dtype of the operands of matrix products; see `products.operand_dtype`.
    """

    start: Callable[..., None] = start
    parameters: Callable[..., LaunchParameters] = sizes.launch_parameters
    chunks: Callable[[HeadSizes], Blocks] = sizes.chunks
    tiles: Callable[[HeadSizes, bool], Blocks] = sizes.tiles
    operand_dtype: Callable[[torch.dtype, torch.device], torch.dtype] = products.operand_dtype


def dense(x_T: Tensor | None) -> Tensor | None:
    """One entry per row, side by side: labels may be a column of a matrix, an upstream gradient one number expanded."""
    return None if x_T is None else x_T.contiguous()
