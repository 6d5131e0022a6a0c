"""The recipe that train_byte_lm.py, demo.py and jax_step.py read: a YAML file with a loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def loss_of(path: Path) -> Any:
    """Value of the key `loss` of a YAML file; ValueError if it has none."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(recipe, dict) or "loss" not in recipe:
        raise ValueError(f"{path} must hold a mapping under the key 'loss'.")
    return recipe["loss"]
