"""Agreement of the ranks of a group on a call, before its first collective.

A collective that some ranks never reach, or reach with other sizes, hangs or returns garbage. So each rank first
publishes its arguments in the group's store. The first rank of the group reads all messages and publishes an answer:
an error, which every rank raises, or the sizes of the shards. The messages pass between the hosts, without a
collective and without a device sync, so work that is already queued on an accelerator continues.

They are exchanged at every call, on accelerators too. A rank could look up a cached answer only by its own arguments.
Two heads with shards of (3, 3, 3, 1) and (3, 3, 3, 2) classes look the same to ranks 0 to 2, and heads of (2, 3, 3) and
(3, 3, 2) to rank 1, whose first class differs. A rank without a cached answer would wait for ranks that publish
nothing, or these would compute with the shards of another head. Nor can the row terms carry a check: they already hold
the logit at the label, and a different number of tokens breaks their collective.
"""

# T = tokens

from __future__ import annotations

import json
import time
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from loss_core_torch import compat, tracing
from loss_core_torch.inputs import Tokens
from loss_core_torch.parallel.placement import Ranks

Message = dict[str, Any]

# Seconds between two polls of the store: an eighth of the time already waited, within these bounds.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.0001, 0.02

# Number of completed exchanges of each group, the same on all of its ranks.
_COUNTS: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Shards:
    """This rank's shard of the vocabulary.

    Attributes:
        group: process group over which the vocabulary is sharded.
        start: first class of this rank.
        total: number of classes of all ranks.
        even: whether the shards are equal, and in the order of the group's ranks.
    """

    group: Any
    start: int
    total: int
    even: bool


def agree(
    ranks: Ranks,
    what: str,
    like: Any,
    vocab_dim: int,
    ignore_index: int | None,
    check: Callable[[], Tokens],
    must_match: Mapping[str, Any] | None = None,
    read_values: bool | None = None,
) -> tuple[Tokens, Shards | None]:
    """Check the arguments on every rank; returns the checked tokens and this rank's shard of the vocabulary.

    Without other ranks (`compat.has_peers`) nothing is exchanged, and the shards are assumed to be equal, unless a
    DTensor defines their sizes.

    Args:
        what: the loss and its settings, which must be the same on every rank.
        like: this rank's logits or weight, not checked yet.
        vocab_dim: the dimension of `like` over the vocabulary.
        ignore_index: the label that is accepted without being a class; None: any label is accepted.
        check: checks this rank's arguments; may raise.
        must_match: further values by name that must be equal on the ranks over which the vocabulary is sharded; JSON.
        read_values: whether these ranks also compare the values of labels, masks and weights. None: where reading
            them costs no device sync. Elsewhere a label that is no class makes its token NaN.
    Raises:
        ValueError: on every rank, where the arguments of any rank are invalid or do not fit those of another, or where
            a rank does not make the call within the timeout of the process group.
        Exception: what `check` raised, on the rank where it did.
    """
    peers = [group for group in (*ranks.tokens, *ranks.grad_reduce) if compat.has_peers(group)]
    if not peers and (ranks.vocab is None or not compat.has_peers(ranks.vocab)):
        return check(), _shards_without_peers(ranks, like, vocab_dim)
    is_tensor = isinstance(like, Tensor) and like.dim() > 0
    vocab, dtype = (like.shape[vocab_dim], str(like.dtype)) if is_tensor else (0, "")
    if read_values is None:
        read_values = not is_tensor or tracing.is_readable(like)
    tokens, local_error, problem = None, None, None
    try:
        tokens = check()
    # Any exception must reach the other ranks before it is raised here.
    except Exception as error:
        local_error, problem = error, f"{type(error).__name__}: {error}"
    message: Message = {"what": what, "vocab": vocab, "index": ranks.shard_index, "dtype": dtype, "problem": problem}
    message |= must_match or {}
    if tokens is not None:
        message |= {"shape": list(tokens.shape)} | (_values(tokens) if read_values else {})

    def answer(messages: list[Message]) -> Message:
        return _shards_or_problem(messages, ("what", "shape", "dtype", *(must_match or {})), ignore_index)

    answered = answer([message]) if ranks.vocab is None else exchange(ranks.vocab, message, answer)
    problem = answered["problem"]
    for group in peers:
        problem = exchange(group, {"what": what, "problem": problem}, _problem)
    if local_error is not None:
        raise local_error
    if problem is not None:
        raise ValueError(problem)
    assert tokens is not None
    return tokens, _shards(ranks, answered["sizes"], answered["in_order"])


def exchange(group: Any, message: Message, answer: Callable[[list[Message]], Any]) -> Any:
    """The answer to the messages of all ranks of a group, the same on every rank. Messages and answer are JSON.

    Args:
        answer: returns the answer to the messages in rank order; called on the group's first rank.
    Raises:
        ValueError: some ranks published no message within the store's timeout (that of init_process_group). The
            exchange is not counted then, so that all ranks have the same count at the next one.
    """
    store: Any = PrefixStore("loss_core", compat.group_store(group))
    rank, count = dist.get_rank(group), _COUNTS.get(group, 0)
    keys = [f"{count}/{other}" for other in range(dist.get_world_size(group))]
    store.set(keys[rank], json.dumps(message))
    try:
        if rank == 0:
            _wait(store, keys, keys)
            found = store.multi_get(keys) if store.has_extended_api() else [store.get(key) for key in keys]
            text = json.dumps(answer([json.loads(text) for text in found]))
            store.set(f"{count}/answer", text)
            # Every rank has published a message, so it has read the previous answer.
            store.delete_key(f"{count - 1}/answer")
        else:
            _wait(store, [f"{count}/answer"], keys)
            text = store.get(f"{count}/answer")
    finally:
        store.delete_key(keys[rank])
    _COUNTS[group] = count + 1
    return json.loads(text)


def _wait(store: Any, wanted: list[str], keys: list[str]) -> None:
    """Wait until all wanted keys are in the store. Polls: a blocking wait would lock the store for other threads.

    Args:
        keys: of the ranks' messages, in rank order; the error names the missing ranks.
    """
    begin = time.monotonic()
    while not store.check(wanted):
        waited = time.monotonic() - begin
        if waited > store.timeout.total_seconds():
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            raise ValueError(
                f"Ranks {missing or [0]} of the group did not come to this loss within "
                f"{store.timeout.total_seconds():g} s, or gave up waiting. Every rank of the group must call the "
                "loss, in the same order."
            )
        time.sleep(min(max(waited / 8, _SHORTEST_PAUSE), _LONGEST_PAUSE))


def _shards(ranks: Ranks, sizes: list[int], in_order: bool) -> Shards | None:
    """This rank's shard from the sizes of all, in the order of the vocabulary."""
    if ranks.vocab is None:
        return None
    even = in_order and all(size == sizes[0] for size in sizes)
    return Shards(ranks.vocab, sum(sizes[: ranks.shard_index]), sum(sizes), even)


def _shards_without_peers(ranks: Ranks, like: Tensor, vocab_dim: int) -> Shards | None:
    """This rank's shard: as DTensor chunks the classes where their number is known, else one of equal shards."""
    if ranks.vocab is None:
        return None
    count, vocab = dist.get_world_size(ranks.vocab), like.shape[vocab_dim]
    if ranks.classes is None:
        return Shards(ranks.vocab, ranks.shard_index * vocab, count * vocab, True)
    chunk = -(-ranks.classes // count)
    return Shards(ranks.vocab, ranks.shard_index * chunk, ranks.classes, ranks.classes % count == 0)


def _values(tokens: Tokens) -> Message:
    """Values for the comparison of ranks: count, a checksum of each input, smallest and largest label."""
    message: Message = {"count": None if tokens.num_tokens is None else float(tokens.num_tokens)}
    assert tokens.keep_T is not None
    labels_T = torch.where(tokens.keep_T, tokens.labels_T, 0)
    of_tokens = {"labels": labels_T, "labels and mask": tokens.keep_T, "loss_weights": tokens.weights_T}
    if tokens.teacher is not None:
        valid = [x.detach().masked_fill(~tokens.keep_T[:, None], 0) for x in tokens.teacher]
        of_tokens |= {"teacher_indices": valid[0], "teacher_logprobs": valid[1]}
    for name, value in of_tokens.items():
        if value is not None:
            message[name] = zlib.crc32(value.detach().contiguous().view(torch.uint8).numpy().data)
    if labels_T.numel():
        for name, at in (("low", labels_T.argmin()), ("high", labels_T.argmax())):
            message[name] = [list(_position(int(at), tokens.shape)), int(labels_T[at])]
    return message


def _position(index: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(index), shape)) if shape else ()


def _shards_or_problem(messages: Sequence[Message], must_match: Sequence[str], ignore_index: int | None) -> Message:
    """The answer to the ranks over which the vocabulary is sharded."""
    in_order = sorted(messages, key=lambda message: message["index"])
    return {
        "problem": _problem(messages, must_match) or _problem_of_values(messages, ignore_index),
        "sizes": [message["vocab"] for message in in_order],
        "in_order": in_order == messages,
    }


def _problem(messages: Sequence[Message], must_match: Sequence[str] = ("what",)) -> str | None:
    """The first problem of a rank, else the first key of `must_match` in which the ranks differ, else None."""
    for rank, message in enumerate(messages):
        if message["problem"] is not None:
            return _on_rank(rank, message["problem"], len(messages))
    for key in must_match:
        found = [message.get(key) for message in messages]
        if (other := _first_mismatch(found)) is not None:
            return (
                f"{key} must be the same on every rank of the group: {found[0]} on rank 0, {found[other]} on rank "
                f"{other}."
            )
    return None


def _problem_of_values(messages: Sequence[Message], ignore_index: int | None) -> str | None:
    """As `_problem`, for the entries of `_values`, which messages may lack."""
    total = sum(message["vocab"] for message in messages)
    for rank, message in enumerate(messages):
        for position, label in (message[end] for end in ("low", "high") if end in message):
            if ignore_index is not None and not 0 <= label < total:
                text = f"labels{position} is {label}, which is neither a class in [0, {total}) nor ignore_index "
                return _on_rank(rank, f"{text}({ignore_index}).", len(messages))
    for name in ("labels", "labels and mask", "loss_weights", "teacher_indices", "teacher_logprobs"):
        if (other := _first_mismatch([message.get(name) for message in messages])) is not None:
            return (
                f"{name} must be the same on every rank of the group over which the vocabulary is sharded; those of "
                f"rank {other} differ from those of rank 0."
            )
    return _problem(messages, ("count",))


def _first_mismatch(found: Sequence[Any]) -> int | None:
    """The first rank whose value differs from that of rank 0, or None."""
    return next((rank for rank, value in enumerate(found) if value != found[0]), None)


def _on_rank(rank: int, text: str, ranks: int) -> str:
    """The text with the rank, unless it names one already or there is only one rank."""
    return text if ranks == 1 or text.startswith("On rank ") else f"On rank {rank} of the group: {text}"
