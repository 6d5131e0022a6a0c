"""A JAX loss as a torch module: inputs cross over DLPack, forward and backward are compiled JAX programs."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np
import torch

from loss_core_bridge import residuals
from loss_core_bridge.tensors import INT32, TORCH_DTYPES, check_platform, check_tensor, to_jax, to_torch
from loss_core_torch.tracing import as_normal_tensor

# F.linear casts these under autocast. Autocast has no effect on JAX, so the bridge casts them.
_PRODUCT_OPERANDS = ("hidden_states", "lm_weight")


class JaxLossModule(torch.nn.Module):
    """A JAX loss that a torch training loop calls like any loss module.

    Arguments are those of the JAX loss, by position or name. Tensors cross over DLPack:

    | tensor | copied |
    |---|---|
    | contiguous bool, int8 to int32, float16, bfloat16, float32, float64 | no |
    | int64 | to int32, after a check that it fits; no copy where 64-bit mode is on (see below) |
    | not contiguous, or CPU memory not aligned to 64 bytes (`logits[1:]`) | once, in its dtype |
    | results: the loss and the gradients | no |

    The loss has the dtype that JAX returns, gradients that of the input. Python numbers are dynamic scalars: another
    value of `num_label_tokens` needs no compilation. None, bools, strings and other hashable objects are static
    arguments, compiled for each value; so are numbers that the loss lists in `static_arguments` (`num_valid_tokens`).

    64-bit mode (`jax.enable_x64`) is on for a call with a float64 tensor, so that nothing is computed in float32, and
    when the loss's `ignore_index` is at or beyond a limit of int32.

    Gradients: every floating tensor that requires a gradient gets one. The backward starts from the residuals of the
    forward and repeats no arithmetic. The residuals are torch's saved tensors, so `retain_graph`, freeing,
    `torch.utils.checkpoint` and saved-tensor hooks work as usual, and an input that is changed in place before backward
    is torch's RuntimeError ("modified by an inplace operation"). Without gradients (no_grad, or none required) only the
    loss is computed. Second derivatives are a RuntimeError; torch.func transforms are a TypeError.

    `torch.compile` can't trace the call: it is a graph break, and an error with fullgraph=True. Under `torch.autocast`
    tensors keep their dtypes, except that `hidden_states` and `lm_weight` are cast to the autocast dtype, as by
    F.linear. Labels outside the vocabulary are a ValueError on a CPU and NaN elsewhere. Inputs are never changed.

    Attributes:
        jax_loss: the JAX loss; its attributes (`ignore_index`, `reduction`, `kernel_choice`, ...)
            can be read on the module, but not set.
    """

    jax_loss: Callable[..., Any]

    def __init__(self, loss: Callable[..., Any]) -> None:
        super().__init__()
        if not callable(loss):
            raise TypeError(f"Expected a JAX loss (a callable), got {type(loss).__name__}.")
        try:
            hash(loss)
        except TypeError as error:
            raise TypeError(
                f"The JAX loss {loss!r} is not hashable, so JAX can't cache what it compiles for it; make it a "
                "function, or a dataclass with frozen=True."
            ) from error
        self.jax_loss = loss
        self._bind_forward()

    def _bind_forward(self) -> None:
        """Set this instance's forward to one with the signature of the loss, which callers inspect."""
        signature = inspect.signature(self.jax_loss)
        for parameter in signature.parameters.values():
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
                raise TypeError(f"The JAX loss takes the argument {parameter} by position only; it must have a name.")
        loss = self.jax_loss

        @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            return _call(loss, _bind_by_name(signature, args, kwargs))

        forward.__signature__ = signature
        # Not through __setattr__ below; nn.Module.__call__ uses the instance's forward.
        self.__dict__.update(forward=forward, __signature__=signature)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "jax_loss" not in self.__dict__:
                raise
            return getattr(self.jax_loss, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "jax_loss" in self.__dict__ and (name == "jax_loss" or _is_loss_attribute(self.jax_loss, self, name)):
            raise AttributeError(f"{name} belongs to the JAX loss and can't be changed; build a new loss.")
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("forward", "__signature__")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._bind_forward()

    def extra_repr(self) -> str:
        """The repr of the JAX loss."""
        return repr(self.jax_loss)


def _is_loss_attribute(loss: object, module: torch.nn.Module, name: str) -> bool:
    return hasattr(loss, name) and name not in module.__dict__ and not hasattr(type(module), name)


def _bind_by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = signature.bind(*args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    return named


@dataclass(frozen=True)
class _Call:
    """A call without its tensors."""

    loss: Callable[..., Any]
    static: tuple[tuple[str, Any], ...]
    names: tuple[str, ...]  # of the tensors
    wanted: tuple[str, ...]  # names of the tensors to differentiate
    x64: bool  # whether 64-bit mode is on


def _call(loss: Callable[..., Any], arguments: dict[str, Any]) -> torch.Tensor:
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
    device = _common_device(tensors)
    check_platform(device)
    _check_labels(loss, tensors)
    x64 = _needs_x64(loss, tensors)
    static: dict[str, Any] = {}
    static_numbers = getattr(loss, "static_arguments", ())
    for name, value in arguments.items():
        if name not in static_numbers and isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_):
            tensors[name] = _scalar(name, value, device, x64)
        elif name not in tensors:
            static[name] = _checked_static(name, value)
    # torch accepts a 0-d CPU tensor beside tensors on any device, JAX does not.
    tensors = {name: as_normal_tensor(tensor).to(device, non_blocking=True) for name, tensor in tensors.items()}
    _apply_autocast(tensors, device)
    grad = torch.is_grad_enabled()
    wanted = tuple(sorted(name for name, tensor in tensors.items() if grad and tensor.requires_grad))
    call = _Call(loss, tuple(sorted(static.items())), tuple(tensors), wanted, x64)
    if wanted:
        return cast(torch.Tensor, _JaxLoss.apply(call, *tensors.values()))
    with jax.enable_x64(x64):
        return to_torch(residuals.value(loss, call.static, _to_jax(tensors, x64)))


class _JaxLoss(torch.autograd.Function):
    """Forward and backward of one call; the residuals are torch's saved tensors."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: torch.Tensor) -> torch.Tensor:
        by_name = dict(zip(call.names, tensors, strict=True))
        with jax.enable_x64(call.x64):
            arrays = _to_jax(by_name, call.x64)
            wanted = {name: arrays.pop(name) for name in call.wanted}
            loss, leaves, plan = residuals.value_and_residuals(call.loss, call.static, wanted, arrays)
        ctx.call = call
        ctx.plan = plan
        # torch can't save a dtype that it lacks (such as int4): such a residual stays a jax.Array.
        ctx.arrays = {i: array for i, array in enumerate(leaves) if array.dtype not in TORCH_DTYPES}
        saved = [to_torch(array) for array in leaves if array.dtype in TORCH_DTYPES]
        # The inputs themselves, not their copies in JAX: torch checks the version of a saved input.
        ctx.save_for_backward(*(by_name[name] for name in plan.inputs), *saved)
        return to_torch(loss)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call, plan = ctx.call, ctx.plan
        saved = ctx.saved_tensors
        inputs, rest = saved[: len(plan.inputs)], iter(saved[len(plan.inputs) :])
        count = len(ctx.arrays) + len(saved) - len(inputs)
        with jax.enable_x64(call.x64):
            leaves = [
                ctx.arrays[i] if i in ctx.arrays else to_jax("residual", next(rest), x64=True) for i in range(count)
            ]
            grads = residuals.gradients(
                plan,
                [to_jax(name, tensor, x64=call.x64) for name, tensor in zip(plan.inputs, inputs, strict=True)],
                leaves,
                to_jax("upstream", upstream[0], x64=True),
            )
            by_name = {name: to_torch(grad) for name, grad in grads.items()}
        if torch.is_grad_enabled():  # create_graph=True
            by_name = {name: _NoSecondDerivative.apply(_anchor(grad), grad) for name, grad in by_name.items()}
        return (None, *(by_name.get(name) for name in call.names))


class _NoSecondDerivative(torch.autograd.Function):
    """The identity on a gradient, with a backward that raises: the gradient must not be treated as a constant."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> None:
        raise RuntimeError(
            "Second derivatives do not pass through the JAX bridge. Differentiate the JAX loss in JAX "
            "(jax.hessian, or jax.grad twice, on module.jax_loss), or build the loss with a torch backend."
        )


def _anchor(grad: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), device=grad.device, requires_grad=True)


def _check_labels(loss: Callable[..., Any], tensors: dict[str, torch.Tensor]) -> None:
    """Check the labels with the JAX loss where they are in host memory; under jit it can't read them."""
    check = getattr(loss, "check_values", None)
    labels = tensors.get("labels")
    if check is None or labels is None or labels.device.type != "cpu" or labels.dtype.is_floating_point:
        return
    values: dict[str, Any] = {**tensors, "labels": labels.numpy()}
    if "mask" in tensors:
        values["mask"] = (tensors["mask"].detach().cpu() != 0).numpy()
    check(values)


def _to_jax(tensors: dict[str, torch.Tensor], x64: bool) -> dict[str, jax.Array]:
    return {name: to_jax(name, tensor, x64=x64) for name, tensor in tensors.items()}


def _common_device(tensors: dict[str, torch.Tensor]) -> torch.device:
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor.dim()}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"All tensors of a loss must be on one device, got {where}.")
    return next(iter(devices.values()), torch.device("cpu"))


def _needs_x64(loss: Callable[..., Any], tensors: dict[str, torch.Tensor]) -> bool:
    ignore_index = getattr(loss, "ignore_index", None)
    return bool(
        jax.config.jax_enable_x64  # type: ignore[attr-defined]
        or any(tensor.dtype == torch.float64 for tensor in tensors.values())
        # An ignore_index at a limit of int32 would equal labels that saturate to int32.
        or (isinstance(ignore_index, numbers.Integral) and not INT32.min < int(ignore_index) < INT32.max)
    )


def _scalar(name: str, value: Any, device: torch.device, x64: bool) -> torch.Tensor:
    """A Python number as a 0-d tensor, which JAX traces instead of compiling it as a constant."""
    if not isinstance(value, numbers.Integral):
        return torch.full((), float(value), dtype=torch.float64 if x64 else torch.float32, device=device)
    if not x64 and not INT32.min <= int(value) <= INT32.max:
        raise ValueError(
            f"{name} is {value}, which does not fit JAX's int32. Pass it as a floating tensor, or set "
            "jax.config.update('jax_enable_x64', True)."
        )
    return torch.full((), int(value), dtype=torch.int64 if x64 else torch.int32, device=device)


def _checked_static(name: str, value: Any) -> Any:
    if isinstance(value, jax.Array):
        raise TypeError(f"{name} is a jax.Array; the module takes torch tensors (torch.from_dlpack converts).")
    try:
        hash(value)
    except TypeError:
        hint = "torch.from_numpy(...)" if isinstance(value, np.ndarray) else "a tensor"
        raise TypeError(f"{name} is a {type(value).__name__}; pass {hint}, a number or None.") from None
    return value


def _apply_autocast(tensors: dict[str, torch.Tensor], device: torch.device) -> None:
    if not torch.is_autocast_enabled(device.type):
        return
    dtype = torch.get_autocast_dtype(device.type)
    for name in _PRODUCT_OPERANDS:
        # autocast does not cast float64 either.
        if name in tensors and tensors[name].is_floating_point() and tensors[name].dtype != torch.float64:
            tensors[name] = tensors[name].to(dtype)
