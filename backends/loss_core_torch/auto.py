"""What `torch:auto` takes for a call: what was fastest on this machine, else what the table below says.

`loss-core bench --tune` measures and keeps the fastest flags of a machine (`loss_core.choices`). Where it has not been
run, a row of RULES decides; each says what was measured. A kernel that compiles at its first call (`torch:compile`) is
no default: the seconds that this takes are the caller's to spend, by its name or by `--tune`, which shows its first
call beside its time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from loss_core.backend import KernelChoice, parse_flag
from loss_core.choices import tuned_choice


@dataclass(frozen=True)
class Rule:
    """A row of the table.

    Attributes:
        device: torch device type it is for, "" for any.
        loss: class name, "" for any.
        kernel: what it takes.
        why: in words.
        results: names of the results in BENCHMARKS.md that show it; empty where nothing was measured.
    """

    device: str
    loss: str
    kernel: str
    why: str
    results: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = f" (BENCHMARKS.md: {', '.join(self.results)})" if self.results else ""
        return self.why + shown


_NO_COMPILER = "the fastest that does not compile at its first call; torch:compile may pay: `loss-core bench --tune`"

# The first row that fits counts. tests/test_auto.py holds each row with results to what these say.
RULES = (
    Rule(
        "cpu",
        "FusedLinearCrossEntropy",
        "eager",
        "made for CPUs, ahead of F.linear_cross_entropy",
        ("cpu-torch-fused", "cpu-torch-fused-bf16", "cpu-torch-fused-128k", "cpu-torch-fused-ignored"),
    ),
    Rule("cpu", "MaskedCrossEntropy", "eager", _NO_COMPILER, ("cpu-torch-logits", "cpu-torch-logits-bf16")),
    Rule("cpu", "KDLoss", "eager", _NO_COMPILER, ("cpu-torch-kd",)),
    Rule("cpu", "", "eager", "made for CPUs, with the kernels of MaskedCrossEntropy"),
    Rule("", "", "eager", "runs on every device; not measured on this one yet: `loss-core bench --tune` does it"),
)


# Bounded, and read once for each kind of call: what `--tune` writes counts from the next process on.
@lru_cache(maxsize=1024)
def choose(
    loss: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], candidates: tuple[str, ...]
) -> KernelChoice:
    """The kernel for a call.

    Args:
        loss: class name, such as "KDLoss".
        shape: (T, V), or (T, V, H) for the fused loss.
        candidates: kernels that have this loss and can be used.
    """
    flag = tuned_choice(loss, _device_name(device), str(dtype).removeprefix("torch."), shape)
    if flag is not None and parse_flag(flag).kernel in candidates:
        return KernelChoice(
            flag, "the fastest on this machine for such a call, by `loss-core bench --tune`", candidates
        )
    return by_rule(loss, device.type, candidates)


def by_rule(loss: str, device_type: str, candidates: tuple[str, ...]) -> KernelChoice:
    """The first row of the table that fits."""
    for rule in RULES:
        if rule.device in ("", device_type) and rule.loss in ("", loss) and rule.kernel in candidates:
            return KernelChoice(f"torch:{rule.kernel}", str(rule), candidates)
    return KernelChoice(f"torch:{candidates[0]}", "the only kernel for this loss that can be used here", candidates)


def _device_name(device: torch.device) -> str:
    """As `loss_core.choices` has it: "cpu", or the accelerator's own name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
