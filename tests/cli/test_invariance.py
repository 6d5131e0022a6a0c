"""`loss-core check --invariance`: exit codes, what is printed, and the options that it refuses."""

import json
import shlex
from dataclasses import dataclass

import pytest

from helpers.command import run
from loss_core import MaskedCrossEntropyConfig, register_loss, unregister_loss

QUICK = ("--invariance", "--backend", "torch:eager", "--dtype", "float32", "--shape", "5,24,8")


@dataclass
class BatchDependentConfig(MaskedCrossEntropyConfig):
    pass


@pytest.fixture
def dependent():
    """The name of a loss whose gradient is divided by the number of tokens although it is not reduced."""

    def build(config):
        right = MaskedCrossEntropyConfig(reduction=config.reduction).build(backend="torch:eager")
        return lambda logits, labels: right(logits, labels) / labels.numel()

    register_loss("BatchDependent", BatchDependentConfig, {"torch:eager": build})
    yield "BatchDependent"
    unregister_loss("BatchDependent")


def test_promises_that_are_kept_exit_0():
    result = run("check", *QUICK, "--config", "KDLoss", "--config", "FusedLinearCrossEntropy")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[:3:2] == ["KDLoss", "FusedLinearCrossEntropy"]
    assert lines[1].split() == ["ok", "torch:eager", "float32", "5,24,8", "promised", "holds"]
    assert lines[3].split()[:4] == ["torch:eager", "float32", "5,24,8", "-"]
    assert lines[-1].startswith("PASS: bitwise the same in all 1 rows that promise it; ")


def test_a_promise_that_is_broken_exits_1_and_its_line_reproduces_it(dependent, tmp_path):
    file = tmp_path / "report.json"
    result = run("check", *QUICK, "--config", dependent, "--config", "KDLoss", "--seed", 3, "--json", file)
    assert result.exit_code == 1
    (line,) = (line.strip() for line in result.stdout.splitlines() if line.strip().startswith("loss-core check"))
    assert line == (
        "loss-core check --invariance --config BatchDependent --backend torch:eager --dtype float32 --shape 5,24,8 "
        "--seed 3"
    )
    again = run(*shlex.split(line)[1:])
    assert again.exit_code == 1
    assert result.stdout.splitlines()[1] in again.stdout
    written = json.loads(file.read_text())
    assert not written["passed"]
    assert [(row["loss"], row["holds"], row["passed"]) for row in written["rows"]] == [
        ("BatchDependent", False, False),
        ("KDLoss", True, True),
    ]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--against", "torch:plain"), ("--case", "basic"), ("--cases", 3), ("--inputs", "call.npz"), ("--tp", 2),
     ("--report", "page.html"), ("--minutes", 1), ("--first", 0), ("--framework", "jax"), ("--implementation", "a:b")],
)  # fmt: skip
def test_options_of_the_other_check_are_refused(option, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("check", *QUICK, option, value)
    assert result.exit_code == 2
    assert f"{option} can't be used beside --invariance" in result.stderr


def test_a_flag_that_can_run_nothing_exits_2():
    result = run("check", *QUICK[:1], "--backend", "torch:plain", "--config", "ChunkedCrossEntropy")
    assert result.exit_code == 2
    assert "Nothing could be run: ChunkedCrossEntropy torch:plain: " in result.stderr
