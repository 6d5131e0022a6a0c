"""Which kernels ran: recorded by the kernel sets themselves, read by the `evaluate` function of a backend.

A kernel set calls `record("torch:eager")` in each of its methods; `evaluate` wraps the call in `observing()` and
returns the recorded flags. Outside of `observing()`, `record` does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_OBSERVER: ContextVar[dict[str, None] | None] = ContextVar("loss_core.observed", default=None)


def record(flag: str) -> None:
    """Record that a kernel of this flag, such as "torch:eager", is running or being traced."""
    seen = _OBSERVER.get()
    if seen is not None:
        seen[flag] = None


@contextmanager
def observing() -> Iterator[dict[str, None]]:
    """Collect the flags of the kernels that run in this thread inside the context, each once, in order.

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
    """The value of `Evaluation.kernel`: the flags in the order in which they ran; "" if none ran."""
    return " and ".join(seen)
