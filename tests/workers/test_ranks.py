"""`check --tp`: ranks start, evaluate, are compared and stop; a failure of one is reported and ends all."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from helpers.command import command, environment
from helpers.processes import all_gone, wait_for_workers
from loss_core import BackendUnavailable, unregister_loss
from loss_core.check import check
from loss_core.losses.cases.drawing import named_cases
from loss_core.workers.pool import RequestFailed, WorkerFailed
from loss_core.workers.ranks import Ranks, Request

# A user-defined loss that is wrong on rank 1 from its third call on.
FAULTY = """
import os, signal, time
from dataclasses import dataclass
import torch.distributed as dist
from loss_core import TEParallelCEConfig, register_loss

@dataclass
class FaultyConfig(TEParallelCEConfig):
    pass

calls = []

def build(config):
    right = TEParallelCEConfig(config.ignore_index, config.reduction, config.tp_group).build(backend="torch:eager")

    def loss(**arguments):
        calls.append(1)
        value = right(**arguments)
        if dist.get_rank() == 1 and len(calls) >= {call}:
            {fault}
        return value

    return loss

register_loss("Faulty", FaultyConfig, {{"torch:eager": build}})
"""


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """Factory of the module that registers the loss with a fault."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(fault, call=3):
        (tmp_path / "faulty_loss.py").write_text(FAULTY.format(fault=fault, call=call))
        importlib.import_module("faulty_loss")
        return "faulty_loss"

    yield make
    if "faulty_loss" in sys.modules:
        unregister_loss("Faulty")
        del sys.modules["faulty_loss"]


def requests(loss):
    for case in named_cases(loss, shape=(24, 504), only=("basic", "mean", "none", "ragged", "count")):
        yield Request(case.config, "torch:eager", case.arrays, "float64", case.upstream, case.grad_of, (252, 252))


def alive(ranks):
    return [worker.pid for worker in ranks.pool.workers if worker.alive]


def test_a_wrong_rank_fails_its_rows_and_so_does_one_that_is_not_bitwise_equal(faulty):
    # In float32 by more than rounding; in float64 by less.
    fault = faulty("value = value * (1.001 if value.element_size() == 4 else 1 + 4e-16)", call=1)
    report = check("Faulty", ["torch:eager"], dtypes=["float32", "float64"], tp=[2], only=["mean"], modules=[fault])
    assert {finding.flag for finding in report.failures} == {"torch:eager tp=2"}
    assert {finding.case for finding in report.failures} <= {"mean/uneven", "mean/empty", "mean/even"}
    assert all("--tp 2" in finding.reproduce for finding in report.failures)
    wrong = [finding for finding in report.failures if "bitwise" not in finding.problem]
    assert {finding.dtype for finding in wrong} == {"float32"}
    differ = [finding for finding in report.failures if "bitwise" in finding.problem and finding.tensor == "loss"]
    assert {finding.dtype for finding in differ} == {"float32", "float64"}


def test_an_error_of_the_call_is_reported_and_the_ranks_stay_usable_until_one_dies(faulty):
    fault = faulty("os.kill(os.getpid(), signal.SIGKILL)")
    with Ranks("torch", 2, modules=[fault]) as ranks:
        good = next(requests("TEParallelCrossEntropy"))
        bad = replace(good, arrays={**good.arrays, "labels": good.arrays["labels"].astype(np.float64)})
        with pytest.raises(RequestFailed, match="TypeError: labels must be integers"):
            ranks.evaluate(bad)
        with pytest.raises(BackendUnavailable):
            ranks.evaluate(replace(good, flag="torch:te"))
        assert np.isfinite(ranks.evaluate(good).loss).all()
        assert len(alive(ranks)) == 2
        with pytest.raises(WorkerFailed, match=r"rank [01] of 2 on torch: .*the others have been ended"):
            list(map(ranks.evaluate, requests("Faulty")))
        assert not alive(ranks)


def test_a_rank_that_hangs_times_out(faulty):
    fault = faulty("time.sleep(300)")
    with Ranks("torch", 2, modules=[fault], call_limit=5) as ranks:
        with pytest.raises(WorkerFailed, match=r"rank 1 of 2 on torch: no answer within 5 s"):
            list(map(ranks.evaluate, requests("Faulty")))
        assert not alive(ranks)


def test_a_module_that_fails_to_import_is_reported(tmp_path, monkeypatch):
    (tmp_path / "divides_by_zero.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(WorkerFailed, match=r"the ranks on torch could not start: ZeroDivisionError"):
        Ranks("torch", 2, modules=["divides_by_zero"])


def checking():
    """The command in the middle of a long check over two ranks, and its ranks."""
    options = ("--config", "KDLoss", "--backend", "torch:eager", "--tp", "2", "--cases", "400")
    process = subprocess.Popen(
        command("check", *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    ranks = wait_for_workers(process.pid, 2)
    time.sleep(3)
    return process, ranks


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_no_process_is_left_when_the_command_is_stopped():
    # test_pool.py has the test of a command that is killed.
    process, ranks = checking()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert all_gone(ranks)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_the_command_reports_which_rank_was_killed():
    process, ranks = checking()
    os.kill(ranks[1], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "of 2 on torch: " in err
    assert "Traceback" not in out + err
    assert all_gone(ranks)
