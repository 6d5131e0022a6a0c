"""What the loops of a compiled kernel cost: instructions read from its machine code (NVIDIA), without a GPU."""

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

# What no loop over the vocabulary should hold: threads that wait for each other, or hand values to each other.
_EXCHANGES = ("BAR", "SHFL", "LDS", "STS", "LDSM", "STSM")


@dataclass(frozen=True)
class Loop:
    """An innermost loop.

    Attributes:
        instructions: how often each opcode occurs, such as {"FADD": 64}.
        load_bits, store_bits: width of each access to global memory; empty where there is none.
    """

    instructions: Counter[str]
    load_bits: tuple[int, ...]
    store_bits: tuple[int, ...]

    @property
    def count(self) -> int:
        """Instructions of a round."""
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
        """Accesses to what did not fit into registers."""
        return self.instructions["LDL"] + self.instructions["STL"]


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of local memory, of a thread."""
    report = _run("cuobjdump", ("-res-usage",), cubin)
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    # STACK as well: what ptxas spills lies on the stack of the thread.
    return found["REG"], found["STACK"] + found["LOCAL"]


def loops(cubin: bytes) -> list[Loop]:
    """Innermost loops that touch global memory, in the order of the code, not those that wait for other programs."""
    return list(_loops(_run("nvdisasm", ("-c", "-ndf"), cubin)))


def _loops(text: str) -> Iterator[Loop]:
    code, places = [], {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x?_?\d+):", line):
            places[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line):
            code.append(instruction[1])
    back = []
    for place, instruction in enumerate(code):
        jump = re.match(r"BRA.*?(\.L_x?_?\d+)", instruction)
        if jump and places.get(jump[1], place + 1) <= place:
            back.append((places[jump[1]], place))
    for start, stop in back:
        if any((start, stop) != (a, b) and start <= a and b <= stop for a, b in back):
            continue
        opcodes = [instruction.split()[0] for instruction in code[start : stop + 1]]
        loads = tuple(_bits(opcode) for opcode in opcodes if opcode.startswith("LDG"))
        stores = tuple(_bits(opcode) for opcode in opcodes if opcode.startswith("STG"))
        # A loop that waits asks memory itself each time, past every cache of the multiprocessor.
        waits = any("STRONG" in opcode for opcode in opcodes)
        if (loads or stores) and not waits:
            yield Loop(Counter(opcode.split(".")[0] for opcode in opcodes), loads, stores)


def _bits(opcode: str) -> int:
    """Of LDG.E.EL.128 or LDG.E.U16; 32 where none are named."""
    found = re.search(r"\.[US]?(8|16|64|128|256)\b", opcode)
    return int(found[1]) if found else 32


def _run(tool: str, options: tuple[str, ...], cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([_TOOLS / tool, *options, path], capture_output=True, text=True, check=True).stdout
