"""The registry of losses: names, config classes and definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from loss_core.loss_config import LossConfig
    from loss_core.losses.definition import LossDef

Config = TypeVar("Config", bound="type[Any]")

# Name in recipes and on the command line -> config class. Built-in losses first, then those that users register.
LOSS_CONFIG_REGISTRY: dict[str, type[LossConfig]] = {}

# Config class -> its definition; for built-in losses the module of loss_core/losses with it, imported on first use.
DEFINITIONS: dict[type[Any], LossDef | str] = {}

_OURS: set[type[Any]] = set()


def typed_loss(name: str, definition: str) -> Callable[[Config], Config]:
    """Class decorator that registers a built-in config.

    Args:
        name: registry name.
        definition: module of loss_core/losses with the loss's `DEFINITION`.
    """

    def register(config_cls: Config) -> Config:
        LOSS_CONFIG_REGISTRY[name] = config_cls
        DEFINITIONS[config_cls] = definition
        _OURS.add(config_cls)
        return config_cls

    return register


def is_ours(config_cls: type[Any]) -> bool:
    """Whether this class itself, not a base of it, is a built-in config."""
    return config_cls in _OURS


def our_losses() -> tuple[str, ...]:
    """Registry names of the built-in losses."""
    return tuple(name for name, config_cls in LOSS_CONFIG_REGISTRY.items() if is_ours(config_cls))


def registered_name(config_cls: type[Any]) -> str:
    """The registry name of a config class."""
    for name, cls in LOSS_CONFIG_REGISTRY.items():
        if cls is config_cls:
            return name
    raise TypeError(
        f"{config_cls.__name__} is in no registry, so it has no name to be stored under; "
        "register it with loss_core.register_loss."
    )


def config_class_for(name: object) -> type[LossConfig]:
    """The config class of a registry name.

    Raises:
        TypeError: not a registry name (NeMo AutoModel raises the same type).
    """
    config_cls = LOSS_CONFIG_REGISTRY.get(name) if isinstance(name, str) else None
    if config_cls is None:
        raise TypeError(
            f"Unknown loss name {name!r}: expected one of {sorted(LOSS_CONFIG_REGISTRY)}, a LossConfig, or a loss "
            "class/callable. Resolve dotted paths in the caller."
        )
    return config_cls
