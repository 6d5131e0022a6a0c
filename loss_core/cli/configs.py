"""Parse the configs of --config: a name, a YAML file, or an inline mapping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from loss_core.field_checks import is_runtime_field
from loss_core.loss_config import LossConfig
from loss_core.registry import LOSS_CONFIG_REGISTRY, config_class_for
from loss_core.usage import UsageProblem, closest


def read_configs(source: str) -> list[str | LossConfig]:
    """Configs from a registry name, a YAML file, or an inline YAML or JSON mapping.

    Args:
        source: such as "KDLoss", "recipe.yaml" or "{name: KDLoss, temperature: 2.0}".
    Raises:
        UsageProblem: it is none of these, or a name, field or value in it is not accepted.
    """
    if source in LOSS_CONFIG_REGISTRY:
        return [source]
    if source.lstrip().startswith(("{", "[")):
        return _configs_in(_parse_yaml(source, "--config"), "--config")
    path = Path(source)
    if path.suffix.lower() in (".yaml", ".yml", ".json") or path.exists():
        return _configs_in(_parse_yaml(_read_text(path), source), source)
    raise UsageProblem(
        f"--config {source!r} is no loss{closest(source, LOSS_CONFIG_REGISTRY)} Give one of "
        f"{', '.join(LOSS_CONFIG_REGISTRY)}, a YAML file, or a mapping such as '{{name: KDLoss, temperature: 2.0}}'."
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise UsageProblem(f"{path} can't be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UsageProblem(f"{path} is not UTF-8 text, so not a YAML file.") from error


def _parse_yaml(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageProblem(f"{where}{at}: not valid YAML: {error.problem or error.context}.") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        # ValueError: an invalid date, such as 2024-13-45.
        raise UsageProblem(f"{where}: not valid YAML: {error}.") from error


def _configs_in(data: Any, where: str) -> list[str | LossConfig]:
    """Configs from parsed YAML: a name, a mapping, a list of these, or a recipe with the key `loss`."""
    if isinstance(data, Mapping) and "loss" in data:
        return _configs_in(data["loss"], f"{where}, loss")
    if isinstance(data, list) and data:
        return [config for i, item in enumerate(data, 1) for config in _configs_in(item, f"{where}, item {i}")]
    if isinstance(data, str) and data in LOSS_CONFIG_REGISTRY:
        return [data]
    if not isinstance(data, Mapping):
        raise UsageProblem(
            f"{where}: expected a mapping with the key 'name' and the loss's fields (or a list of these, or a "
            f"recipe with the key 'loss'), got {_described(data)}."
        )
    return [_config_from(data, where)]


def _described(data: Any) -> str:
    if data is None:
        return "nothing"
    return "an empty list" if data == [] else f"{type(data).__name__} {data!r}"


def _config_from(data: Mapping[Any, Any], where: str) -> LossConfig:
    if "name" not in data:
        keys = ", ".join(map(str, data)) or "none"
        raise UsageProblem(
            f"{where}: the key 'name' is missing; it must be one of {', '.join(LOSS_CONFIG_REGISTRY)}. "
            f"Keys found: {keys}."
        )
    name = data["name"]
    if not isinstance(name, str) or name not in LOSS_CONFIG_REGISTRY:
        raise UsageProblem(
            f"{where}: unknown loss name {name!r}{closest(name, LOSS_CONFIG_REGISTRY)} "
            f"Known: {', '.join(LOSS_CONFIG_REGISTRY)}."
        )
    known = fields(config_class_for(name))
    for f in known:
        if is_runtime_field(f) and data.get(f.name) is not None:
            raise UsageProblem(f"{where}: {f.name} is a live handle of a process; it can't come from text.")
    if "backend" in data and all(f.name != "backend" for f in known):
        # A recipe's flag selects what a training builds; for a command it is an option.
        raise UsageProblem(
            f"{where}: the key 'backend' is no field of a loss; remove it, and use --backend {data['backend']}."
        )
    try:
        return LossConfig.from_dict(data)
    except (TypeError, ValueError) as error:
        raise UsageProblem(f"{where}: {error}") from error
