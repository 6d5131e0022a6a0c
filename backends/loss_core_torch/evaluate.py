"""Runs a built loss and its gradients on NumPy inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loss_core.dispatch.observed import names, observing
from loss_core.dispatch.protocol import Evaluation
from loss_core_torch import compat
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
    backwards: int = 1,
    leaves: bool = True,
) -> Evaluation:
    """Run a built loss and its gradient on NumPy inputs; see `loss_core.dispatch.protocol.Backend.evaluate`."""
    where = torch.device(device or "cpu")
    inputs = {name: _to_tensor(value, _DTYPES[dtype], where) for name, value in arrays.items()}
    before = {name: value.detach().clone() for name, value in inputs.items()}
    for name in grad_of:
        inputs[name].requires_grad_()
    # inplace_grad refuses leaf tensors: the loss is called with a differentiable copy.
    copied = grad_of if not leaves else ("logits",) if getattr(loss, "inplace_grad", False) else ()
    passed = {name: _copy(value) if name in copied else value for name, value in inputs.items()}
    with observing() as seen:
        result = as_one(loss(**passed))
        seed = torch.ones_like(result) if upstream is None else torch.as_tensor(upstream).to(result)
        grads: tuple[Any, ...] = ()
        for _ in range(backwards if grad_of else 0):
            wanted = [inputs[name] for name in grad_of]
            grads = torch.autograd.grad(result, wanted, seed, retain_graph=backwards > 1, materialize_grads=False)
    callers = inputs if leaves else passed
    mutated = tuple(name for name, value in callers.items() if not _same(value.detach(), before[name]))
    results = {"loss": result.detach(), **dict(zip(grad_of, grads, strict=True))}
    return Evaluation(
        loss=_to_numpy(result.detach()),
        grads={name: _to_numpy(results[name]) for name in grad_of},
        dtypes={name: str(value.dtype).removeprefix("torch.") for name, value in results.items()},
        mutated=mutated,
        kernel=names(seen),
        product_dtype=_product_dtype(loss, _DTYPES[dtype], where),
    )


def _copy(leaf: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, through which gradients reach the leaf."""
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device).copy_(leaf)


def host_reads(loss: Any, arrays: Mapping[str, NDArray[Any]], *, dtype: str, grad_of: tuple[str, ...]) -> str:
    """See `loss_core.dispatch.protocol.Backend.host_reads`: the operator, such as "aten.nonzero.default"."""
    # On "meta": on "cpu" the loss would read labels, which costs no synchronisation there.
    with compat.without_values() as reads:
        inputs = {
            name: torch.empty(value.shape, dtype=_dtype_of(value, _DTYPES[dtype]), device="meta")
            for name, value in arrays.items()
        }
        for name in grad_of:
            inputs[name].requires_grad_()
        result = as_one(loss(**inputs))
        torch.autograd.grad(result, [inputs[name] for name in grad_of], torch.ones_like(result), allow_unused=True)
    return reads[0] if reads else ""


def as_one(result: Any) -> torch.Tensor:
    """A result as one tensor: several tensors, and the metrics by name after a loss, are stacked along dimension 0."""
    if isinstance(result, torch.Tensor):
        return result
    if not isinstance(result, tuple | list):
        raise TypeError(f"A loss must return a torch.Tensor or a tuple of them, got {type(result).__name__}.")
    first, *rest = (x for x in result if x is not None)
    rest = [x for item in rest for x in _listed(item)]
    return torch.stack([first, *(x.to(first.dtype).expand_as(first) for x in rest)]) if rest else first


def _listed(result: Any) -> list[Any]:
    return [result[name] for name in sorted(result)] if isinstance(result, dict) else [result]


def _product_dtype(loss: Any, dtype: torch.dtype, device: torch.device) -> str | None:
    """Dtype to which the kernels of a fused loss round the gradient of the logits; None where they do not round it."""
    if not isinstance(loss, HeadModule):
        return None
    operand = loss.operand_dtype(dtype, device)
    return None if operand == compute_dtype(dtype) else str(operand).removeprefix("torch.")


def _dtype_of(value: NDArray[Any], dtype: torch.dtype) -> torch.dtype:
    """Dtype of the tensor for an array: the tested dtype for floats, its own for others."""
    return dtype if value.dtype.kind == "f" else torch.from_numpy(np.empty(0, value.dtype)).dtype


def _to_tensor(value: NDArray[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    value = np.asarray(value)
    source = torch.from_numpy(np.ascontiguousarray(value)).reshape(value.shape)
    target = _dtype_of(value, dtype)
    if value.flags.c_contiguous:
        return source.to(device=device, dtype=target, copy=True)
    # A sliced NumPy array becomes a tensor with the same strides, so that they are tested.
    strides = [stride // value.itemsize for stride in value.strides]
    return torch.empty_strided(value.shape, strides, dtype=target, device=device).copy_(source)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits, NaN included."""
    bits = (x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(*bits)


def _to_numpy(value: torch.Tensor) -> NDArray[np.float64]:
    return value.detach().to(device="cpu", dtype=torch.float64).numpy()
