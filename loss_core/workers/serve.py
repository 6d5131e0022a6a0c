"""Main program of a process of `loss_core.workers.pool`: constructs an object, then calls its methods by request.

Usage: python -m loss_core.workers.serve FD
"""

from __future__ import annotations

import importlib
import os
import pickle
import queue
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from loss_core.dispatch.protocol import BackendUnavailable
from loss_core.workers.pool import RemoteError


def main() -> None:
    """Serve until the pipe closes. The first request constructs the object, every later one calls a method of it."""
    pipe = Connection(int(sys.argv[1]))
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, requests), daemon=True).start()
    served: Any = None
    while True:
        message = requests.get()
        answer: Any = None
        try:
            name, arguments = pickle.loads(message)
            if served is None:
                served = _construct(name, arguments)
            else:
                answer = getattr(served, name)(**arguments)
        except Exception as error:  # sent to the caller, which handles it
            unavailable = isinstance(error, BackendUnavailable)
            answer = RemoteError(str(error) if unavailable else f"{type(error).__name__}: {error}", unavailable)
        pipe.send(answer)


def _construct(factory: str, arguments: Mapping[str, Any]) -> Any:
    module, _, name = factory.partition(":")
    return getattr(importlib.import_module(module), name)(**arguments)


def _listen(pipe: Connection, requests: queue.SimpleQueue[bytes]) -> None:
    """Queue requests; exit when the pipe closes, even while the main thread waits in a collective."""
    while True:
        try:
            requests.put(pipe.recv_bytes())
        except (EOFError, OSError):
            # os._exit: threads of a framework can abort during the shutdown of the interpreter.
            sys.stderr.flush()
            os._exit(0)


if __name__ == "__main__":
    main()
