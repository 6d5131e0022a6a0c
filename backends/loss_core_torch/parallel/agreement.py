"""What the ranks of a group agree on before the first collective of a call.

A collective that some ranks never reach, or reach with other sizes, hangs or returns garbage. So each rank first puts
what it is about to do into the group's store. The first rank of the group reads all messages and answers: with an
error, which every rank raises, or with the sizes of the shards. The messages travel between the hosts, without a
collective and without a device sync, so work that is already queued on an accelerator goes on meanwhile.

They are exchanged at every call, on accelerators too. A rank that goes on from memory decides that by what it alone
knows: its own arguments. Two heads with shards of (3, 3, 3, 1) and (3, 3, 3, 2) classes look the same from ranks 0 to
2, and heads of (2, 3, 3) and (3, 3, 2) from rank 1, whose first class differs. The rank that sees something new would
wait for ranks that send nothing, or they would compute with the shards of another head. Which calls are new to some
rank is itself news, so there is nothing that all ranks could look up instead of asking. A check that travels with the
row terms would come too late: the label's logit is already among them, and a different number of tokens breaks that
collective itself.
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

# Seconds between two looks into the store: an eighth of the time already waited, within these bounds.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.0001, 0.02

# Number of exchanges that all ranks of a group came to, by group: every rank counts the same calls.
_COUNTS: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Shards:
    """Where this rank's part of the vocabulary lies.

    Attributes:
        group: process group over which it is sharded.
        start: first class of this rank.
        total: classes of all ranks.
        even: every rank holds as many, in the order of the group.
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
    alike: Mapping[str, Any] | None = None,
    read_values: bool | None = None,
) -> tuple[Tokens, Shards | None]:
    """Check the arguments on every rank, and learn where this rank's part of the vocabulary begins.

    Where no other rank exists (`compat.has_peers`) nothing is exchanged, and every rank is taken to hold as many
    classes as this one, unless a DTensor tells.

    Args:
        what: the loss and its settings, which must be the same everywhere.
        like: this rank's logits or weight, not checked yet; vocab_dim: its dimension over the vocabulary.
        ignore_index: the label that is no class but accepted; None: labels need be no classes.
        check: looks at this rank's arguments; may raise.
        alike: more that must be the same on the ranks over which the vocabulary is sharded: by name, as JSON holds it.
        read_values: whether these ranks compare the values of labels, masks and weights, too. None: where reading
            them costs no device sync. Elsewhere a label that is no class becomes NaN.
    Raises:
        ValueError: on every rank, where the arguments of any rank can't be used, or do not fit those of another, or
            where a rank does not come within the timeout of the process group.
        Exception: what `check` raised, on the rank where it did.
    """
    peers = [group for group in (*ranks.tokens, *ranks.others) if compat.has_peers(group)]
    if not peers and (ranks.vocab is None or not compat.has_peers(ranks.vocab)):
        return check(), _shards_without_peers(ranks, like, vocab_dim)
    is_tensor = isinstance(like, Tensor) and like.dim() > 0
    vocab, dtype = (like.shape[vocab_dim], str(like.dtype)) if is_tensor else (0, "")
    if read_values is None:
        read_values = not is_tensor or tracing.may_read(like)
    tokens, own, problem = None, None, None
    try:
        tokens = check()
    # Whatever it is, the others must hear of it before it is raised.
    except Exception as error:
        own, problem = error, f"{type(error).__name__}: {error}"
    message: Message = {"what": what, "vocab": vocab, "place": ranks.place, "dtype": dtype, "problem": problem}
    message |= alike or {}
    if tokens is not None:
        message |= {"shape": list(tokens.shape)} | (_values(tokens) if read_values else {})

    def answer(messages: list[Message]) -> Message:
        return _shards_or_problem(messages, ("what", "shape", "dtype", *(alike or {})), ignore_index)

    answered = answer([message]) if ranks.vocab is None else exchange(ranks.vocab, message, answer)
    problem = answered["problem"]
    for group in peers:
        problem = exchange(group, {"what": what, "problem": problem}, _problem)
    if own is not None:
        raise own
    if problem is not None:
        raise ValueError(problem)
    assert tokens is not None
    return tokens, _shards(ranks, answered["sizes"], answered["in_order"])


def exchange(group: Any, message: Message, answer: Callable[[list[Message]], Any]) -> Any:
    """The answer to the messages of all ranks of a group, the same on every rank. JSON goes in and comes out.

    Args:
        answer: of the messages in rank order; called on the group's first rank.
    Raises:
        ValueError: some ranks did not come within the store's timeout (that of init_process_group). The exchange then
            does not count, so that ranks that did not come to it are in step at the next one.
    """
    store: Any = PrefixStore("loss_core", compat.group_store(group))
    rank, count = dist.get_rank(group), _COUNTS.get(group, 0)
    keys = [f"{count}/{other}" for other in range(dist.get_world_size(group))]
    own, answered = keys[rank], f"{count}/answer"
    store.set(own, json.dumps(message))
    try:
        if rank == 0:
            _wait(store, keys, keys)
            found = store.multi_get(keys) if store.has_extended_api() else [store.get(key) for key in keys]
            text = json.dumps(answer([json.loads(text) for text in found]))
            store.set(answered, text)
            # Who sent a message now has read the last answer.
            store.delete_key(f"{count - 1}/answer")
        else:
            _wait(store, [answered], keys)
            text = store.get(answered)
    finally:
        store.delete_key(own)
    _COUNTS[group] = count + 1
    return json.loads(text)


def _wait(store: Any, wanted: list[str], keys: list[str]) -> None:
    """Until all wanted keys are there. Looks again and again: a blocking wait would hold the store from other threads.

    Args:
        keys: those of the ranks, in rank order, to tell who is missing.
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
    """From the sizes of the parts, in the order of the parts."""
    if ranks.vocab is None:
        return None
    even = in_order and all(size == sizes[0] for size in sizes)
    return Shards(ranks.vocab, sum(sizes[: ranks.place]), sum(sizes), even)


def _shards_without_peers(ranks: Ranks, like: Tensor, vocab_dim: int) -> Shards | None:
    """As DTensor cuts the classes where one tells how many there are, else in equal parts."""
    if ranks.vocab is None:
        return None
    number, vocab = dist.get_world_size(ranks.vocab), like.shape[vocab_dim]
    if ranks.classes is None:
        return Shards(ranks.vocab, ranks.place * vocab, number * vocab, True)
    chunk = -(-ranks.classes // number)
    return Shards(ranks.vocab, ranks.place * chunk, ranks.classes, ranks.classes % number == 0)


def _values(tokens: Tokens) -> Message:
    """What the ranks must have in common beside shapes: a checksum of each input, the ends of the labels."""
    message: Message = {"count": None if tokens.num_tokens is None else float(tokens.num_tokens)}
    assert tokens.keep_T is not None
    labels_T = torch.where(tokens.keep_T, tokens.labels_T, 0)
    of_tokens = {"labels": labels_T, "labels and mask": tokens.keep_T, "loss_weights": tokens.weights_T}
    if tokens.teacher is not None:
        kept = [x.detach().masked_fill(~tokens.keep_T[:, None], 0) for x in tokens.teacher]
        of_tokens |= {"teacher_indices": kept[0], "teacher_logprobs": kept[1]}
    for name, value in of_tokens.items():
        if value is not None:
            message[name] = zlib.crc32(value.detach().contiguous().view(torch.uint8).numpy().data)
    if labels_T.numel():
        for name, at in (("low", labels_T.argmin()), ("high", labels_T.argmax())):
            message[name] = [list(_position(int(at), tokens.shape)), int(labels_T[at])]
    return message


def _position(index: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(index), shape)) if shape else ()


def _shards_or_problem(messages: Sequence[Message], alike: Sequence[str], ignore_index: int | None) -> Message:
    """The answer to the ranks over which the vocabulary is sharded."""
    in_order = sorted(messages, key=lambda message: message["place"])
    return {
        "problem": _problem(messages, alike) or _problem_of_values(messages, ignore_index),
        "sizes": [message["vocab"] for message in in_order],
        "in_order": in_order == messages,
    }


def _problem(messages: Sequence[Message], alike: Sequence[str] = ("what",)) -> str | None:
    """The first rank's problem, or the first of the keys `alike` on which the ranks differ; None if all is well."""
    for rank, message in enumerate(messages):
        if message["problem"] is not None:
            return _on_rank(rank, message["problem"], len(messages))
    for key in alike:
        found = [message.get(key) for message in messages]
        if (other := _first_other(found)) is not None:
            return (
                f"{key} must be the same on every rank of the group: {found[0]} on rank 0, {found[other]} on rank "
                f"{other}."
            )
    return None


def _problem_of_values(messages: Sequence[Message], ignore_index: int | None) -> str | None:
    """As `_problem`, for what `_values` tells; no message need hold it."""
    total = sum(message["vocab"] for message in messages)
    for rank, message in enumerate(messages):
        for position, label in (message[end] for end in ("low", "high") if end in message):
            if ignore_index is not None and not 0 <= label < total:
                text = f"labels{position} is {label}, which is neither a class in [0, {total}) nor ignore_index "
                return _on_rank(rank, f"{text}({ignore_index}).", len(messages))
    for name in ("labels", "labels and mask", "loss_weights", "teacher_indices", "teacher_logprobs"):
        if (other := _first_other([message.get(name) for message in messages])) is not None:
            return (
                f"{name} must be the same on every rank of the group over which the vocabulary is sharded; those of "
                f"rank {other} differ from those of rank 0."
            )
    return _problem(messages, ("count",))


def _first_other(found: Sequence[Any]) -> int | None:
    """The first rank whose value is not that of rank 0."""
    return next((rank for rank, value in enumerate(found) if value != found[0]), None)


def _on_rank(rank: int, text: str, ranks: int) -> str:
    """Says where, unless an inner group has said so, or this rank is alone."""
    return text if ranks == 1 or text.startswith("On rank ") else f"On rank {rank} of the group: {text}"
