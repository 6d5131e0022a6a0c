"""The kernel that `torch:auto` chooses for a call: the fastest measured on this machine, else that of a table.

`loss-core bench --tune` measures and stores the fastest flags of a machine (`loss_core.dispatch.tuned`). Without its
results, the first rule of RULES that fits decides. Kernels that compile at their first call (`torch:compile`) are not a
default: they take seconds, so a caller chooses them, by name or with `--tune`.
"""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, cast

import torch

from loss_core.dispatch.flags import parse_flag
from loss_core.dispatch.protocol import KernelChoice
from loss_core.dispatch.tuned import tuned_choice
from loss_core_torch import kernels
from loss_core_torch.kernels import KernelSet
from loss_core_torch.self_check import disagreement


@dataclass(frozen=True)
class Rule:
    """A row of the table.

    Attributes:
        device: torch device type, "" for any. ROCm's is "cuda", too.
        max_logits: largest T * V of a call, 0 for any.
        kernel: the kernel that it chooses.
        why: reason in words.
        results: names of the results in examples/benchmarks that support it; empty if none were measured.
    """

    device: str
    max_logits: int
    kernel: str
    why: str
    results: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = f" (examples/benchmarks: {', '.join(self.results)})" if self.results else ""
        return self.why + shown


# The first rule that fits decides. tests/on_torch/test_auto.py compares each rule with its results.
RULES = (
    Rule(
        "cpu",
        1 << 18,
        "plain",
        "a small call, where blocks of rows cost more Python than they save",
        ("cpu-torch-small",),
    ),
    Rule(
        "cpu",
        0,
        "eager",
        "the fastest that does not compile at its first call; torch:compile may pay: `loss-core bench --tune`",
        ("cpu-torch-fused", "cpu-torch-fused-128k", "cpu-torch-logits", "cpu-torch-logits-bf16", "cpu-torch-kd"),
    ),
    Rule(
        "cuda",
        0,
        "triton",
        "the fewest passes over memory; agreed with torch:eager on a few rows on this device",
        ("gpu-h200-flags", "gpu-h200-fused", "gpu-h200-kd"),
    ),
    Rule("", 0, "eager", "runs on every device; not measured on this one: `loss-core bench --tune` does it"),
)


def choose(
    loss: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], candidates: tuple[str, ...]
) -> KernelChoice:
    """The kernel for a call.

    Args:
        loss: class name, such as "KDLoss".
        shape: (T, V), or (T, V, H) for the fused loss.
        candidates: kernels that implement this loss and are usable.
    """
    # While a CUDA graph is captured, kernels can't be compared: that choice is cached separately.
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return chosen(loss, device, dtype, shape, candidates, torch.get_num_threads(), capturing)


# Bounded. Cached for each kind of call, so results of `--tune` are read from the next process on.
@lru_cache(maxsize=1024)
def chosen(
    loss: str,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    candidates: tuple[str, ...],
    threads: int,
    capturing: bool,
) -> KernelChoice:
    """`choose`, cached for each kind of call."""
    flag = tuned_choice(
        loss, _device_name(device), str(dtype).removeprefix("torch."), shape, version=str(torch.__version__),
        threads=threads,
    )  # fmt: skip
    if flag is not None and parse_flag(flag).kernel in candidates:
        why = "the fastest on this machine for such a call, by `loss-core bench --tune`"
        return KernelChoice(flag, why, candidates)
    choice = by_rule(device.type, candidates, shape[0] * shape[1])
    if choice.flag == "torch:triton" and device.type == "cuda" and not capturing:
        return where_it_agrees(choice, cast(KernelSet, kernels.find("triton")), device, dtype)
    return choice


def where_it_agrees(
    choice: KernelChoice, kernel_set: KernelSet, device: torch.device, dtype: torch.dtype
) -> KernelChoice:
    """The choice, or torch:eager if the kernel set disagrees with it on a few rows on this device."""
    problem = _disagreement_with_eager(cast(Any, kernel_set), device, dtype)
    if problem is None:
        return choice
    why = f"{kernel_set.flag} was found wrong on this device: {problem}"
    return KernelChoice("torch:eager", why, choice.candidates)


def by_rule(device_type: str, candidates: tuple[str, ...], num_logits: int = 0) -> KernelChoice:
    """The choice of the first rule that fits.

    Args:
        num_logits: T * V; 0 if unknown.
    """
    for rule in RULES:
        fits = rule.max_logits == 0 or 0 < num_logits <= rule.max_logits
        if rule.device in ("", device_type) and fits and rule.kernel in candidates:
            return KernelChoice(f"torch:{rule.kernel}", str(rule), candidates)
    return KernelChoice(f"torch:{candidates[0]}", "the only kernel for this loss that can be used here", candidates)


@cache
def _disagreement_with_eager(kernel_set: KernelSet, device: torch.device, dtype: torch.dtype) -> str | None:
    """`disagreement` with torch:eager, with a warning; once per process, device and dtype."""
    problem = disagreement(kernel_set, cast(KernelSet, kernels.find("eager")), device, dtype)
    if problem is not None:
        warnings.warn(f"torch:auto takes torch:eager instead of {kernel_set.flag} on {device}: {problem}", stacklevel=2)
    return problem


def _device_name(device: torch.device) -> str:
    """The name under which `loss_core.dispatch.tuned` stores choices: "cpu", or the accelerator's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
