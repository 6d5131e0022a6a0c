"""Losses of other projects with the forward arguments of loss_core: one file per project, for `check` and `bench`.

An adapter renames arguments and sets options; it corrects nothing. Each file has a table `LOSSES`: name of a loss's
definition -> (builder from a loss_core config, config fields that it supports with values other than their defaults).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from loss_core.baselines import BASELINES
from loss_core.dispatch.protocol import BackendUnavailable
from loss_core.losses.definition import need_definition

Loss = Callable[..., Any]
Losses = Mapping[str, tuple[Callable[[Any], Loss], tuple[str, ...]]]


def build(name: str, config: Any) -> Loss:
    """Build the loss of a baseline for a config.

    Raises:
        BackendUnavailable: its packages are missing, or it has no such loss or option.
    """
    baseline = BASELINES[name]
    if missing := baseline.missing():
        raise BackendUnavailable(f"{name} needs {', '.join(missing)}: {baseline.install}")
    losses: Losses = importlib.import_module(f"loss_core_baselines.{baseline.adapter}").LOSSES
    builder, options = losses.get(need_definition(config).name, (None, ()))
    # ChunkedCEConfig has the arguments of FusedLinearCEConfig without its options.
    if builder is None or not {field.name for field in fields(config)}.issuperset(options):
        raise BackendUnavailable(f"{name} has no loss for {type(config).__name__}.")
    for field in fields(config):
        if field.name not in options and field.compare and getattr(config, field.name) != field.default:
            raise BackendUnavailable(f"{name} has no {field.name}={getattr(config, field.name)!r}.")
    return builder(config)


def reduced(loss_T: Any, labels: Any, config: Any) -> Any:
    """Reduce the loss of each token, for projects without reductions; ignored labels are -100."""
    if config.reduction == "none":
        return loss_T
    return loss_T.sum() / (labels != -100).sum() if config.reduction == "mean" else loss_T.sum()
