"""Worker processes: start, calls, stop; a failure of one is reported and ends all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from helpers.processes import all_gone, wait_for_workers
from loss_core.dispatch.protocol import BackendUnavailable
from loss_core.workers.pool import Pool, RequestFailed, Start, WorkerFailed

SERVED = """
import os, sys, threading, time
from loss_core.dispatch.protocol import BackendUnavailable

class Served:
    def __init__(self, rank, hold_pipe=False):
        if rank == "unavailable":
            raise BackendUnavailable("not on this machine")
        self.rank = rank

    def echo(self, text):
        print("loud", flush=True)
        os.system("echo louder")
        return self.rank, text, os.environ.get("ADDED")

    def fail(self, ranks):
        if self.rank in ranks:
            raise ValueError(f"{self.rank} says no")

    def refuse(self):
        raise BackendUnavailable("not these inputs")

    def die(self, ranks, code):
        if self.rank in ranks:
            print("the last words", file=sys.stderr, flush=True)
            os._exit(code) if code >= 0 else os.kill(os.getpid(), -code)
        time.sleep(300)

    def hang(self, ranks):
        time.sleep(300 if self.rank in ranks else 0)

    def unsendable(self):
        return threading.Lock()
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Factory of a pool whose processes serve the class above."""
    (tmp_path / "served.py").write_text(SERVED)
    monkeypatch.syspath_prepend(str(tmp_path))
    pools = []

    def make(*ranks):
        starts = [Start(f"rank {rank}", "served:Served", {"rank": rank}, {"ADDED": str(rank)}) for rank in ranks]
        pools.append(Pool(starts))
        return pools[-1]

    yield make
    for pool in pools:
        pool.stop()
        assert not any(worker.alive for worker in pool.workers)


def test_every_process_answers_in_order_whatever_it_prints(start):
    pool = start(0, 1, 2)
    pool.wait_started()
    assert pool.call(60, "echo", text="a") == [(0, "a", "0"), (1, "a", "1"), (2, "a", "2")]


def test_an_error_in_every_process_is_raised_here_and_the_pool_stays_usable(start):
    pool = start(0, 1)
    pool.wait_started()
    with pytest.raises(RequestFailed, match="ValueError: 0 says no"):
        pool.call(60, "fail", ranks=[0, 1])
    with pytest.raises(BackendUnavailable, match=r"^not these inputs$"):
        pool.call(60, "refuse")
    with pytest.raises(RequestFailed, match=r"AttributeError: .* has no attribute 'dance'"):
        pool.call(60, "dance")
    assert pool.call(60, "fail", ranks=[]) == [None, None]


@pytest.mark.parametrize(
    ("limit", "method", "arguments", "message"),
    [
        (60, "fail", {"ranks": [1]}, "rank 1: ValueError: 1 says no"),
        (60, "die", {"ranks": [1], "code": -signal.SIGKILL},
         r"rank 1: its process was ended by SIGKILL \(out of memory\?\): the last words"),
        (60, "die", {"ranks": [1], "code": 3}, "rank 1: its process ended with exit code 3: the last words"),
        (1, "hang", {"ranks": [0]}, "rank 0: no answer within 1 s"),
    ],
    ids=["refuses", "killed", "exits", "hangs"],
)  # fmt: skip
def test_a_failure_of_one_process_is_reported_and_ends_all(start, limit, method, arguments, message):
    pool = start(0, 1)
    pool.wait_started()
    with pytest.raises(WorkerFailed, match=f"^{message}; the others have been ended$"):
        pool.call(limit, method, **arguments)
    assert not any(worker.alive for worker in pool.workers)


def test_an_answer_that_can_not_be_sent_is_reported(start):
    pool = start(0)
    pool.wait_started()
    with pytest.raises(WorkerFailed, match=r"ended with exit code 1: TypeError: cannot pickle '_thread.lock' object"):
        pool.call(60, "unsendable")


def test_a_start_that_fails_is_reported_and_ends_the_pool(start):
    pool = start("unavailable", "unavailable")
    with pytest.raises(BackendUnavailable, match=r"^not on this machine$"):
        pool.wait_started()
    assert not any(worker.alive for worker in pool.workers)
    with Pool([Start("", "no_such_module:Served", {})]) as absent, pytest.raises(RequestFailed, match="no_such_module"):
        absent.wait_started()


PARENT = """
import signal, sys
from loss_core.workers.pool import Pool, Start
signal.signal(signal.SIGINT, signal.default_int_handler)
with Pool([Start("", "served:Served", {"rank": rank}) for rank in range(2)]) as pool:
    pool.wait_started()
    print("started", flush=True)
    pool.call(300, "hang", ranks=[0, 1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_parent_even_during_a_call(tmp_path, number):
    (tmp_path / "served.py").write_text(SERVED)
    paths = os.pathsep.join([str(tmp_path), *(path for path in sys.path if path)])
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              env={**os.environ, "PYTHONPATH": paths}, start_new_session=True)  # fmt: skip
    try:
        workers = wait_for_workers(parent.pid, 2)
        assert parent.stdout.readline() == b"started\n"
        time.sleep(0.5)
        parent.send_signal(number)
        parent.wait(timeout=30)
        assert all_gone(workers)
    finally:
        parent.kill()
        parent.communicate()
