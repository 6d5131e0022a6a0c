"""Select the builder of a config for a flag.

A flag that names a kernel never falls back to another one; only `auto` chooses.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from loss_core.dispatch.flags import AUTO, all_flags, load_backend, parse_flag
from loss_core.dispatch.protocol import Backend, BackendFlag, BackendUnavailable, KernelChoice
from loss_core.registry import is_ours

if TYPE_CHECKING:
    from loss_core.loss_config import LossConfig

# Never chosen by `auto`: checking whether it is usable imports a large library, which takes seconds and may fail.
_ONLY_BY_NAME = frozenset({"torch:te"})

# The kernel that a backend's name alone stands for when a user registers a builder.
_REGISTERED_AS = {"torch": "eager", "jax": "xla"}

# User-registered builders: config class -> {full flag: builder}.
_USER_BUILDERS: dict[type[Any], dict[str, Callable[[Any], Any]]] = {}


def register_builders(config_cls: type[LossConfig], builders: Mapping[str, Callable[[Any], Any]]) -> None:
    """Register the builders of a user's config, by flag; see `loss_core.register_loss`."""
    table: dict[str, Callable[[Any], Any]] = {}
    for flag, builder in builders.items():
        parsed = parse_flag(flag)
        if not callable(builder):
            raise TypeError(f"The builder for {flag!r} must be a callable that takes the config, got {builder!r}.")
        kernel = _REGISTERED_AS[parsed.backend] if parsed.kernel == AUTO else parsed.kernel
        table[f"{parsed.backend}:{kernel}"] = builder
    _USER_BUILDERS[config_cls] = table


def unregister_builders(config_cls: type[LossConfig]) -> None:
    """Undo `register_builders`."""
    _USER_BUILDERS.pop(config_cls, None)


def _user_table(config_cls: type[Any]) -> dict[str, Callable[[Any], Any]] | None:
    """Builders by flag of the first user-registered class in the MRO; None if a built-in config comes first."""
    for cls in config_cls.__mro__:
        if cls in _USER_BUILDERS:
            return _USER_BUILDERS[cls]
        if is_ours(cls):
            return None
    return None


def is_registered(config: LossConfig) -> bool:
    """Whether this config is built by a user's builders."""
    return _user_table(type(config)) is not None


def flags_for(config_cls: type[LossConfig]) -> tuple[str, ...]:
    """Every flag for this config class, usable here or not; for a user-defined class, those with builders."""
    table = _user_table(config_cls)
    named = all_flags() if table is None else tuple(table)
    autos = dict.fromkeys(parse_flag(flag).backend for flag in named)
    return (*(choice for name in autos for choice in (name, f"{name}:{AUTO}")), *named)


def accepts_backend(config: LossConfig) -> bool:
    """Whether the config's `build` has a `backend` argument (a user's override may not)."""
    parameters = inspect.signature(config.build).parameters
    return "backend" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def build(config: LossConfig, flag: str) -> Any:
    """Build a validated config for a flag. The public function is `LossConfig.build`."""
    parsed = parse_flag(flag)
    table = _user_table(type(config))
    if table is not None:
        return _build_registered(config, parsed, table)
    if not any(is_ours(cls) for cls in type(config).__mro__):
        raise NotImplementedError(
            f"{type(config).__name__} must implement build(), or be registered with loss_core.register_loss "
            f"with a builder for {parsed.backend!r}."
        )
    return _build_ours(config, parsed, load_backend(parsed.backend))


def _build_registered(config: LossConfig, flag: BackendFlag, table: Mapping[str, Callable[[Any], Any]]) -> Any:
    fitting = [name for name in table if name.startswith(f"{flag.backend}:")]
    name = str(flag) if flag.kernel != AUTO else next(iter(fitting), str(flag))
    if name not in table:
        raise BackendUnavailable(
            f"{type(config).__name__} has no builder for '{flag}'; registered: {', '.join(table) or 'none'}."
        )
    return table[name](config)


def _build_ours(config: LossConfig, flag: BackendFlag, backend: Backend) -> Any:
    builders = backend.builders()
    by_kernel = {
        kernel: builder for (config_cls, kernel), builder in builders.items() if config_cls in type(config).__mro__
    }
    if flag.kernel != AUTO:
        # Checked before the status: an install line would not help if the kernel does not implement this loss.
        if flag.kernel not in by_kernel and any(kernel == flag.kernel for _, kernel in builders):
            raise BackendUnavailable(
                f"'{flag}' has no kernel for {type(config).__name__}; it is served by "
                f"{', '.join(f'{flag.backend}:{k}' for k in by_kernel)}."
            )
        status = backend.kernel_status(flag.kernel)
        if not status.usable:
            raise BackendUnavailable(status.reason)
        choice = KernelChoice(str(flag), "named by the flag")
    else:
        candidates = [kernel for kernel in by_kernel if f"{flag.backend}:{kernel}" not in _ONLY_BY_NAME]
        usable = tuple(kernel for kernel in candidates if backend.kernel_status(kernel).usable)
        if not usable:
            raise BackendUnavailable(f"No kernel of {flag.backend!r} for {type(config).__name__} can be used here.")
        choice = backend.choose_kernel(config, usable)
    loss = by_kernel[parse_flag(choice.flag).kernel](config)
    return loss.with_kernel_choice(choice) if hasattr(loss, "with_kernel_choice") else loss
