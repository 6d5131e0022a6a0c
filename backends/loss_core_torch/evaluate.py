"""A built loss and its gradients, run on NumPy inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loss_core.dispatch.observed import names, observing
from loss_core.dispatch.protocol import Evaluation
from loss_core_torch.modules.linear import HeadModule
from loss_core_torch.tracing import compute_dtype

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def evaluate(
    loss: Any,
    arrays: Mapping[str, NDArray[Any]],
    *,
    dtype: str,
    upstream: NDArray[Any] | None,
    grad_of: tuple[str, ...],
    device: str | None = None,
) -> Evaluation:
    """Run a built loss and its gradient on NumPy inputs; see `loss_core.dispatch.protocol.Backend.evaluate`."""
    where = torch.device(device or "cpu")
    inputs = {name: _to_tensor(value, _DTYPES[dtype], where) for name, value in arrays.items()}
    before = {name: value.detach().clone() for name, value in inputs.items()}
    for name in grad_of:
        inputs[name].requires_grad_()
    passed = dict(inputs)
    if getattr(loss, "inplace_grad", False):
        # No leaf may be overwritten: the loss gets what an operation made of it, with the same strides.
        leaf = inputs["logits"]
        passed["logits"] = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=where).copy_(leaf)
    with observing() as seen:
        result = as_one(loss(**passed))
        seed = torch.ones_like(result) if upstream is None else torch.as_tensor(upstream).to(result)
        grads = torch.autograd.grad(result, [inputs[name] for name in grad_of], seed, materialize_grads=False)
    mutated = tuple(name for name, value in inputs.items() if not _same(value.detach(), before[name]))
    results = {"loss": result.detach(), **dict(zip(grad_of, grads, strict=True))}
    return Evaluation(
        loss=_to_numpy(result.detach()),
        grads={name: _to_numpy(results[name]) for name in grad_of},
        dtypes={name: str(value.dtype).removeprefix("torch.") for name, value in results.items()},
        mutated=mutated,
        kernel=names(seen),
        product_dtype=_product_dtype(loss, _DTYPES[dtype], where),
    )


def as_one(result: Any) -> torch.Tensor:
    """A result as one tensor: those of several, and metrics by name behind a loss, are stacked in front."""
    if isinstance(result, torch.Tensor):
        return result
    first, *others = (x for x in result if x is not None)
    others = [x for other in others for x in _listed(other)]
    return torch.stack([first, *(x.to(first.dtype).expand_as(first) for x in others)]) if others else first


def _listed(result: Any) -> list[Any]:
    return [result[name] for name in sorted(result)] if isinstance(result, dict) else [result]


def _product_dtype(loss: Any, dtype: torch.dtype, device: torch.device) -> str | None:
    """Dtype to which the kernels of a fused loss round the logits' gradient, None where they do not."""
    if not isinstance(loss, HeadModule):
        return None
    operand = loss.operand_dtype(dtype, device)
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
    """Whether two tensors hold the same bits, NaN included."""
    bits = (x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(*bits)


def _to_numpy(value: torch.Tensor) -> NDArray[np.float64]:
    return value.detach().to(device="cpu", dtype=torch.float64).numpy()
