"""A torch loss as a JAX function: host callbacks in forward and backward under `jax.custom_vjp`."""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.custom_derivatives import SymbolicZero

from loss_core_bridge.host_call import HostFunction, host_call
from loss_core_bridge.jax_as_torch import JaxLossModule
from loss_core_bridge.tensors import INT32, NUMPY_DTYPES, TORCH_DTYPES, numpy_to_torch, torch_to_numpy


@jax.tree_util.register_static
class TorchLossFunction:
    """A torch loss that JAX calls like any function of arrays.

    Arguments are those of the module's forward, by position or name; arrays, NumPy arrays and Python numbers become
    tensors of the same dtype, everything else (and numbers that the module lists in `static_arguments`) is passed
    unchanged. Works under `jit`, `grad` and `vmap` (one torch call per batch element). Hashable, and a pytree with
    no leaves; two are equal when they have the same module and device.

    Shape and dtype of the loss are determined when JAX traces: the module runs once on meta tensors, or, where that
    fails, on zeros of the inputs' shapes. A call that JAX does not trace runs torch directly.

    Gradients: every floating input that JAX differentiates gets one, in its dtype; integers and bools get float0. The
    backward runs the torch forward again, since a torch graph can't be stored in a JAX program: a gradient costs two
    forwards and one backward. Second derivatives and forward mode are errors of JAX.

    Copies: every input is copied once on the host, so that a module that modifies or stores its arguments can't modify
    JAX's memory; results are copied once by JAX. Arrays on an accelerator are copied through the host. The caller's
    thread-local torch modes (autocast, no_grad) do not apply: JAX runs the loss on a separate thread.

    An error of the torch loss is raised unchanged during tracing (shapes, dtypes) or when the call is not traced; from
    a compiled program (a label out of range) it is raised as jax.errors.JaxRuntimeError with torch's message in it.

    Attributes:
        module: the torch loss; its attributes (`ignore_index`, `reduction`, `kernel_choice`, ...)
            can be read on the function.
        device: torch device on which the loss runs.
    """

    def __init__(self, module: torch.nn.Module, *, device: str = "cpu") -> None:
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"Expected a torch.nn.Module, got {type(module).__name__}.")
        if any(isinstance(part, JaxLossModule) for part in module.modules()):
            # A callback that waits for JAX can deadlock with the thread that it runs on (jax issue 24255).
            raise ValueError("The module contains a bridged JAX loss, and JAX must not run inside its own callback.")
        if getattr(module, "inplace_grad", False):
            raise ValueError(
                "The torch loss has inplace_grad=True, but a jax.Array can't be overwritten, and the copy that torch "
                "works on would save no memory. Build it with inplace_grad=False."
            )
        trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        if trainable:
            raise ValueError(
                f"The torch loss has trainable parameters ({', '.join(trainable)}), which JAX would not train. "
                "Freeze them with requires_grad_(False), or make them arguments of forward."
            )
        self.module = module
        self.device = device
        self.__signature__ = inspect.signature(module.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        bound = self.__signature__.bind(*args, **kwargs)
        arrays: dict[str, Any] = {}
        static: dict[str, Any] = {}
        for name, value in _flat_arguments(bound):
            # Numbers in static_arguments determine shapes: they stay Python numbers.
            array = None if name in getattr(self.module, "static_arguments", ()) else _as_array(name, value)
            if array is None:
                static[name] = value
            else:
                arrays[name] = array
        call = _Call(self.module, self.device, tuple(arrays), tuple(sorted(static.items())))
        return _torch_loss(call, *arrays.values())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "module":
            raise AttributeError(name)
        return getattr(self.module, name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TorchLossFunction) and (self.module, self.device) == (other.module, other.device)

    def __hash__(self) -> int:
        return hash((self.module, self.device))

    def __repr__(self) -> str:
        return f"TorchLossFunction({self.module!r}, device={self.device!r})"


def _flat_arguments(bound: inspect.BoundArguments) -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            raise TypeError(f"The torch loss takes *{name}; pass these arguments by name.")
        flat.extend(value.items() if kind is inspect.Parameter.VAR_KEYWORD else [(name, value)])
    return flat


def _as_array(name: str, value: Any) -> jax.Array | None:
    """The value as an array; None if it is neither an array nor a number."""
    if isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is a torch.Tensor; this function takes JAX or NumPy arrays.")
    if isinstance(value, np.ndarray | np.integer) or (isinstance(value, int) and not isinstance(value, bool)):
        integers = np.asarray(value)
        # JAX would wrap them to int32 without an error.
        if integers.dtype.kind in "iu" and integers.size and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
            low, high = integers.min(), integers.max()
            if low < INT32.min or high > INT32.max:
                raise ValueError(
                    f"{name} has values from {low} to {high}, which do not fit JAX's int32. Correct them, or set "
                    "jax.config.update('jax_enable_x64', True)."
                )
    if isinstance(value, bool) or not isinstance(value, jax.Array | np.ndarray | np.generic | numbers.Real):
        return None
    array = jnp.asarray(value)
    if array.dtype not in TORCH_DTYPES:
        raise TypeError(f"{name} is {array.dtype}, which torch does not have.")
    return array


@dataclass(frozen=True)
class _Call:
    """A call without its arrays. Compared by value, so that equal calls compile once."""

    module: torch.nn.Module
    device: str
    names: tuple[str, ...]  # of the arrays
    static: tuple[tuple[str, Any], ...]

    def run(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        loss = self.module(**dict(zip(self.names, tensors, strict=True)), **dict(self.static))
        if not isinstance(loss, torch.Tensor):
            raise TypeError(
                f"The torch loss returned a {type(loss).__name__}; the bridge takes losses that return one tensor."
            )
        return loss

    def result(self, arrays: Sequence[jax.Array]) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the loss."""
        with torch.no_grad():
            try:
                loss = self.run([torch.empty(a.shape, dtype=TORCH_DTYPES[a.dtype], device="meta") for a in arrays])
            except Exception:
                # The module reads values or has no meta kernel. An error in the arguments is raised again here.
                loss = self.run([torch.zeros(a.shape, dtype=TORCH_DTYPES[a.dtype], device=self.device) for a in arrays])
        return jax.ShapeDtypeStruct(tuple(loss.shape), NUMPY_DTYPES[loss.dtype])


@dataclass(frozen=True)
class _Forward:
    """The callback of the forward."""

    call: _Call

    def __call__(self, *arrays: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], ...]:
        tensors = [numpy_to_torch(array, self.call.device) for array in arrays]
        with torch.no_grad():
            return (torch_to_numpy(self.call.run(tensors)),)


@dataclass(frozen=True)
class _Backward:
    """The callback of the backward: (upstream, *inputs) -> gradients of the inputs with indices `wanted`."""

    call: _Call
    wanted: tuple[int, ...]

    def __call__(
        self, upstream: np.ndarray[Any, Any], *arrays: np.ndarray[Any, Any]
    ) -> tuple[np.ndarray[Any, Any], ...]:
        tensors = [numpy_to_torch(array, self.call.device) for array in arrays]
        leaves = [tensors[i].requires_grad_() for i in self.wanted]
        with torch.enable_grad():
            loss = self.call.run(tensors)
        if not loss.requires_grad:
            names = ", ".join(self.call.names[i] for i in self.wanted)
            raise RuntimeError(f"The torch loss is not connected to {names}: it has no gradient.")
        grads = torch.autograd.grad(loss, leaves, numpy_to_torch(upstream, self.call.device), allow_unused=True)
        return tuple(
            torch_to_numpy(torch.zeros_like(leaf) if grad is None else grad)
            for leaf, grad in zip(leaves, grads, strict=True)
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _torch_loss(call: _Call, *arrays: jax.Array) -> jax.Array:
    (loss,) = _on_host(_Forward(call), lambda: (call.result(arrays),), arrays)
    return loss


def _forward_rule(call: _Call, *primals: Any) -> tuple[jax.Array, tuple[tuple[jax.Array, ...], dict[int, None]]]:
    arrays = tuple(primal.value for primal in primals)
    # Keys of a dict are part of the residuals' tree structure, so they stay Python integers under jit.
    wanted = {
        i: None
        for i, primal in enumerate(primals)
        if primal.perturbed and jnp.issubdtype(primal.value.dtype, jnp.floating)
    }
    return _torch_loss(call, *arrays), (arrays, wanted)


def _backward_rule(
    call: _Call, saved: tuple[tuple[jax.Array, ...], dict[int, None]], upstream: Any
) -> tuple[jax.Array | None, ...]:
    arrays, wanted = saved
    if isinstance(upstream, SymbolicZero) or not wanted:
        return (None,) * len(arrays)
    shapes = tuple(jax.ShapeDtypeStruct(arrays[i].shape, arrays[i].dtype) for i in wanted)
    grads = _on_host(_Backward(call, tuple(wanted)), lambda: shapes, (upstream, *arrays))
    by_index = dict(zip(wanted, grads, strict=True))
    # None is a zero cotangent, of dtype float0 where the input is an integer.
    return tuple(by_index.get(i) for i in range(len(arrays)))


_torch_loss.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


def _on_host(
    function: HostFunction, results: Callable[[], Sequence[jax.ShapeDtypeStruct]], arrays: Sequence[jax.Array]
) -> tuple[jax.Array, ...]:
    """Call a function of NumPy arrays: directly where JAX is not tracing, else by `host_call`."""
    if any(isinstance(array, jax.core.Tracer) for array in arrays):
        return host_call(function, results(), arrays)
    return tuple(jnp.asarray(result) for result in function(*(np.asarray(array) for array in arrays)))
