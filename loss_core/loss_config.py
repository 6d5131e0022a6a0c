"""`LossConfig`, the base of every config: `build`, dicts, copies, pydantic."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from loss_core.dispatch.builders import build
from loss_core.field_checks import check_known, fields_of, is_runtime_field, plain_value
from loss_core.registry import config_class_for, registered_name


# Not a dataclass itself: parsers that fill dataclasses from mappings (dacite) would construct it as an empty loss.
class LossConfig:
    """Base of every loss config.

    Subclass it as a dataclass and either register builders for it with
    `loss_core.register_loss`, or override `build(self)`.

    A field declared with `field(default=None, repr=False, compare=False)` holds a runtime handle, such as a process
    group. It belongs to one process, so `to_dict` omits it as well.
    """

    if TYPE_CHECKING:
        # Every subclass is a dataclass, so type checkers may let `fields` and `replace` accept a LossConfig.
        __dataclass_fields__: ClassVar[dict[str, Any]]

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise ValueError for a field whose value is not accepted. Called on creation and on build."""

    def build(self, *, backend: str = "torch") -> Any:
        """Build the loss.

        Args:
            backend: flag `BACKEND[:KERNEL]`, such as "torch", "torch:eager", "jax:xla".
        Returns:
            A `torch.nn.Module` for torch, a hashable callable for JAX.
        Raises:
            ValueError: the flag is unknown, or a field has been set to a value that is not accepted.
            BackendUnavailable: the flag is known but can't be used here; says why and what to install.
            NotImplementedError: the config has no builder.
        """
        self.validate()
        return build(self, backend)

    def to_dict(self) -> dict[str, Any]:
        """Fields as plain values, with the registry name under "name". Runtime handles are omitted."""
        name = registered_name(type(self))
        values = {
            f.name: plain_value(copy.deepcopy(getattr(self, f.name))) for f in fields(self) if not is_runtime_field(f)
        }
        return {"name": name, **values}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Construct a config from the result of `to_dict`, or from a YAML mapping of the same form.

        Called on `LossConfig`, "name" selects the class. Called on a subclass, "name" is optional and
        must match that class.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"from_dict expects a mapping of field names to values, got {type(data).__name__}.")
        values = dict(data)
        name = values.pop("name", None)
        if name is None:
            if cls is LossConfig:
                raise TypeError(
                    "from_dict needs the key 'name' to know which loss is meant, got the keys "
                    f"{sorted(map(str, values))}."
                )
            return cast(Self, make_config(cls, values))
        config_cls = config_class_for(name)
        if not issubclass(config_cls, cls):
            raise TypeError(f"name {name!r} is {config_cls.__name__}, which is not a {cls.__name__}.")
        return cast(Self, make_config(config_cls, values))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Runtime handles, such as process groups, can't be copied; copies of a config share them.
        twin = copy.copy(self)
        for f in fields_of(type(self)):
            if not is_runtime_field(f):
                setattr(twin, f.name, copy.deepcopy(getattr(self, f.name), memo))
        return twin

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> dict[str, Any]:
        """How pydantic validates a field of this type: a config is kept, a mapping goes to `from_dict`."""
        # A core schema is a plain dict, so pydantic need not be imported.
        return {
            "type": "function-plain",
            "function": {"type": "no-info", "function": cls._parsed},
            "serialization": {"type": "function-plain", "function": lambda config: config.to_dict()},
        }

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        named = {"properties": {"name": {"type": "string"}}, "required": ["name"]} if cls is LossConfig else {}
        return {"title": cls.__name__, "type": "object", **named}

    @classmethod
    def _parsed(cls, value: Any) -> Self:
        if isinstance(value, cls):
            return value
        try:
            return cls.from_dict(value)
        except TypeError as error:  # pydantic reports only ValueErrors as validation errors
            raise ValueError(str(error)) from error


def make_config(config_cls: type[LossConfig], values: Mapping[str, Any]) -> LossConfig:
    """Construct a config; an unknown field is a TypeError that names the closest field."""
    check_known(config_cls, values)
    return config_cls(**values)
