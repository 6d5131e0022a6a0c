"""Loops of a compiled kernel: instructions and accesses read from its machine code (NVIDIA), without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Barriers, shuffles and accesses to shared memory, which no loop over the vocabulary should have.
_EXCHANGES = ("BAR", "SHFL", "LDS", "STS", "LDSM", "STSM")


@dataclass(frozen=True)
class Loop:
    """An innermost loop.

    Attributes:
        instructions: count of each opcode, such as {"FADD": 64}.
        load_bits, store_bits: width of each access to global memory.
    """

    instructions: Counter[str]
    load_bits: tuple[int, ...]
    store_bits: tuple[int, ...]

    @property
    def count(self) -> int:
        """Instructions of an iteration."""
        return self.instructions.total()

    @property
    def exchanges(self) -> int:
        """Barriers, shuffles and accesses to shared memory."""
        return sum(self.instructions[name] for name in _EXCHANGES)

    @property
    def special(self) -> int:
        """Instructions of the special function unit."""
        return self.instructions["MUFU"]

    @property
    def spills(self) -> int:
        """Accesses to spilled registers."""
        return self.instructions["LDL"] + self.instructions["STL"]


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory per thread."""
    report = _run("cuobjdump", ("-res-usage",), cubin)
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    # STACK as well: ptxas spills to the stack of the thread.
    return found["REG"], found["STACK"] + found["LOCAL"]


def loops(cubin: bytes) -> list[Loop]:
    """Innermost loops that access global memory, in the order of the code, except those that poll."""
    return list(_loops(_run("nvdisasm", ("-c", "-ndf"), cubin)))


def _loops(text: str) -> Iterator[Loop]:
    code, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x?_?\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line):
            code.append(instruction[1])
    spans = []
    for index, instruction in enumerate(code):
        branch = re.match(r"BRA.*?(\.L_x?_?\d+)", instruction)
        if branch and labels.get(branch[1], index + 1) <= index:
            spans.append((labels[branch[1]], index))
    for start, stop in spans:
        if any((start, stop) != (a, b) and start <= a and b <= stop for a, b in spans):
            continue
        opcodes = [instruction.split()[0] for instruction in code[start : stop + 1]]
        loads = tuple(_bits(opcode) for opcode in opcodes if opcode.startswith("LDG"))
        stores = tuple(_bits(opcode) for opcode in opcodes if opcode.startswith("STG"))
        # A loop that polls bypasses the caches of the multiprocessor.
        polls = any("STRONG" in opcode for opcode in opcodes)
        if (loads or stores) and not polls:
            yield Loop(Counter(opcode.split(".")[0] for opcode in opcodes), loads, stores)


def _bits(opcode: str) -> int:
    """Width of an access such as LDG.E.EL.128 or LDG.E.U16; 32 if the opcode names none."""
    found = re.search(r"\.[US]?(8|16|64|128|256)\b", opcode)
    return int(found[1]) if found else 32


def _run(tool: str, options: tuple[str, ...], cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([_TOOLS / tool, *options, path], capture_output=True, text=True, check=True).stdout
