"""Build a config, and a loss, from what a caller or a recipe has: config, mapping, name, class or callable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from loss_core.config.factory import LossFromFactoryConfig
from loss_core.dispatch.builders import accepts_backend, register_builders, unregister_builders
from loss_core.loss_config import LossConfig, make_config
from loss_core.registry import DEFINITIONS, LOSS_CONFIG_REGISTRY, config_class_for, is_ours

if TYPE_CHECKING:
    from loss_core.losses import LossDef

LossLike = LossConfig | Mapping[str, Any] | str | Callable[..., Any]


def register_loss(
    name: str,
    config_cls: type[LossConfig],
    builders: Mapping[str, Callable[[Any], Any]],
    *,
    definition: LossDef | None = None,
) -> None:
    """Add a user-defined loss to the registry, with a builder per backend flag.

    Args:
        name: registry name, usable in `build_loss_config(name)`, dicts and YAML.
        config_cls: a dataclass that derives from LossConfig.
        builders: flag -> function that takes the config and returns the loss. "torch" stands for
            "torch:eager", "jax" for "jax:xla". The function may import its framework inside.
        definition: a `loss_core.losses.LossDef`, with which `loss_core.check.check`, `loss_core.bench.bench` and their
            commands support the loss like the built-in ones. None: a class that derives from a built-in config
            inherits its definition, any other has none. See examples/custom_loss.py.
    Raises:
        ValueError: the name is registered for another class, or a flag is unknown.
        TypeError: config_cls is not a dataclass that derives from LossConfig, a builder is not callable, or
            definition is not a LossDef.

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
    # is_dataclass would accept a subclass that inherits __dataclass_fields__ but is not decorated itself.
    own_dataclass = isinstance(config_cls, type) and "__dataclass_fields__" in vars(config_cls)
    if not (own_dataclass and issubclass(config_cls, LossConfig)):
        raise TypeError(f"config_cls must be a dataclass that derives from LossConfig, got {config_cls!r}.")
    if config_cls in (LossConfig, LossFromFactoryConfig) or is_ours(config_cls):
        raise ValueError(f"{config_cls.__name__} belongs to loss_core; derive a class of your own from it.")
    if any(f.name == "name" for f in fields(config_cls)):
        raise ValueError(f"{config_cls.__name__} has a field called 'name', the key that to_dict keeps the loss under.")
    if not isinstance(name, str) or not name:
        raise TypeError(f"name must be a non-empty string, got {name!r}.")
    taken = LOSS_CONFIG_REGISTRY.get(name)
    if taken is not None and taken is not config_cls:
        raise ValueError(f"The name {name!r} is taken by {taken.__name__}; choose another.")
    if definition is not None and not hasattr(definition, "oracle"):
        raise TypeError(f"definition must be a loss_core.losses.LossDef, got {definition!r}.")
    register_builders(config_cls, builders)
    LOSS_CONFIG_REGISTRY[name] = config_cls
    DEFINITIONS.pop(config_cls, None)
    if definition is not None:
        DEFINITIONS[config_cls] = definition


def unregister_loss(name: str) -> None:
    """Remove a loss that was added with `register_loss`. Built-in losses can't be removed."""
    config_cls = LOSS_CONFIG_REGISTRY.get(name)
    if config_cls is None or is_ours(config_cls):
        raise ValueError(f"{name!r} is not a loss that was registered with register_loss.")
    del LOSS_CONFIG_REGISTRY[name]
    if config_cls not in LOSS_CONFIG_REGISTRY.values():
        unregister_builders(config_cls)
        DEFINITIONS.pop(config_cls, None)


def build_loss_config(loss: LossLike, **loss_kwargs: Any) -> LossConfig:
    """Normalise a loss specification to a LossConfig.

    | loss | result |
    |---|---|
    | LossConfig instance | the same object; kwargs are refused |
    | registry name | its typed config |
    | mapping with the key "name", as returned by `to_dict` | the named loss's config; kwargs are refused |
    | class with a registered name, if kwargs are fields of its config | the typed config |
    | any other callable | LossFromFactoryConfig |

    Raises:
        ValueError: kwargs together with a config instance or mapping, or a field value that is not accepted.
        TypeError: a config class instead of an instance, an unknown name, an unknown field, or
            an object of any other type.
    """
    if isinstance(loss, LossConfig | Mapping):
        if loss_kwargs:
            raise ValueError(
                "Loss hyperparameters must be set on the config, not passed beside it "
                f"(got {sorted(loss_kwargs)} with a {type(loss).__name__})."
            )
        return loss if isinstance(loss, LossConfig) else LossConfig.from_dict(loss)
    if isinstance(loss, type) and issubclass(loss, LossConfig):
        raise TypeError(f"Pass a LossConfig instance, not the class {loss.__name__} (e.g. {loss.__name__}()).")
    if isinstance(loss, str):
        return make_config(config_class_for(loss), loss_kwargs)
    if not callable(loss):
        raise TypeError(
            f"Expected a LossConfig, a registry name, a mapping or a loss class/callable, got {type(loss).__name__}. "
            "Resolve dotted paths in the caller."
        )
    config_cls = LOSS_CONFIG_REGISTRY.get(getattr(loss, "__name__", ""))
    if config_cls is not None and set(loss_kwargs) <= {f.name for f in fields(config_cls)}:
        return config_cls(**loss_kwargs)
    return LossFromFactoryConfig(factory=loss, kwargs=dict(loss_kwargs))


def split_backend(loss: LossLike, backend: str | None) -> tuple[LossLike, str | None]:
    """Split the optional key "backend" off a mapping: the loss without it, and the flag.

    Raises:
        ValueError: the mapping and the argument name different flags.
    """
    if not isinstance(loss, Mapping) or "backend" not in loss:
        return loss, backend
    rest = dict(loss)
    named = rest.pop("backend")
    if backend is not None and named is not None and backend != named:
        raise ValueError(f"backend={backend!r} beside a mapping with the backend {named!r}: give one of them.")
    return rest, named if backend is None else backend


def build_loss_module(loss: LossLike, *, backend: str | None = None, **loss_kwargs: Any) -> Any:
    """Build a loss: `build_loss_config(loss, **loss_kwargs).build(backend=backend)`.

    `backend` is reserved for the flag and is never passed on as a loss argument. If a factory has an
    argument of that name, bind it first with `functools.partial`.

    Args:
        loss: as in build_loss_config; a mapping may have the flag under "backend".
        backend: flag `BACKEND[:KERNEL]`; None is "torch" for typed configs.
    Raises:
        ValueError: also for a flag with a raw factory, or with a config whose `build` has no `backend` argument:
            it would be ignored.
    """
    loss, backend = split_backend(loss, backend)
    config = build_loss_config(loss, **loss_kwargs)
    if backend is None:
        return config.build()
    if not accepts_backend(config):
        raise ValueError(
            f"backend={backend!r} can't be applied: {type(config).__name__}.build() takes no backend. "
            "Leave the flag out, or register the loss with loss_core.register_loss."
        )
    return config.build(backend=backend)
