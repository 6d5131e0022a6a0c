"""From whatever a caller or a recipe has (config, name, class, callable) to a config, and to a built loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from loss_core.backend import forget_builders, register_builders, takes_backend
from loss_core.config import (
    FusedLinearCEConfig,
    KDLossConfig,
    LossConfig,
    LossFromFactoryConfig,
    MaskedCrossEntropyConfig,
    TEParallelCEConfig,
    make_config,
)

LOSS_CONFIG_REGISTRY: dict[str, type[LossConfig]] = {
    "MaskedCrossEntropy": MaskedCrossEntropyConfig,
    "FusedLinearCrossEntropy": FusedLinearCEConfig,
    "TEParallelCrossEntropy": TEParallelCEConfig,
    "KDLoss": KDLossConfig,
}


def register_loss(name: str, config_cls: type[LossConfig], builders: Mapping[str, Callable[[Any], Any]]) -> None:
    """Add a loss of your own to the registry, with a builder per backend flag.

    Args:
        name: registry name, usable in `build_loss_config(name)`, dicts and YAML.
        config_cls: a dataclass that derives from LossConfig.
        builders: flag -> function that takes the config and returns the loss. "torch" stands for
            "torch:eager", "jax" for "jax:xla". The function may import its framework inside.
    Raises:
        ValueError: the name is taken by another class, or a flag is unknown.
        TypeError: config_cls is no dataclass derived from LossConfig, or a builder is not callable.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class ZLossConfig(LossConfig):
        ...     weight: float = 1e-4
        >>> register_loss("ZLoss", ZLossConfig, {"jax": lambda config: (lambda x: config.weight * x)})
        >>> build_loss_module("ZLoss", weight=2.0, backend="jax")(3.0)
        6.0
        >>> unregister_loss("ZLoss")
    """
    # is_dataclass would accept a subclass that merely inherits the decorator's work.
    own_dataclass = isinstance(config_cls, type) and "__dataclass_fields__" in vars(config_cls)
    if not (own_dataclass and issubclass(config_cls, LossConfig)):
        raise TypeError(f"config_cls must be a dataclass that derives from LossConfig, got {config_cls!r}.")
    if config_cls.__module__ == LossConfig.__module__:
        raise ValueError(f"{config_cls.__name__} belongs to loss_core; derive a class of your own from it.")
    if any(f.name == "name" for f in fields(config_cls)):
        raise ValueError(f"{config_cls.__name__} has a field called 'name', the key that to_dict keeps the loss under.")
    if not isinstance(name, str) or not name:
        raise TypeError(f"name must be a non-empty string, got {name!r}.")
    taken = LOSS_CONFIG_REGISTRY.get(name)
    if taken is not None and taken is not config_cls:
        raise ValueError(f"The name {name!r} is taken by {taken.__name__}; choose another.")
    register_builders(config_cls, builders)
    LOSS_CONFIG_REGISTRY[name] = config_cls


def unregister_loss(name: str) -> None:
    """Take back a `register_loss`. The losses of this library can't be taken back."""
    config_cls = LOSS_CONFIG_REGISTRY.get(name)
    if config_cls is None or config_cls.__module__ == "loss_core.config":
        raise ValueError(f"{name!r} is not a loss that was registered with register_loss.")
    del LOSS_CONFIG_REGISTRY[name]
    if config_cls not in LOSS_CONFIG_REGISTRY.values():
        forget_builders(config_cls)


def registered_name(config_cls: type[LossConfig]) -> str:
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
        TypeError: not a registry name (the type is the peer's).
    """
    config_cls = LOSS_CONFIG_REGISTRY.get(name) if isinstance(name, str) else None
    if config_cls is None:
        raise TypeError(
            f"Unknown loss name {name!r}: expected one of {sorted(LOSS_CONFIG_REGISTRY)}, a LossConfig, or a loss "
            "class/callable. Resolve dotted paths in the caller."
        )
    return config_cls


def build_loss_config(loss: LossConfig | str | Callable[..., Any], **loss_kwargs: Any) -> LossConfig:
    """Normalise a loss target to a LossConfig.

    | loss | result |
    |---|---|
    | LossConfig instance | the same object; kwargs are refused |
    | registry name | its typed config |
    | class with a registered name whose kwargs fit | the typed config |
    | any other callable | LossFromFactoryConfig |

    Raises:
        ValueError: kwargs beside a config instance, or a field value that is not accepted.
        TypeError: a config class instead of an instance, an unknown name, an unknown field, or
            something that is no loss.
    """
    if isinstance(loss, LossConfig):
        if loss_kwargs:
            raise ValueError(
                "Loss hyperparameters must be set on the config, not passed beside it "
                f"(got {sorted(loss_kwargs)} with a {type(loss).__name__})."
            )
        return loss
    if isinstance(loss, type) and issubclass(loss, LossConfig):
        raise TypeError(f"Pass a LossConfig instance, not the class {loss.__name__} (e.g. {loss.__name__}()).")
    if isinstance(loss, str):
        return make_config(config_class_for(loss), loss_kwargs)
    if not callable(loss):
        raise TypeError(
            f"Expected a LossConfig, a registry name or a loss class/callable, got {type(loss).__name__}. "
            "Resolve dotted paths in the caller."
        )
    config_cls = LOSS_CONFIG_REGISTRY.get(getattr(loss, "__name__", ""))
    if config_cls is not None and set(loss_kwargs) <= {f.name for f in fields(config_cls)}:
        return config_cls(**loss_kwargs)
    return LossFromFactoryConfig(factory=loss, kwargs=dict(loss_kwargs))


def build_loss_module(
    loss: LossConfig | str | Callable[..., Any], *, backend: str | None = None, **loss_kwargs: Any
) -> Any:
    """Build a loss: `build_loss_config(loss, **loss_kwargs).build(backend=backend)`.

    `backend` is a reserved word: it is the flag and never reaches the loss. A factory that has an
    argument of that name is bound first, with `functools.partial`.

    Args:
        loss: as in build_loss_config.
        backend: flag `BACKEND[:KERNEL]`; None is "torch" for typed configs.
    Raises:
        ValueError: also when a flag is given with a raw factory, or with a config whose own `build`
            takes none: it would be ignored.
    """
    config = build_loss_config(loss, **loss_kwargs)
    if backend is None:
        return config.build()
    if not takes_backend(config):
        raise ValueError(
            f"backend={backend!r} can't be applied: {type(config).__name__}.build() takes no backend. "
            "Leave the flag out, or register the loss with loss_core.register_loss."
        )
    return config.build(backend=backend)
