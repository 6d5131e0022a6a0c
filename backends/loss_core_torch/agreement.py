"""What the ranks of a group tell each other before the first collective of a call.

A collective that some ranks never reach, or reach with other sizes, hangs or hands out garbage. So each rank first
puts what it is about to do into the group's store, and reads what the others put there: on the host, without a
collective and without a look at the device. A rank whose arguments are wrong says so in the same place, and the error
is raised on every rank.
"""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

# Seconds between two looks into the store; the first waits are the shortest, ranks being in step most of the time.
_FIRST_WAIT, _LONGEST_WAIT = 0.0001, 0.02

# Number of exchanges so far, by group: every rank counts the same calls.
_COUNTS: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

# What was agreed on a group, by message: see `remembered`. Bounded, in the order of the calls, on all ranks alike.
_KNOWN: weakref.WeakKeyDictionary[Any, dict[str, list[dict[str, Any]]]] = weakref.WeakKeyDictionary()
_MOST_KNOWN = 1024


def exchange(group: Any, message: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of all ranks of the group, in rank order. JSON goes in and comes out.

    Raises:
        ValueError: some ranks did not come within the store's timeout (that of init_process_group).
    """
    store: Any = distributed_c10d.PrefixStore("loss_core", _store(group))
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    count = _COUNTS[group] = _COUNTS.get(group, 0) + 1
    keys = [f"{count}/{other}" for other in range(ranks)]
    store.set(keys[rank], json.dumps(message))
    _wait(store, keys, rank)
    found = store.multi_get(keys) if store.has_extended_api() else [store.get(key) for key in keys]
    # Whoever put a message here has read all of the last exchange: this rank's key of then has done its work.
    store.delete_key(f"{count - 1}/{rank}")
    return [json.loads(text) for text in found]


def remembered(group: Any, message: dict[str, Any]) -> list[dict[str, Any]]:
    """As `exchange`, but with the other ranks only the first time that this message is sent."""
    known = _KNOWN.setdefault(group, {})
    text = json.dumps(message)
    if text not in known:
        if len(known) >= _MOST_KNOWN:
            known.pop(next(iter(known)))
        known[text] = exchange(group, message)
    return known[text]


def has_agreed(group: Any) -> bool:
    """Whether `remembered` holds anything for the group: then the other ranks may not come to an exchange."""
    return bool(_KNOWN.get(group))


def differing(messages: Sequence[dict[str, Any]], keys: Sequence[str]) -> str | None:
    """The first key on which the ranks do not agree, as a sentence; None where they do."""
    for key in keys:
        found = [message.get(key) for message in messages]
        other = next((rank for rank, value in enumerate(found) if value != found[0]), None)
        if other is not None:
            return (
                f"{key} must be the same on every rank of the group: {found[0]} on rank 0, {found[other]} on rank "
                f"{other}."
            )
    return None


def _store(group: Any) -> Any:
    # A method of the group in newer versions of torch.
    if hasattr(group, "get_group_store"):
        return group.get_group_store()
    return distributed_c10d._get_process_group_store(group)


def _wait(store: Any, keys: Sequence[str], rank: int) -> None:
    """Until all keys are there. Looks again and again: a blocking wait would hold the store from other threads."""
    end, pause = time.monotonic() + store.timeout.total_seconds(), _FIRST_WAIT
    while not store.check(list(keys)):
        if time.monotonic() > end:
            missing = [other for other, key in enumerate(keys) if not store.check([key])]
            raise ValueError(
                f"Ranks {missing} of the group did not come to this loss within {store.timeout.total_seconds():g} s, "
                f"rank {rank} did. Every rank of the group must call the loss, in the same order."
            )
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_WAIT)
