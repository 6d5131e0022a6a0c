"""Configs from text."""

from __future__ import annotations

import pytest

from helpers.command import QUICK, run
from loss_core import (
    KDLossConfig,
)
from loss_core.cli.configs import read_configs


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: KDLoss\ntemperature: 2.0\n", [KDLossConfig(temperature=2.0)]),
        ('{"name": "KDLoss", "temperature": 2.0}', [KDLossConfig(temperature=2.0)]),
        ("- KDLoss\n- {name: KDLoss, chunk_size: 3}\n", ["KDLoss", KDLossConfig(chunk_size=3)]),
        ("model: small\nloss:\n  name: KDLoss\nsteps: 3\n", [KDLossConfig()]),
        ("loss: KDLoss\n", ["KDLoss"]),
    ],
)
def test_yaml_files(text, expected, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert read_configs(str(path)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name: KDLoss\ntemprature: 2.0",
            "recipe.yaml: KDLossConfig has no field 'temprature'. Did you mean 'temperature'",
        ),
        ("loss:\n  name: KDLos", "recipe.yaml, loss: unknown loss name 'KDLos'; did you mean 'KDLoss'?"),
        ("- KDLoss\n- {name: KDLoss, temperature: -1}", "item 2: temperature must be a finite number > 0, got -1"),
        ("name: KDLoss\n  temperature: 1", "recipe.yaml, line 2, column 14: not valid YAML"),
        ("name: KDLoss\nx: [1,\n", "line 3, column 1: not valid YAML"),
        ("name: MaskedCrossEntropy\nreduction: average", "reduction must be one of 'sum', 'mean', 'none'"),
        ("name: KDLoss\ntp_group: world", "tp_group is a live handle"),
        ("name: KDLoss\nbackend: torch:eager", "remove it, and use --backend torch:eager"),
        ("temperature: 2.0", "the key 'name' is missing"),
        ("", "got nothing"),
        ("[]", "got an empty list"),
        ("42", "got int 42"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
        ("\0", "not valid YAML"),
    ],
)
def test_errors_in_yaml_are_located(text, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    result = run("check", "--config", path)
    assert result.exit_code == 2
    assert message in result.stderr
    assert str(path) in result.stderr
    assert len(result.stderr.splitlines()) <= 2


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path, message in (("absent.yaml", "No such file"), ("binary.yaml", "not UTF-8 text"), (".", "can't be read")):
        result = run("check", "--config", tmp_path / path)
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_several_configs_of_one_loss_have_distinct_names():
    result = run("check", "--config", "[KDLoss, {name: KDLoss, temperature: 2.0}]", *QUICK)
    assert result.exit_code == 0
    assert "\nKDLoss\n" in result.stdout
    assert "\nKDLoss(temperature=2.0)\n" in result.stdout
