"""`check --tp`: ranks are started, asked, compared and ended; what goes wrong with one is told, and ends all."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loss_core import BackendUnavailable, TEParallelCEConfig
from loss_core.backend import Evaluation
from loss_core.cases import named_cases
from loss_core.check import check
from loss_core.ranks import RankError, Ranks, RanksFailed, Request
from loss_core.vocab_split import VOCAB_AXIS, shard, splits, together

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("vocab", [1, 2, 7, 504, 507])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_split_shares_the_whole_vocabulary(vocab, ranks):
    found = splits(vocab, ranks)
    assert all(len(sizes) == ranks and sum(sizes) == vocab and min(sizes) >= 0 for sizes in found.values())
    assert ("even" in found) == (ranks > 1 and vocab % ranks == 0)
    if ranks > 1:
        assert found["empty"][-1] == 0
        # Offsets are no multiples of a rank's own size, as code for equal shards takes them to be.
        starts = np.cumsum((0, *found["uneven"][:-1]))
        assert vocab < 7 or any(s != r * n for r, (s, n) in enumerate(zip(starts, found["uneven"], strict=True)))


@pytest.mark.parametrize("name", VOCAB_AXIS)
def test_shards_join_to_the_whole(name):
    whole = np.arange(5.0 * 7).reshape((7, 5) if VOCAB_AXIS[name] == 0 else (5, 7))
    of_ranks = [
        Evaluation(np.zeros(()), {name: shard(name, whole, (4, 0, 3), rank), "hidden_states": np.ones(2)}, {}, (), "")
        for rank in range(3)
    ]
    found = together(of_ranks)
    np.testing.assert_array_equal(found.grads[name], whole)
    assert found.ranks_differ == ()


def test_a_last_bit_between_ranks_is_seen():
    one = Evaluation(np.ones(()), {"hidden_states": np.zeros(2)}, {}, (), "")
    other = replace(one, loss=np.nextafter(np.ones(()), 2), grads={"hidden_states": np.array([0.0, -0.0])})
    assert together([one, other]).ranks_differ == ("loss", "hidden_states")
    nan = replace(one, loss=np.full((), np.nan))
    assert together([nan, nan]).ranks_differ == ()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Makes a module that every process of the ranks imports: the way to put a fault into one of them."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(body):
        name = f"fault_{abs(hash(body))}"
        (tmp_path / f"{name}.py").write_text(body)
        return name

    return make


RANK_1_ONLY = """
import os, signal, sys, time
from loss_core_torch import eager
real = eager.cross_entropy_stats
calls = []
def faulty(*args):
    calls.append(1)
    if sys.argv[3] == "1" and len(calls) == 3:
        {fault}
    return real(*args)
eager.cross_entropy_stats = faulty
"""


def _requests():
    for case in named_cases(
        "TEParallelCrossEntropy", shape=(24, 504), only=("basic", "mean", "none", "ragged", "count")
    ):
        yield Request(case.config, "torch:eager", case.arrays, "float64", case.upstream, case.grad_of, (252, 252))


def _run_all(ranks):
    return [ranks.evaluate(request) for request in _requests()]


def _alive(ranks):
    return [process.pid for process in ranks._processes if process.poll() is None]


def test_a_wrong_rank_turns_its_rows_red(module):
    fault = module(RANK_1_ONLY.format(fault="return tuple(x * 1.001 for x in real(*args))").replace("== 3", ">= 3"))
    report = check(
        "TEParallelCrossEntropy", ["torch:eager"], dtypes=["float32"], tp=[2], only=["mean"], modules=[fault]
    )
    assert not report.passed
    assert {finding.flag for finding in report.failures} == {"torch:eager tp=2"}
    assert {finding.case for finding in report.failures} <= {"mean/uneven", "mean/empty", "mean/even"}
    assert all("--tp 2" in finding.reproduce for finding in report.failures)


def test_ranks_that_are_not_bitwise_equal_are_a_failure(module):
    fault = module("""
import sys
from loss_core_torch import evaluate
real = evaluate._to_numpy
evaluate._to_numpy = lambda x: real(x) * (1 + 1e-16 * 4) if sys.argv[3] == "1" and x.dim() == 0 else real(x)
""")
    report = check(
        "TEParallelCrossEntropy", ["torch:eager"], dtypes=["float64"], tp=[2], only=["mean"], modules=[fault]
    )
    assert report.failures
    assert all("bitwise" in finding.problem and finding.tensor == "loss" for finding in report.failures)


def test_a_rank_that_dies_ends_the_others(module):
    fault = module(RANK_1_ONLY.format(fault="os.kill(os.getpid(), signal.SIGKILL)"))
    ranks = Ranks("torch", 2, modules=[fault])
    with pytest.raises(RanksFailed, match=r"rank [01] of 2 on torch .*the others have been ended"):
        _run_all(ranks)
    assert not _alive(ranks)


def test_a_rank_that_hangs_is_given_up(module):
    fault = module(RANK_1_ONLY.format(fault="time.sleep(300)"))
    ranks = Ranks("torch", 2, modules=[fault], call_limit=3)
    with pytest.raises(RanksFailed, match=r"rank 1 of 2 on torch.* took more than 3 s to compute a call"):
        _run_all(ranks)
    assert not _alive(ranks)


def test_an_error_of_the_call_is_told_and_the_ranks_go_on(module):
    with Ranks("torch", 2) as ranks:
        good, *_ = _requests()
        bad = replace(good, arrays={**good.arrays, "labels": good.arrays["labels"].astype(np.float64)})
        with pytest.raises(RankError, match="TypeError: labels must be integers"):
            ranks.evaluate(bad)
        with pytest.raises(BackendUnavailable):
            ranks.evaluate(replace(good, flag="torch:te"))
        assert np.isfinite(ranks.evaluate(good).loss).all()
        assert len(_alive(ranks)) == 2
    assert not _alive(ranks)


def test_a_module_that_fails_to_import_is_told(module):
    with pytest.raises(RanksFailed, match=r"exit code 1 \(ZeroDivisionError"):
        Ranks("torch", 2, modules=[module("1 / 0")])


def _command(*options):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "backends"), os.environ.get("PYTHONPATH", "")])
    # A background job of a shell ignores SIGINT, and its children inherit that.
    program = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from loss_core.cli import main
main()
"""
    return subprocess.Popen(
        [sys.executable, "-c", program, "check", "--backend", "torch:eager", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )


def _children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def _gone(pid):
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_nothing_is_left_when_the_command_is_stopped(number, code):
    command = _command("--tp", "2", "--cases", "2000")
    deadline = time.monotonic() + 120
    while len(ranks := _children(command.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(ranks) == 2
    time.sleep(3)
    command.send_signal(number)
    assert command.wait(timeout=60) == code
    while not all(map(_gone, ranks)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all(map(_gone, ranks))


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_the_command_tells_which_rank_was_killed():
    command = _command("--tp", "2", "--cases", "2000")
    deadline = time.monotonic() + 120
    while len(ranks := _children(command.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(3)
    os.kill(ranks[1], signal.SIGKILL)
    out, err = command.communicate(timeout=60)
    assert command.returncode == 1
    assert "on torch was ended by SIGKILL" in err or "rank 0 of 2" in err
    assert "Traceback" not in out + err
    assert all(map(_gone, ranks))


@pytest.mark.parametrize(("tp", "text"), [([0], "whole numbers >= 1, got 0"), ([2.0], "got 2.0"), ([True], "got True")])
def test_bad_numbers_of_ranks(tp, text):
    with pytest.raises(ValueError, match=text):
        check(TEParallelCEConfig(), ["torch:eager"], tp=tp)


def test_what_tp_can_not_be_combined_with():
    with pytest.raises(ValueError, match="leave out against"):
        check(TEParallelCEConfig(), ["torch:eager"], tp=[2], against="jax")
    with pytest.raises(ValueError, match="leave out device"):
        check(TEParallelCEConfig(), ["torch:eager"], tp=[2], device="cuda")
