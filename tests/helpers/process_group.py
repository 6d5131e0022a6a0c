"""Tests that run in the processes of a gloo group: the body of a test is called on every rank.

Run as a script, this is one such process: process_group.py RANK RANKS PORT FLAG. It then reads lines from its input,
each a JSON list of the file and name of a test and its arguments, calls the body, and answers each with a line.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers import interpreter

ROOT = Path(__file__).parents[2]
# Seconds: for a body; for the other ranks once one has failed; of the process group.
_BODY, _OTHERS, _GROUP = 400, 10, 60
_ANSWER = "process_group answers: "


@dataclasses.dataclass(frozen=True)
class World:
    """The argument of a body: its rank, the number of ranks, the flag to build losses with."""

    rank: int
    ranks: int
    flag: str = "torch:eager"

    @property
    def group(self):
        return dist.group.WORLD


def over_processes(*ranks, flag="torch:eager"):
    """Decorator: run a test body, whose first argument is a `World`, in each process of a group, per number of ranks.

    Further arguments of the body come from pytest, such as parameters; they must be JSON values.
    """

    def decorate(body):
        def test(team, **arguments):
            team.run(body, arguments)

        test.__name__, test.__doc__, test.__module__ = body.__name__, body.__doc__, body.__module__
        given = list(inspect.signature(body).parameters)[1:]
        keyword = inspect.Parameter.KEYWORD_ONLY
        test.__signature__ = inspect.Signature([inspect.Parameter(name, keyword) for name in ("team", *given)])
        test.body = body
        settings = [
            pytest.param(
                (number, flag), id=f"{number} ranks", marks=[pytest.mark.xdist_group(f"{flag} {number}"), *later]
            )
            for number in ranks
            # Three ranks rarely find more than two and four, and each is a process that imports torch.
            for later in [[pytest.mark.slow] if number == 3 and len(ranks) > 1 else []]
        ]
        # Indirect: pytest then runs all tests of one team together, and starts its processes once.
        return pytest.mark.parametrize("team", settings, indirect=True)(test)

    return decorate


class Team:
    """The processes of a group, started when first needed and again after a body failed."""

    def __init__(self, ranks, flag):
        self.ranks, self.flag, self._processes = ranks, flag, []

    def run(self, body, arguments):
        """Call the body of a test on every rank; AssertionError with the traceback of each rank where it failed."""
        if not self._processes:
            self._start()
        for process in self._processes:
            process.stdin.write(json.dumps([body.__code__.co_filename, body.__name__, arguments]) + "\n")
            process.stdin.flush()
        failed, answers, end = {}, 0, time.monotonic() + _BODY
        while answers < self.ranks:
            try:
                rank, text = self._answers.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                failed.setdefault("others", "did not answer in time")
                break
            answers += 1
            if text:
                failed[rank] = text
                end = min(end, time.monotonic() + _OTHERS)
        if failed:
            self.stop()
            pytest.fail("\n".join(f"rank {rank}: {text}" for rank, text in failed.items()), pytrace=False)

    def stop(self):
        for process in self._processes:
            process.kill()
            process.wait()
            process.stdin.close()
        for thread in self._threads if self._processes else ():
            thread.join()
        self._processes = []

    def _start(self):
        self._store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        paths = os.pathsep.join([str(ROOT), str(ROOT / "backends"), str(ROOT / "tests")])
        # Idle threads must sleep: there are more processes than cores.
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_WAIT_POLICY": "PASSIVE"}
        if self.flag == interpreter.FLAG:
            environment["TRITON_INTERPRET"] = "1"
        self._answers = queue.Queue()
        command = [sys.executable, __file__]
        self._processes = [
            subprocess.Popen(
                [*command, str(rank), str(self.ranks), str(self._store.port), self.flag], env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for rank in range(self.ranks)
        ]  # fmt: skip
        self._threads = [
            threading.Thread(target=self._listen, args=(rank, process), daemon=True)
            for rank, process in enumerate(self._processes)
        ]
        for thread in self._threads:
            thread.start()

    def _listen(self, rank, process):
        output = []
        with process.stdout:
            for line in process.stdout:
                if line.startswith(_ANSWER):
                    self._answers.put((rank, json.loads(line.removeprefix(_ANSWER))))
                    output = []
                else:
                    output.append(line)
        self._answers.put((rank, f"the process ended:\n{''.join(output)[-4000:]}"))


def _body(file, name):
    # Loaded by path: test files are not importable by name.
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = sys.modules.get(spec.name)
    if module is None:
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return getattr(module, name).body


def _serve(rank, ranks, port, flag):
    torch.set_num_threads(1)
    if flag == interpreter.FLAG:
        interpreter.patch_once()
    timeout = timedelta(seconds=_GROUP)
    store = dist.TCPStore("localhost", port, is_master=False, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timeout)
    for line in sys.stdin:
        file, name, arguments = json.loads(line)
        try:
            _body(file, name)(World(rank, ranks, flag), **arguments)
            text = ""
        except BaseException:
            text = traceback.format_exc()
        print(f"\n{_ANSWER}{json.dumps(text)}", flush=True)


if __name__ == "__main__":
    # The team ends this process: a thread of gloo may hold the last reference to a tensor, and finalising the
    # interpreter would abort it then (torch 2.13).
    _serve(*map(int, sys.argv[1:4]), sys.argv[4])
