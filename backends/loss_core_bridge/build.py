"""Build a loss for the framework that the caller trains in, from a config and a flag of either backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from loss_core import BackendUnavailable, LossConfig, LossFromFactoryConfig, build_loss_config, parse_flag
from loss_core.build import LossLike, split_backend
from loss_core.dispatch.builders import accepts_backend
from loss_core.dispatch.flags import install_line

if TYPE_CHECKING:
    import torch

    from loss_core_bridge.jax_as_torch import JaxLossModule
    from loss_core_bridge.torch_as_jax import TorchLossFunction


def jax_loss_as_torch(loss: Callable[..., Any]) -> torch.nn.Module:
    """A JAX loss as a `torch.nn.Module` with gradients; see `JaxLossModule` for its behaviour.

    Args:
        loss: hashable callable that takes jax arrays by name and returns one floating array. For the result of
            `torch_loss_as_jax`, its torch module is returned.
    Raises:
        TypeError: not callable, not hashable, or a positional-only argument.
        BackendUnavailable: torch or jax is not installed.
    """
    module_cls, function_cls = _wrappers()
    return loss.module if isinstance(loss, function_cls) else module_cls(loss)


def torch_loss_as_jax(module: torch.nn.Module, *, device: str = "cpu") -> Callable[..., Any]:
    """A torch loss as a JAX function with gradients; see `TorchLossFunction` for its behaviour.

    Args:
        module: torch loss without trainable parameters. For the result of `jax_loss_as_torch`, its JAX loss is
            returned.
        device: torch device on which the loss runs, such as "cuda"; data are copied there through the host.
    Raises:
        TypeError: not a torch.nn.Module.
        ValueError: the module has trainable parameters, or contains a bridged JAX loss.
        BackendUnavailable: torch or jax is not installed.
    """
    module_cls, function_cls = _wrappers()
    # JAX inside a callback of JAX can deadlock (jax issue 24255), so the round trip is unwrapped.
    return module.jax_loss if isinstance(module, module_cls) else function_cls(module, device=device)


def build_torch_loss(loss: LossLike, backend: str | None = None, **loss_kwargs: Any) -> torch.nn.Module:
    """Build a loss for a torch training script with either backend.

    Args:
        loss: config, registry name, mapping or factory, as in `loss_core.build_loss_module`; losses added with
            `loss_core.register_loss` included.
        backend: flag `BACKEND[:KERNEL]`; None is "torch" (for a factory: the factory's framework).
            A torch flag builds natively; a jax flag builds the JAX loss and wraps it.
        loss_kwargs: fields of the config, when `loss` is a name or a class.
    Returns:
        A torch.nn.Module with the forward signature of the loss.
    Raises:
        TypeError: the result is not a torch.nn.Module (for a jax flag: not a callable that can be wrapped).
        ValueError, BackendUnavailable: as in `loss_core.build_loss_module`.
    """
    config, framework, built = _build(loss, backend, loss_kwargs, default="torch")
    if framework == "jax":
        return jax_loss_as_torch(built)
    if not _is_module(built):
        raise TypeError(
            f"{type(config).__name__} built a {type(built).__name__}, not a torch.nn.Module. Return a module from "
            "its builder; if it is a JAX loss, register it under a jax flag or pass it to jax_loss_as_torch."
        )
    return cast("torch.nn.Module", built)


def build_jax_loss(loss: LossLike, backend: str | None = None, **loss_kwargs: Any) -> Callable[..., Any]:
    """Build a loss for a JAX program with either backend.

    The counterpart of `build_torch_loss`: None is "jax" (for a factory: the factory's framework), a jax flag builds
    natively, a torch flag builds the torch loss and wraps it.
    """
    _, framework, built = _build(loss, backend, loss_kwargs, default="jax")
    if framework == "torch" or _is_module(built):
        return torch_loss_as_jax(built)
    return cast(Callable[..., Any], built)


def _build(
    loss: LossLike, backend: str | None, loss_kwargs: dict[str, Any], *, default: str
) -> tuple[LossConfig, str | None, Any]:
    """(config, framework of the flag, built loss); the framework is None for a loss that accepts no flag."""
    loss, backend = split_backend(loss, backend)
    config = build_loss_config(loss, **loss_kwargs)
    flagless = isinstance(config, LossFromFactoryConfig) or not accepts_backend(config)
    if backend is None and flagless:
        return config, None, config.build()
    flag = parse_flag(default if backend is None else backend)
    if not accepts_backend(config):
        raise ValueError(
            f"backend={backend!r} can't be applied: {type(config).__name__}.build() takes no backend. "
            "Leave the flag out, or register the loss with loss_core.register_loss."
        )
    return config, flag.backend, config.build(backend=default if backend is None else backend)


def _is_module(built: object) -> bool:
    # A module can't exist before torch is imported; this check must not import torch.
    import sys

    torch = sys.modules.get("torch")
    return torch is not None and isinstance(built, torch.nn.Module)


def _wrappers() -> tuple[type[JaxLossModule], type[TorchLossFunction]]:
    try:
        from loss_core_bridge.jax_as_torch import JaxLossModule
        from loss_core_bridge.torch_as_jax import TorchLossFunction
    except ImportError as error:
        raise BackendUnavailable(f"the bridge needs both frameworks ({error}): {install_line('torch,jax')}") from error
    return JaxLossModule, TorchLossFunction
