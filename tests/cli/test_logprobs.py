"""`loss-core check --logprobs`."""

from __future__ import annotations

import json

import numpy as np
import pytest

from helpers.command import run
from loss_core.mismatch import write_dump


@pytest.fixture
def dump(tmp_path):
    """Writes a dump whose engine has this temperature; returns its path."""

    def write(temperature=1.0, **arrays):
        rng = np.random.default_rng(0)
        hidden, weight = rng.standard_normal((60, 8)), rng.standard_normal((40, 8))
        labels = rng.integers(0, 40, 60)
        labels[3] = -100

        def logprobs(tau):
            z = hidden @ weight.T / tau
            return (z - np.log(np.exp(z).sum(1, keepdims=True)))[np.arange(60), labels % 40].astype(np.float32)

        known = {
            "labels": labels, "trainer_logprobs": logprobs(1.0), "engine_logprobs": logprobs(temperature),
            "hidden_states": hidden.astype(np.float32), "lm_weight": weight.astype(np.float32),
        }  # fmt: skip
        write_dump(tmp_path / "dump.npz", **known | arrays)
        return tmp_path / "dump.npz"

    return write


def test_a_cause_is_printed_and_written_and_exits_1(dump, tmp_path):
    result = run("check", "--logprobs", dump(0.8), "--json", tmp_path / "r.json", "--report", tmp_path / "r.html",
                 obj="loss-core check --logprobs <dump>")  # fmt: skip
    assert result.exit_code == 1, result.output
    line = result.stdout.splitlines()[-1]
    assert line.startswith("DIFFER: trainer: float32. engine: float32, temperature 0.8 instead of 1")
    assert "59 tokens compared, 1 ignored" in result.stdout
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["conclusion"] == line
    assert written["explanations"]["trainer"]["causes"] == ["float32"]
    assert written["statistics"]["tokens"] == 59
    page = (tmp_path / "r.html").read_text()
    assert "temperature 0.8 instead of 1" in page
    assert "loss-core check --logprobs &lt;dump&gt;" in page
    assert "http" not in page
    assert "<script" not in page


def test_systems_that_agree_exit_0(dump):
    result = run("check", "--logprobs", dump())
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "AGREE: one computation explains both systems: float32."


def test_without_a_head_the_conclusion_names_what_to_add(dump):
    result = run("check", "--logprobs", dump(0.8, hidden_states=None, lm_weight=None))
    assert result.exit_code == 1
    assert "Add hidden_states and lm_weight to the dump to learn why." in result.stdout


def test_options_that_would_be_ignored_are_refused_by_name(dump):
    result = run("check", "--logprobs", dump(), "--config", "KDLoss", "--tp", "2", "--seed", "3")
    assert result.exit_code == 2
    assert "--config, --tp can't be used beside --logprobs, which takes --seed, --json and --report." in result.output


@pytest.mark.parametrize(("name", "message"), [("absent.npz", "can't be read"), ("dump.txt", "ends in .npz or")])
def test_files_that_are_no_dump_are_refused(name, message, tmp_path):
    result = run("check", "--logprobs", tmp_path / name)
    assert result.exit_code == 2
    assert message in result.output
