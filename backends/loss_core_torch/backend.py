"""Which kernel of this backend makes which loss, what can be used here, and how a loss is run on NumPy inputs."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loss_core.backend import Evaluation, FlagStatus, KernelChoice, install_line, parse_flag
from loss_core.config import (
    FusedLinearCEConfig,
    KDLossConfig,
    LossConfig,
    MaskedCrossEntropyConfig,
    TEParallelCEConfig,
)
from loss_core_torch import kernels, te
from loss_core_torch.modules import FusedLinearCrossEntropy, KDLoss, MaskedCrossEntropy, TEParallelCrossEntropy
from loss_core_torch.values import compute_dtype

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def _masked(c: MaskedCrossEntropyConfig) -> MaskedCrossEntropy:
    return MaskedCrossEntropy(c.fp32_upcast, c.ignore_index, c.reduction, c.tp_group)


def _fused(c: FusedLinearCEConfig) -> FusedLinearCrossEntropy:
    return FusedLinearCrossEntropy(c.ignore_index, c.logit_softcapping, c.reduction, c.tp_group, c.sequence_parallel)


def _parallel(c: TEParallelCEConfig) -> TEParallelCrossEntropy:
    return TEParallelCrossEntropy(c.ignore_index, c.reduction, c.tp_group)


def _distillation(c: KDLossConfig) -> KDLoss:
    return KDLoss(c.ignore_index, c.temperature, c.fp32_upcast, c.tp_group, c.chunk_size)


_BUILDERS: dict[tuple[type[LossConfig], str], Callable[[Any], Any]] = {
    (MaskedCrossEntropyConfig, "eager"): _masked,
    (FusedLinearCEConfig, "eager"): _fused,
    (TEParallelCEConfig, "eager"): _parallel,
    (KDLossConfig, "eager"): _distillation,
    (MaskedCrossEntropyConfig, "triton"): _masked,
    (FusedLinearCEConfig, "triton"): _fused,
    (TEParallelCEConfig, "triton"): _parallel,
    (KDLossConfig, "triton"): _distillation,
    (MaskedCrossEntropyConfig, "te"): _masked,
    (TEParallelCEConfig, "te"): _parallel,
}


def builders() -> Mapping[tuple[type[LossConfig], str], Callable[[Any], Any]]:
    """The table (config class, kernel) -> builder."""
    return _BUILDERS


def kernel_status(kernel: str) -> FlagStatus:
    """Whether a kernel can be used here, and why not."""
    if kernel == "te":
        return te.status()
    flag, version = f"torch:{kernel}", f"torch {torch.__version__}"
    if kernel == "triton":
        return _triton_status(flag)
    if any(name == kernel for _, name in _BUILDERS):
        return FlagStatus(flag, True, "", version, "")
    return FlagStatus(flag, False, f"'{flag}' has no kernels in this version of loss-core: use 'torch:eager'.", "", "")


def _triton_status(flag: str) -> FlagStatus:
    """`torch:triton` needs Triton, and a GPU or Triton's interpreter."""
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        install = install_line("triton")
        return FlagStatus(flag, False, f"'{flag}' needs triton ({error}): {install}", "", install)
    version = f"triton {triton.__version__}"
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return FlagStatus(flag, True, "", version, "")
    reason = (
        f"'{flag}' needs an NVIDIA or AMD GPU, and torch sees none here: use 'torch:eager'. With TRITON_INTERPRET=1 "
        "in the environment it runs on the CPU, slowly, for tests."
    )
    return FlagStatus(flag, False, reason, version, "")


def choose_kernel(config: LossConfig, candidates: tuple[str, ...]) -> KernelChoice:
    """What `auto` takes: eager, which runs on every device; a loss is built before it sees a tensor."""
    if len(candidates) == 1:
        return KernelChoice(
            f"torch:{candidates[0]}", f"the only kernel for {type(config).__name__} that can be used here"
        )
    others = ", ".join(f"torch:{name}" for name in candidates[1:])
    return KernelChoice(f"torch:{candidates[0]}", f"runs on every device; {others} when named")


def evaluate(
    loss: Any,
    arrays: Mapping[str, NDArray[Any]],
    *,
    dtype: str,
    upstream: NDArray[Any] | None,
    grad_of: tuple[str, ...],
    device: str | None = None,
) -> Evaluation:
    """Run a built loss and its gradient on NumPy inputs; see `loss_core.backend.Backend.evaluate`."""
    where = torch.device(device or "cpu")
    inputs = {name: _to_tensor(value, _DTYPES[dtype], where) for name, value in arrays.items()}
    before = {name: value.detach().clone() for name, value in inputs.items()}
    for name in grad_of:
        inputs[name].requires_grad_()
    result = loss(**inputs)
    seed = torch.ones_like(result) if upstream is None else torch.as_tensor(upstream).to(result)
    grads = torch.autograd.grad(result, [inputs[name] for name in grad_of], seed, materialize_grads=False)
    mutated = tuple(name for name, value in inputs.items() if not _same(value.detach(), before[name]))
    results = {"loss": result.detach(), **dict(zip(grad_of, grads, strict=True))}
    return Evaluation(
        loss=_to_numpy(result.detach()),
        grads={name: _to_numpy(results[name]) for name in grad_of},
        dtypes={name: str(value.dtype).removeprefix("torch.") for name, value in results.items()},
        mutated=mutated,
        kernel=getattr(loss, "kernel_choice", KernelChoice("", "")).flag,
        product_dtype=_product_dtype(loss, _DTYPES[dtype], where),
    )


def _product_dtype(loss: Any, dtype: torch.dtype, device: torch.device) -> str | None:
    """Dtype to which the kernels of a fused loss round the logits' gradient, None where they do not."""
    if not isinstance(loss, FusedLinearCrossEntropy):
        return None
    operand = kernels.find(parse_flag(loss.kernel_choice.flag).kernel).operand_dtype(dtype, device)
    return None if operand == compute_dtype(dtype) else str(operand).removeprefix("torch.")


def _to_tensor(value: NDArray[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    value = np.asarray(value)
    source = torch.from_numpy(np.ascontiguousarray(value)).reshape(value.shape)
    target = dtype if value.dtype.kind == "f" else source.dtype
    if value.flags.c_contiguous:
        return source.to(device=device, dtype=target, copy=True)
    # A sliced NumPy array becomes a tensor with the same strides: kernels must cope with them.
    strides = [stride // value.itemsize for stride in value.strides]
    return torch.empty_strided(value.shape, strides, dtype=target, device=device).copy_(source)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) if a.is_floating_point() else torch.equal(a, b)


def _to_numpy(value: torch.Tensor) -> NDArray[np.float64]:
    return value.detach().to(device="cpu", dtype=torch.float64).numpy()
