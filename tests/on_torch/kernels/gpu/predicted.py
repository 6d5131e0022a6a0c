"""Predicted time of a kernel, from its machine code and the bytes it moves, as a share of a copy's time.

    memory = (bytes read and written once + those read twice that the L2 cache has evicted) / (MEMORY x copy rate)
    issue = instructions / (ISSUE x multiprocessors x 128 x clock)

The time is the longer of the two. The second read of a row goes from its last column to its first, so on average half
of the columns of each program in flight must stay in the cache.

The three factors were fitted to a run on an H200 and are within 13 points of all measurements there and on an H100
(BENCHMARKS.md), including rows that several programs share since. A single pass over a row reaches 0.95 of a copy's
rate. Lines are evicted as if 0.3 of the 60 MiB of L2 were available (each of its two halves holds what its
multiprocessors read: DRAM counters show 5 %, 47 % and 69 % of a row read again at 17, 34 and 68 MB). And 0.67 of the
issue slots are used if memory is not the limit.
"""

from __future__ import annotations

from dataclasses import dataclass

MEMORY, CACHE, ISSUE = 0.95, 0.3, 0.67


@dataclass(frozen=True)
class Chip:
    """A GPU.

    Attributes:
        multiprocessors, clock: count, and Hz under load.
        l2_bytes: size of the L2 cache.
        copy: bytes read and written per second by a copy of 2 GiB.
        source: of these numbers.
    """

    multiprocessors: int
    clock: float
    l2_bytes: int
    copy: float
    source: str


CHIPS = {
    "H200": Chip(132, 1.755e9, 60 << 20, 4.27e12, "device properties; copy measured 2026-11-26"),
    "H100": Chip(132, 1.755e9, 50 << 20, 3.02e12, "device properties; copy measured 2026-11-27"),
}

# Registers, threads and programs of a multiprocessor.
_REGISTERS, _THREADS, _PROGRAMS = 65536, 2048, 32


@dataclass(frozen=True)
class Plan:
    """Bytes that a kernel moves.

    Attributes:
        once: bytes per logit that are read for the first time, or written.
        again: bytes per logit that are read a second time.
    """

    once: int
    again: int = 0


def resident_programs(registers: int, threads: int) -> int:
    """Programs that a multiprocessor runs at the same time."""
    per_program = -(-registers // 8) * 8 * threads
    return max(min(_REGISTERS // per_program, _THREADS // threads, _PROGRAMS), 1)


def share_of_copy(
    chip: Chip, plan: Plan, columns: int, registers: int, threads: int, instructions_per_logit: float
) -> float:
    """Time of a copy of the bytes that must be moved, over the predicted time with so many columns per program."""
    in_flight = chip.multiprocessors * resident_programs(registers, threads)
    cached = in_flight * columns * plan.again / 2
    evicted = max(0.0, 1 - CACHE * chip.l2_bytes / cached) if cached else 0.0
    memory = (plan.once + evicted * plan.again) / (MEMORY * chip.copy)
    issue = instructions_per_logit / (ISSUE * chip.multiprocessors * 128 * chip.clock)
    return plan.once / chip.copy / max(memory, issue)
