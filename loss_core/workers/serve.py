"""One process of `loss_core.workers.pool`: makes an object, then calls its methods as the pipe asks.

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
from loss_core.workers.pool import Refusal


def main() -> None:
    """Serve until the pipe ends. The first request makes the object, every other one names a method of it."""
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
                served = _made(name, arguments)
            else:
                answer = getattr(served, name)(**arguments)
        except Exception as error:  # told to the caller, who decides what it means
            unavailable = isinstance(error, BackendUnavailable)
            answer = Refusal(str(error) if unavailable else f"{type(error).__name__}: {error}", unavailable)
        pipe.send(answer)


def _made(factory: str, arguments: Mapping[str, Any]) -> Any:
    module, _, name = factory.partition(":")
    return getattr(importlib.import_module(module), name)(**arguments)


def _listen(pipe: Connection, requests: queue.SimpleQueue[bytes]) -> None:
    """Pass requests on; end the process when the other side is gone, also in the middle of a collective."""
    while True:
        try:
            requests.put(pipe.recv_bytes())
        except (EOFError, OSError):
            # Frameworks keep threads that can abort while the interpreter is taken down.
            sys.stderr.flush()
            os._exit(0)


if __name__ == "__main__":
    main()
