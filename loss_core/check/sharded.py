"""`check --tp`: the same calls with the vocabulary sharded over ranks, in every split that a backend supports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from threading import Lock
from typing import Any

from numpy.typing import NDArray

from loss_core.check.calls import Call
from loss_core.dispatch.flags import parse_flag
from loss_core.dispatch.protocol import Evaluation
from loss_core.loss_config import LossConfig
from loss_core.workers.ranks import Ranks, Request, without_runtime_fields
from loss_core.workers.vocab_split import splits, vocab_size

# Runs a call: (call, flag, arrays, upstream) -> results; None where the flag's backend does not support the split.
Evaluate = Callable[[Call, str, Mapping[str, NDArray[Any]], NDArray[Any] | None], Evaluation | None]

# The named cases' vocabulary sizes have no even split, so for even shards they are drawn again at this shape.
EVEN_SHAPE = (24, 504, 24)


def check_ranks(tp: Sequence[int], against: str | None, device: str | None) -> None:
    """Raise ValueError for options that can't be combined with `tp`, or invalid rank counts."""
    for ranks in tp:
        if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
            raise ValueError(f"tp must be whole numbers >= 1, got {ranks!r}.")
    if tp and against is not None:
        raise ValueError(f"tp compares with the oracle on the unsharded problem; leave out against={against!r}.")
    if tp and device not in (None, "cpu"):
        raise ValueError(f"tp runs its ranks on the CPU; leave out device={device!r}.")


def sharded_calls(calls: Sequence[Call], even_calls: Sequence[Call], tp: Sequence[int]) -> list[Call]:
    """One call for each call, rank count and vocabulary split.

    Args:
        even_calls: calls that are run with even shards only.
    """
    sharded = []
    for ranks in dict.fromkeys(tp):
        for call, every_split in [(call, True) for call in calls] + [(call, False) for call in even_calls]:
            for split, sizes in splits(vocab_size(call.case.config, call.case.arrays), ranks).items():
                if every_split or split == "even":
                    sharded.append(replace(call, ranks=ranks, split=split, sizes=sizes))
    return sharded


def can_be_sharded(config: LossConfig) -> bool:
    """Whether the config has a process group over which the vocabulary may be sharded."""
    return any(f.name == "tp_group" for f in fields(config))


@contextmanager
def over_ranks(backends: Sequence[str], ranks: int, modules: Sequence[str]) -> Iterator[Evaluate]:
    """Start the ranks of each backend, and end them on exit; yields a function that runs a call on them."""
    with ExitStack() as stack:
        running = {name: stack.enter_context(Ranks(name, ranks, modules=modules)) for name in backends}
        # Flags of one backend are evaluated by several threads, but its ranks serve one call at a time.
        locks = {name: Lock() for name in backends}

        def evaluate(
            call: Call, flag: str, arrays: Mapping[str, NDArray[Any]], upstream: NDArray[Any] | None
        ) -> Evaluation | None:
            backend = parse_flag(flag).backend
            of_backend = running[backend]
            if call.split not in of_backend.splits:
                return None
            config = without_runtime_fields(call.case.config)
            request = Request(config, flag, arrays, call.dtype, upstream, call.case.grad_of, call.sizes)
            with locks[backend]:
                return of_backend.evaluate(request)

        yield evaluate
