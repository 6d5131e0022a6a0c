"""`loss-core compare`: two user-defined functions, on inputs from a file, or drawn."""

import sys

import numpy as np
import pytest

from helpers.command import run

FUNCTIONS = """
import torch


def first(x, y):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(wide, y)


def second(x, y):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide.logsumexp(-1) - wide.gather(1, y[:, None])[:, 0]).mean()


def off(x, y):
    return second(x, y) * 1.001


def fails(x, y):
    raise KeyError("nothing")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with the functions and the inputs."""
    (tmp_path / "compared.py").write_text(FUNCTIONS)
    np.savez(tmp_path / "call.npz", x=np.random.default_rng(0).standard_normal((6, 31)), y=np.arange(6))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("compared", None)


def test_functions_that_agree_exit_0_and_others_exit_1(folder):
    options = ("--inputs", "call.npz", "--frameworks", "torch,torch")
    result = run("compare", "compared:first", "compared:second", *options, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip().splitlines()[-1].startswith("PASS: ")
    result = run("compare", "compared:first", "compared:off", *options)
    assert result.exit_code == 1
    assert "FAILED" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("compared:first", "compared:absent"), "compared:absent: AttributeError"),
        (("compared:first", "compared"), "expected MODULE:OBJECT, got 'compared'"),
        (("compared:first", "compared:fails"), "KeyError: 'nothing'"),
        (("compared:first", "compared:second", "--frameworks", "torch"), "expected two of torch, jax"),
        (("compared:first", "compared:second", "--grad-of", "y"), "grad_of names"),
    ],
)
def test_what_cannot_be_compared_exits_2(folder, words, message):
    result = run(
        "compare", *words, "--inputs", "call.npz", *(() if "--frameworks" in words else ("--frameworks", "torch,torch"))
    )
    assert result.exit_code == 2
    assert message in result.stderr


def test_arguments_are_drawn_by_their_sizes(folder):
    options = ("--draw", "x=6,31", "--draw", "y=6:31", "--frameworks", "torch,torch")
    result = run("compare", "compared:first", "compared:second", *options, "--seed", "3")
    assert result.exit_code == 0, result.output
    assert run("compare", "compared:first", "compared:off", *options).exit_code == 1
    # Labels that are no class of the logits.
    result = run("compare", "compared:first", "compared:second", *options[:2], "--draw", "y=6:9999", *options[4:])
    assert (result.exit_code, "IndexError" in result.stderr) == (2, True), result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "either --inputs FILE, or --draw"),
        (("--inputs", "call.npz", "--draw", "x=6,31"), "either --inputs FILE, or --draw"),
        (("--draw", "x=6;31"), "--draw 'x=6;31': expected NAME=SIZES[:N]"),
        (("--draw", "y=6:0"), "--draw 'y=6:0': expected NAME=SIZES[:N]"),
    ],
)
def test_missing_and_malformed_arguments_exit_2(folder, options, message):
    result = run("compare", "compared:first", "compared:second", *options, "--frameworks", "torch,torch")
    assert result.exit_code == 2
    assert message in result.stderr
