"""`loss-core check --implementation`: accepted values, output, exit codes, and the commands that reproduce failures."""

import json
import shlex
import sys

import pytest

from helpers.command import run

QUICK = ("--dtype", "float32", "--case", "basic", "--case", "none")

LOSSES = """
import torch


def right(config):
    def loss(logits, labels):
        return config.build(backend="torch:plain")(logits, labels)

    return loss


def doubled(logits, labels):
    from loss_core import MaskedCrossEntropyConfig

    return 2 * MaskedCrossEntropyConfig().build(backend="torch:plain")(logits, labels)


def refuses(logits, labels):
    raise NotImplementedError("on Tuesdays")


class Holder:
    right = staticmethod(right)


number = 3
"""


@pytest.fixture
def losses(tmp_path, monkeypatch):
    """The folder of the module `judged`, which is the working directory."""
    (tmp_path / "judged.py").write_text(LOSSES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("judged", None)


def test_a_right_loss_exits_0_with_a_matrix(losses):
    named = ("--implementation", "judged:right", "--implementation", "judged:Holder.right", "--implementation",
             "torch:eager")  # fmt: skip
    result = run("check", *named, "--config", "MaskedCrossEntropy", *QUICK)
    assert result.exit_code == 0, result.output
    (head,) = [line for line in result.stdout.splitlines() if line.startswith("MaskedCrossEntropy")]
    assert head.split() == ["MaskedCrossEntropy", "judged:right", "judged:Holder.right", "torch:eager"]
    (values,) = [line for line in result.stdout.splitlines() if line.startswith("values")]
    assert values.split() == ["values", "ok", "ok", "ok"]
    assert result.stdout.strip().splitlines()[-1].startswith("PASS: ")


def test_a_broken_clause_exits_1_and_its_command_reproduces_it(losses):
    result = run("check", "--implementation", "judged:doubled", *QUICK, "--report", "page.html", "--json", "r.json")
    assert result.exit_code == 1, result.output
    line = next(line.strip() for line in result.stdout.splitlines() if line.strip().startswith("loss-core check"))
    assert line == (
        "loss-core check --implementation judged:doubled --config MaskedCrossEntropy --dtype float32 --case basic"
    )
    again = run(*shlex.split(line)[1:])
    assert again.exit_code == 1, again.stderr
    assert "BROKEN judged:doubled, MaskedCrossEntropy, values" in again.stdout
    page = (losses / "page.html").read_text()
    assert '<td class="broken">BROKEN</td>' in page
    assert line in page
    verdicts = json.loads((losses / "r.json").read_text())["verdicts"]
    assert {v["clause"] for v in verdicts if v["status"] == "broken"} == {"values", "gradient of logits"}


def test_a_loss_that_refuses_everything_is_reported_with_its_error(losses):
    result = run("check", "--implementation", "judged:refuses", *QUICK)
    assert result.exit_code == 2
    assert "Nothing could be run" in result.stderr
    assert "NotImplementedError: on Tuesdays" in result.stderr


def test_the_framework_of_an_implementation_is_an_option(losses):
    result = run("check", "--implementation", "judged:right", "--framework", "jax", "--config", "MaskedCrossEntropy",
                 *QUICK)  # fmt: skip
    assert result.exit_code == 2, "plain torch takes no arrays of JAX"
    result = run("check", "--implementation", "judged:right", "--framework", "keras")
    assert result.exit_code == 2
    assert "--framework 'keras' is unknown" in result.stderr


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere:loss", "ModuleNotFoundError: No module named 'nowhere'"),
        ("judged:absent", "AttributeError: module 'judged' has no attribute 'absent'"),
        ("judged:number", "must be a loss or a builder, got 3"),
        ("judged", "'judged' is neither a flag, nor MODULE:OBJECT, nor one of cce,"),
    ],
)
def test_implementations_that_do_not_exist_exit_2(losses, spec, message):
    result = run("check", "--implementation", spec)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--implementation", "torch:eager", "--tp", 2), "tp is for flags"),
        (("--implementation", "torch:eager", "--minutes", 1), "minutes is for flags"),
        (("--framework", "jax"), "--framework jax says whose tensors an --implementation takes; name one."),
    ],
)
def test_options_that_would_be_ignored_are_refused(options, message):
    result = run("check", "--config", "KDLoss", "--dtype", "float32", "--case", "basic", *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_broken_clause_comes_before_a_flag_that_passes(losses):
    named = ("--implementation", "judged:doubled", "--config", "MaskedCrossEntropy")
    result = run("check", *named, "--backend", "torch:eager", *QUICK)
    assert result.exit_code == 1
    last = result.stdout.strip().splitlines()[-1]
    assert last.startswith("FAIL: ")
    assert " clauses broken (" in last
    assert ". PASS: everything within what rounding explains (1 config, 1 flag" in last
