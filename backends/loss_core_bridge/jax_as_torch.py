"""A JAX loss as a torch module: DLPack in, a compiled JAX forward, gradients through autograd."""

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

# Under autocast F.linear casts these; a JAX loss knows nothing of autocast, so the bridge does it.
_PRODUCT_OPERANDS = ("hidden_states", "lm_weight")


class JaxLossModule(torch.nn.Module):
    """A JAX loss that a torch training loop calls like any loss module.

    Arguments are those of the JAX loss, by position or name. Tensors cross over DLPack:

    | tensor | copied |
    |---|---|
    | contiguous bool, int8 to int32, float16, bfloat16, float32, float64 | no |
    | int64 | to int32, after a check that it fits; no copy where 64-bit mode is on (see below) |
    | not contiguous, or CPU memory not aligned to 64 bytes (`logits[1:]`) | once, in its dtype |
    | the loss and the gradients, on their way back | no |

    The loss comes back in the dtype in which JAX gives it, gradients in the dtype of the input.
    Python numbers are dynamic scalars: another `num_label_tokens` compiles nothing anew. None,
    bools, strings and other hashable objects are passed on as they are, and each value compiles; so
    are the numbers that the loss names in `static_arguments` (`num_valid_tokens`).

    64-bit mode (`jax.enable_x64`) is on for a call with a float64 tensor, so that nothing is lowered
    to float32, and when the loss's `ignore_index` is not inside int32.

    Gradients: every floating tensor that requires one gets it. The backward starts from the
    residuals of the forward and repeats no arithmetic. They are torch's saved tensors, so
    `retain_graph`, freeing, `torch.utils.checkpoint` and saved-tensor hooks work as usual, and an
    input that is changed in place before backward is torch's RuntimeError ("modified by an inplace
    operation"). Without gradients (no_grad, or none required) only the loss is computed. Second
    derivatives are a RuntimeError; torch.func transforms a TypeError.

    `torch.compile` does not look inside: the call is a graph break, and an error with fullgraph=True.
    Under `torch.autocast` the tensors are taken in the dtypes that they have, but `hidden_states`
    and `lm_weight` are cast to the autocast dtype as F.linear's would be. Labels outside the
    vocabulary are a ValueError on a CPU and NaN elsewhere. Inputs are never changed.

    Attributes:
        jax_loss: the JAX loss; its attributes (`ignore_index`, `reduction`, `kernel_choice`, ...)
            can be read on the module, and not set.
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
        """Give this instance a forward with the signature of the loss: callers look for argument names there."""
        signature = inspect.signature(self.jax_loss)
        for parameter in signature.parameters.values():
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
                raise TypeError(f"The JAX loss takes the argument {parameter} by position only; it must have a name.")
        loss = self.jax_loss

        @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            return _call(loss, _named(signature, args, kwargs))

        forward.__signature__ = signature
        # Past __setattr__ below; nn.Module.__call__ takes the instance's forward.
        self.__dict__.update(forward=forward, __signature__=signature)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "jax_loss" not in self.__dict__:
                raise
            return getattr(self.jax_loss, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "jax_loss" in self.__dict__ and (name == "jax_loss" or _only_on(self.jax_loss, self, name)):
            raise AttributeError(f"{name} belongs to the JAX loss and can't be changed; build a new loss.")
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("forward", "__signature__")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._bind_forward()

    def extra_repr(self) -> str:
        """The JAX loss, as it prints itself."""
        return repr(self.jax_loss)


def _only_on(loss: object, module: torch.nn.Module, name: str) -> bool:
    return hasattr(loss, name) and name not in module.__dict__ and not hasattr(type(module), name)


def _named(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
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
    """One call, less its tensors."""

    loss: Callable[..., Any]
    static: tuple[tuple[str, Any], ...]
    names: tuple[str, ...]  # of the tensors
    wanted: tuple[str, ...]  # names whose gradient is wanted
    wide: bool  # 64-bit mode


def _call(loss: Callable[..., Any], arguments: dict[str, Any]) -> torch.Tensor:
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
    device = _common_device(tensors)
    check_platform(device)
    _refuse_bad_labels(loss, tensors)
    wide = _is_wide(loss, tensors)
    static: dict[str, Any] = {}
    shaping = getattr(loss, "static_arguments", ())
    for name, value in arguments.items():
        if name not in shaping and isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_):
            tensors[name] = _scalar(name, value, device, wide)
        elif name not in tensors:
            static[name] = _checked_static(name, value)
    # A 0-d tensor on the CPU goes with tensors on any device in torch, but not in JAX.
    tensors = {name: as_normal_tensor(tensor).to(device, non_blocking=True) for name, tensor in tensors.items()}
    _apply_autocast(tensors, device)
    grad = torch.is_grad_enabled()
    wanted = tuple(sorted(name for name, tensor in tensors.items() if grad and tensor.requires_grad))
    call = _Call(loss, tuple(sorted(static.items())), tuple(tensors), wanted, wide)
    if wanted:
        return cast(torch.Tensor, _JaxLoss.apply(call, *tensors.values()))
    with jax.enable_x64(wide):
        return to_torch(residuals.value(loss, call.static, _to_jax(tensors, wide)))


class _JaxLoss(torch.autograd.Function):
    """Forward and backward of one call; everything between them is in torch's saved tensors."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: torch.Tensor) -> torch.Tensor:
        by_name = dict(zip(call.names, tensors, strict=True))
        with jax.enable_x64(call.wide):
            arrays = _to_jax(by_name, call.wide)
            wanted = {name: arrays.pop(name) for name in call.wanted}
            loss, kept, plan = residuals.value_and_residuals(call.loss, call.static, wanted, arrays)
        ctx.call = call
        ctx.plan = plan
        # torch can't save a dtype of JAX's own (int4, say): such a residual stays an array.
        ctx.arrays = {i: array for i, array in enumerate(kept) if array.dtype not in TORCH_DTYPES}
        saved = [to_torch(array) for array in kept if array.dtype in TORCH_DTYPES]
        # The inputs themselves, though some crossed as a copy: saving them makes torch check their version.
        ctx.save_for_backward(*(by_name[name] for name in plan.inputs), *saved)
        return to_torch(loss)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call, plan = ctx.call, ctx.plan
        saved = ctx.saved_tensors
        inputs, rest = saved[: len(plan.inputs)], iter(saved[len(plan.inputs) :])
        num_kept = len(ctx.arrays) + len(saved) - len(inputs)
        with jax.enable_x64(call.wide):
            kept = [
                ctx.arrays[i] if i in ctx.arrays else to_jax("residual", next(rest), wide=True) for i in range(num_kept)
            ]
            grads = residuals.gradients(
                plan,
                [to_jax(name, tensor, wide=call.wide) for name, tensor in zip(plan.inputs, inputs, strict=True)],
                kept,
                to_jax("upstream", upstream[0], wide=True),
            )
            by_name = {name: to_torch(grad) for name, grad in grads.items()}
        if torch.is_grad_enabled():  # create_graph=True
            by_name = {name: _NoSecondDerivative.apply(_anchor(grad), grad) for name, grad in by_name.items()}
        return (None, *(by_name.get(name) for name in call.names))


class _NoSecondDerivative(torch.autograd.Function):
    """Passes a gradient on, and raises when somebody differentiates it: it must not pass for a constant."""

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


def _refuse_bad_labels(loss: Callable[..., Any], tensors: dict[str, torch.Tensor]) -> None:
    """Let the JAX loss look at the labels here, where it costs no device sync; under jit it can't."""
    check = getattr(loss, "check_values", None)
    labels = tensors.get("labels")
    if check is None or labels is None or labels.device.type != "cpu" or labels.dtype.is_floating_point:
        return
    values: dict[str, Any] = {**tensors, "labels": labels.numpy()}
    if "mask" in tensors:
        values["mask"] = (tensors["mask"].detach().cpu() != 0).numpy()
    check(values)


def _to_jax(tensors: dict[str, torch.Tensor], wide: bool) -> dict[str, jax.Array]:
    return {name: to_jax(name, tensor, wide=wide) for name, tensor in tensors.items()}


def _common_device(tensors: dict[str, torch.Tensor]) -> torch.device:
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor.dim()}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"All tensors of a loss must be on one device, got {where}.")
    return next(iter(devices.values()), torch.device("cpu"))


def _is_wide(loss: Callable[..., Any], tensors: dict[str, torch.Tensor]) -> bool:
    ignore_index = getattr(loss, "ignore_index", None)
    return bool(
        jax.config.jax_enable_x64  # type: ignore[attr-defined]
        or any(tensor.dtype == torch.float64 for tensor in tensors.values())
        # At the borders of int32 a label that saturates there would pass for an ignored one.
        or (isinstance(ignore_index, numbers.Integral) and not INT32.min < int(ignore_index) < INT32.max)
    )


def _scalar(name: str, value: Any, device: torch.device, wide: bool) -> torch.Tensor:
    """A Python number as a 0-d tensor, so that JAX takes it for data and not for a constant."""
    if not isinstance(value, numbers.Integral):
        return torch.full((), float(value), dtype=torch.float64 if wide else torch.float32, device=device)
    if not wide and not INT32.min <= int(value) <= INT32.max:
        raise ValueError(
            f"{name} is {value}, which does not fit JAX's int32. Pass it as a floating tensor, or set "
            "jax.config.update('jax_enable_x64', True)."
        )
    return torch.full((), int(value), dtype=torch.int64 if wide else torch.int32, device=device)


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
        # As autocast does, which leaves float64 alone.
        if name in tensors and tensors[name].is_floating_point() and tensors[name].dtype != torch.float64:
            tensors[name] = tensors[name].to(dtype)
