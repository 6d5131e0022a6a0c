"""One process of `loss_core.ranks`: takes calls from a pipe, answers with what its rank, or its ranks, computed.

Usage: python -m loss_core.rank_worker FD BACKEND RANK RANKS FOLDER [MODULE...]
"""

from __future__ import annotations

import importlib
import os
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from loss_core.backend import load_backend
from loss_core.ranks import Refusal


def main() -> None:
    """Serve calls until the pipe ends."""
    # Ctrl-C on a terminal reaches every process; the one that started this one decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fd, name, rank, ranks, folder, *modules = sys.argv[1:]
    pipe = Connection(int(fd))
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, requests), daemon=True).start()
    for module in modules:
        importlib.import_module(module)
    backend = load_backend(name)
    backend.join_ranks(int(rank), int(ranks), Path(folder))
    pipe.send("ready")
    while True:
        request = requests.get()
        try:
            answer: Any = backend.evaluate_shards(request)
        except Exception as error:  # told to the caller, who decides what it means
            answer = Refusal(type(error).__name__, str(error))
        pipe.send(answer)


def _listen(pipe: Connection, requests: queue.SimpleQueue[Any]) -> None:
    """Pass requests on; end the process when the other side is gone, also in the middle of a collective."""
    while True:
        try:
            requests.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(0)


if __name__ == "__main__":
    main()
