"""Machine properties and state that timings depend on: processor, accelerators and their clocks, other processes."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_GPU_FIELDS = (
    "name", "driver_version", "memory.used", "memory.total", "clocks.sm", "clocks.max.sm", "power.draw",
    "temperature.gpu", "utilization.gpu",
)  # fmt: skip


def describe_machine() -> dict[str, Any]:
    """The machine and its current state, for the report."""
    described: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        **_processor(),
        "cores": os.cpu_count(),
    }
    if hasattr(os, "getloadavg"):
        described["load"] = round(os.getloadavg()[0], 2)
    if gpus := _nvidia("gpu", _GPU_FIELDS):
        described["accelerators"] = gpus
        described["accelerator_processes"] = _nvidia("compute-apps", ("pid", "used_memory"))
    return described


def _processor() -> dict[str, str]:
    """Its name and widest vector instructions, with which libraries on some processors multiply twice as fast."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    instructions = fields.get("flags", "").split()
    vector = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in instructions), "")
    return {"processor": fields.get("model name") or platform.processor() or platform.machine(), "vector": vector}


def _nvidia(what: str, names: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows of an nvidia-smi query; empty if it is missing or fails."""
    command = ["nvidia-smi", f"--query-{what}={','.join(names)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(", ") for line in answer.splitlines() if line.strip()]
    return [dict(zip(names, row, strict=False)) for row in rows]


def free_memory() -> int:
    """Bytes that can be allocated without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    # Without /proc/meminfo: what a small laptop can spare.
    return 4 * 2**30
