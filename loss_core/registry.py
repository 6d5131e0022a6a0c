"""Which losses there are: names, config classes, and where each loss's definition is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from loss_core.loss_config import LossConfig
    from loss_core.losses.definition import LossDef

Config = TypeVar("Config", bound="type[Any]")

# Name, as recipes and the command line have it -> config class. Ours first, then what users register.
LOSS_CONFIG_REGISTRY: dict[str, type[LossConfig]] = {}

# Config class -> its definition; for ours the file of loss_core/losses that holds it, which is imported when needed.
DEFINITIONS: dict[type[Any], LossDef | str] = {}

_OURS: set[type[Any]] = set()


def typed_loss(name: str, definition: str) -> Callable[[Config], Config]:
    """Class decorator that enters a config of this library.

    Args:
        name: in the registry.
        definition: file of loss_core/losses with the loss's `DEFINITION`.
    """

    def enter(config_cls: Config) -> Config:
        LOSS_CONFIG_REGISTRY[name] = config_cls
        DEFINITIONS[config_cls] = definition
        _OURS.add(config_cls)
        return config_cls

    return enter


def is_ours(config_cls: type[Any]) -> bool:
    """Whether this very class is one of the typed configs of this library."""
    return config_cls in _OURS


def our_losses() -> tuple[str, ...]:
    """Names of the losses of this library."""
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
        TypeError: not a registry name (as from NeMo AutoModel's).
    """
    config_cls = LOSS_CONFIG_REGISTRY.get(name) if isinstance(name, str) else None
    if config_cls is None:
        raise TypeError(
            f"Unknown loss name {name!r}: expected one of {sorted(LOSS_CONFIG_REGISTRY)}, a LossConfig, or a loss "
            "class/callable. Resolve dotted paths in the caller."
        )
    return config_cls
