"""Which kernels really ran: told by the kernel sets where they run, read by whoever evaluates a call.

A kernel set calls `record("torch:eager")` in each of its methods; `evaluate` of a backend wraps the call in
`observing()` and reports what it found. Nothing is kept where nobody observes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_OBSERVER: ContextVar[dict[str, None] | None] = ContextVar("loss_core.observed", default=None)


def record(flag: str) -> None:
    """Note that a kernel of this flag, such as "torch:eager", runs now, or is traced to run."""
    seen = _OBSERVER.get()
    if seen is not None:
        seen[flag] = None


@contextmanager
def observing() -> Iterator[dict[str, None]]:
    """Collect the flags of the kernels that run in this thread while the context lasts, each once, in order.

    >>> with observing() as seen:
    ...     record("torch:eager")
    ...     record("torch:eager")
    >>> names(seen)
    'torch:eager'
    """
    seen: dict[str, None] = {}
    token = _OBSERVER.set(seen)
    try:
        yield seen
    finally:
        _OBSERVER.reset(token)


def names(seen: dict[str, None]) -> str:
    """What `Evaluation.kernel` says: the flags in the order in which they ran; "" where none of ours ran."""
    return " and ".join(seen)
