"""The calls of a check: which losses and flags are run, how each call is named, and the command that reproduces it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.check.report import Report, framework_version
from loss_core.dispatch.flags import COMPILED_AT_FIRST_CALL, all_flags, flag_status, parse_flag, usable_flag
from loss_core.dispatch.protocol import BackendUnavailable
from loss_core.dtypes import round_to
from loss_core.loss_config import LossConfig
from loss_core.losses import Case
from loss_core.losses.bounds.rounding import result_dtype
from loss_core.losses.definition import need_definition
from loss_core.registry import LOSS_CONFIG_REGISTRY, config_class_for, our_losses

# `Finding.against` of a comparison with the oracle.
ORACLE = "float64"


@dataclass(frozen=True)
class Call:
    """One case of one loss in one dtype.

    Attributes:
        loss: registry name or config, as the caller passed it.
        name: the loss's name in the table.
        suffix: further options of the reproduce line.
        captured: whether the inputs are a captured call of the user's.
        ranks: number of ranks that share the vocabulary; 0: unsharded, in this process.
        split: name of the vocabulary split ("even", "uneven", ...); sizes: classes in each rank's shard.
        number: index of a random case.
        harder: whether the case was added because all others would pass a lower arithmetic.
    """

    loss: str | LossConfig
    name: str
    case: Case
    dtype: str
    suffix: str
    device: str | None
    captured: bool
    ranks: int = 0
    split: str = ""
    sizes: tuple[int, ...] = ()
    number: int | None = None
    harder: bool = False

    @property
    def case_name(self) -> str:
        """The case, with the split: "mean/uneven"."""
        return f"{self.case.name}/{self.split}" if self.ranks else self.case.name

    def flag_name(self, flag: str) -> str:
        """The flag, with the rank count: "torch:eager tp=2"."""
        return f"{flag} tp={self.ranks}" if self.ranks else flag

    def reproduce(self, flag: str, against: str) -> str:
        """The command that runs this call alone; a line of Python for a config class that is not registered."""
        other = "" if against == ORACLE else f" --against {against}"
        if (config := config_option(self.loss)) is None:
            return f"check({self.loss!r}, [{flag!r}], dtypes=[{self.dtype!r}], only=[{self.case.name!r}])"
        case = "" if self.captured else f" --case {self.case.name}"
        case += f" --tp {self.ranks}" if self.ranks else ""
        return f"loss-core check --config {config} --backend {flag}{other} --dtype {self.dtype}{case}{self.suffix}"


def config_option(loss: str | LossConfig) -> str | None:
    """The value of --config on a command line, quoted; None for a config class that is not registered."""
    if isinstance(loss, str):
        return shlex.quote(loss)
    return shlex.quote(json.dumps(loss.to_dict())) if type(loss) in LOSS_CONFIG_REGISTRY.values() else None


def _name(loss: str | LossConfig) -> str:
    if isinstance(loss, str):
        return loss
    exact = [name for name, cls in LOSS_CONFIG_REGISTRY.items() if type(loss) is cls]
    parents = [name for name, cls in LOSS_CONFIG_REGISTRY.items() if isinstance(loss, cls)]
    return [*exact, *parents, type(loss).__name__][0]


def distinct_names(losses: Sequence[str | LossConfig]) -> list[str]:
    """A distinct name for each loss; several configs of one loss are named with their non-default fields."""
    names = [_name(loss) for loss in losses]
    qualified = [
        name if names.count(name) == 1 or isinstance(loss, str) else f"{name}({_non_default_fields(loss)})"
        for loss, name in zip(losses, names, strict=True)
    ]
    return [
        name if qualified.count(name) == 1 else f"{name} #{qualified[: i + 1].count(name)}"
        for i, name in enumerate(qualified)
    ]


def _non_default_fields(config: LossConfig) -> str:
    changed = [
        f"{f.name}={value!r}"
        for f in fields(config)
        for value in [getattr(config, f.name)]
        if f.compare and (f.default is MISSING or value != f.default)
    ]
    return ", ".join(changed)


def filters_text(shape: tuple[int, ...] | None, only: Sequence[str] | None) -> str:
    """The requested case names and shape, for messages."""
    names = f" named {' or '.join(only)}" if only is not None else ""
    return names + (f" at the shape {','.join(map(str, shape))}" if shape is not None else "")


def chosen_losses(config: str | LossConfig | Sequence[str | LossConfig] | None) -> list[str | LossConfig]:
    """The losses to check, as a list; None: all of this library. Raises TypeError for a loss without a definition."""
    if config is None:
        return list(our_losses())
    losses = [config] if isinstance(config, str | LossConfig) else list(config)
    for loss in losses:
        loss = config_of(loss)
        if not isinstance(loss, LossConfig):
            raise TypeError(f"config must be a registry name or a LossConfig, got {loss!r}.")
        need_definition(loss)
    return losses


def chosen_flags(backends: Sequence[str] | None, against: str | None, report: Report) -> list[str]:
    """The flags to run, each with its kernel or `auto`; records versions, unusable and skipped flags in the report."""
    if backends is None:
        statuses = [flag_status(flag) for flag in all_flags()]
        report.unusable = [status for status in statuses if not status.usable]
        usable = [status.flag for status in statuses if status.usable]
        flags = [flag for flag in usable if flag not in COMPILED_AT_FIRST_CALL]
        report.skipped += [
            f"{flag}: it compiles for each kind of input, which takes about a minute over all cases; name it to "
            f"check it (--backend {flag})"
            for flag in usable
            if flag not in flags and flag != against
        ]
        if not flags:
            raise BackendUnavailable("; ".join(dict.fromkeys(status.reason for status in report.unusable)))
    else:
        flags = [usable_flag(flag) for flag in backends]
    if against is not None:
        flags.append(usable_flag(against))
    flags = list(dict.fromkeys(flags))
    for backend in dict.fromkeys(parse_flag(flag).backend for flag in flags):
        report.versions[backend] = framework_version(backend)
    return flags


def config_of(loss: str | LossConfig) -> LossConfig:
    """The default config of a registry name; a config is returned unchanged."""
    return config_class_for(loss)() if isinstance(loss, str) else loss


def reproduce_suffix(shape: tuple[int, ...] | None, num_random: int, seed: int, device: str | None) -> str:
    """Options that a reproduce line repeats."""
    parts = []
    if shape is not None:
        parts.append(f" --shape {','.join(map(str, shape))}")
    if num_random:
        parts.append(f" --cases {num_random} --seed {seed}")
    if device is not None:
        parts.append(f" --device {device}")
    return "".join(parts)


def rounded_inputs(call: Call) -> tuple[dict[str, NDArray[Any]], NDArray[Any] | None]:
    """The call's arrays, rounded to its dtype (views of longer arrays in a strided case), and upstream gradient."""
    case, dtype = call.case, call.dtype
    # Weights and teacher logits stay contiguous.
    arguments = need_definition(case.config).arguments
    sliced = [a.name for a in arguments if case.strided and a.dims[:1] == ("T",) and a.trained]
    arrays = {}
    for name, value in case.arrays.items():
        value = round_to(value, dtype) if value.dtype.kind == "f" else value
        if name in sliced and value.dtype.kind == "f" and value.ndim > 1:
            # A slice of the rows of a 2-D array would be contiguous, so a 2-D array is sliced along its columns.
            axis = -2 if value.ndim > 2 else -1
            longer = np.concatenate([value, np.zeros_like(value[..., :1, :] if axis == -2 else value[..., :1])], axis)
            value = longer[..., :-1, :] if axis == -2 else longer[..., :-1]
        arrays[name] = value
    upstream = case.upstream
    return arrays, None if upstream is None else round_to(upstream, result_dtype(case.config, dtype))
