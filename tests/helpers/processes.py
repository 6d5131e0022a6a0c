"""Worker processes of a test, found in /proc."""

from __future__ import annotations

import time
from pathlib import Path


def workers_of(pid: int) -> list[int]:
    """Worker processes whose parent is `pid`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
            status = (entry / "status").read_text()
        except OSError:
            continue
        if b"loss_core.workers.serve" in command and f"\nPPid:\t{pid}\n" in status:
            found.append(int(entry.name))
    return sorted(found)


def wait_for_workers(pid: int, count: int, limit: float = 300.0) -> list[int]:
    """Wait until a process has `count` workers; their ids."""
    deadline = time.monotonic() + limit
    while len(workers_of(pid)) < count and time.monotonic() < deadline:
        time.sleep(0.1)
    found = workers_of(pid)
    assert len(found) == count
    return found


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def all_gone(pids: list[int], limit: float = 60.0) -> bool:
    """Whether all processes have ended within `limit` seconds."""
    deadline = time.monotonic() + limit
    while not all(map(gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return all(map(gone, pids))
