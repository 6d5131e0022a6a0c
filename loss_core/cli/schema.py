"""JSON Schema of recipes, from the config classes of the registry, for completion and validation in editors."""

from __future__ import annotations

import types
from dataclasses import MISSING, Field
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from loss_core.cli.listing import described
from loss_core.dispatch.builders import flags_for
from loss_core.field_checks import accepted_values, fields_of, is_runtime_field, plain_value
from loss_core.loss_config import LossConfig
from loss_core.registry import LOSS_CONFIG_REGISTRY

_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the recipes that `build_loss_module` accepts, as plain values.

    A document is a loss, a list of losses, or a recipe with a loss under the key `loss` and any other keys. A loss is a
    name, or a mapping of `name`, fields, and `backend`. Fields for live handles of a process are excluded.
    """
    losses = {name: loss_schema(name, config_cls) for name, config_cls in LOSS_CONFIG_REGISTRY.items()}
    loss = {"oneOf": [{"$ref": f"#/$defs/{name}"} for name in losses]}
    named = {"enum": list(losses), "description": "Registry name of a loss, with its defaults."}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Recipe of loss_core",
        "anyOf": [
            {"$ref": "#/$defs/losses"},
            {"type": "object", "properties": {"loss": {"$ref": "#/$defs/losses"}}, "required": ["loss"]},
        ],
        "$defs": {
            **losses,
            "losses": {"anyOf": [loss, named, {"type": "array", "items": {"anyOf": [loss, named]}, "minItems": 1}]},
        },
    }


def loss_schema(name: str, config_cls: type[LossConfig]) -> dict[str, Any]:
    """JSON Schema of a mapping for this config, from its fields, its validation, and its docstring."""
    summary, meanings = described(config_cls)
    hints = get_type_hints(config_cls)
    accepted = _accepted(config_cls)
    properties: dict[str, Any] = {"name": {"const": name, "description": summary}}
    required = ["name"]
    for f in fields_of(config_cls):
        if not f.init or is_runtime_field(f):
            continue
        properties[f.name] = {
            **_of_type(hints[f.name]),
            **accepted.get(f.name, {}),
            **_default(f),
            **({"description": meanings[f.name]} if f.name in meanings else {}),
        }
        if f.default is MISSING and f.default_factory is MISSING:
            required.append(f.name)
    properties["backend"] = {
        "enum": list(flags_for(config_cls)),
        "default": "torch",
        "description": "Flag BACKEND[:KERNEL]; `loss-core backends` says which can be used here.",
    }
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _accepted(config_cls: type[LossConfig]) -> dict[str, dict[str, Any]]:
    """Values that `validate` accepts, by field; empty for a class that can't be created without arguments."""
    with accepted_values() as noted:
        try:
            config_cls()
        except (TypeError, ValueError):
            return {}
    return noted


def _of_type(hint: Any) -> dict[str, Any]:
    """JSON Schema of a type annotation; empty for a type without one."""
    if hint is type(None):
        return {"type": "null"}
    if get_origin(hint) is Literal:
        return {"enum": list(get_args(hint))}
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_of_type(part) for part in get_args(hint)]
        return {"anyOf": parts} if all(parts) else {}
    json_type = _JSON_TYPES.get(get_origin(hint) or hint)
    return {"type": json_type} if json_type else {}


def _default(f: Field[Any]) -> dict[str, Any]:
    value = plain_value(f.default_factory() if f.default_factory is not MISSING else f.default)
    return {"default": value} if value is None or isinstance(value, bool | int | float | str | list | dict) else {}
