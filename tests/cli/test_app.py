"""The commands, and the libraries that they need."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields

import pytest

import loss_core.cli.check
import loss_core.dispatch.builders
import loss_core.dispatch.flags
from helpers.command import environment, run, spawn
from loss_core import (
    __version__,
)
from loss_core.cli.listing import described
from loss_core.registry import LOSS_CONFIG_REGISTRY


@pytest.mark.parametrize("library", ["typer", "rich", "yaml"])
def test_without_the_cli_extra_one_line_and_2(library):
    result = spawn("losses", before=f"import sys; sys.modules[{library!r}] = None")
    assert result.returncode == 2
    assert result.stdout == ""
    assert re.fullmatch(
        rf"loss-core: the command line needs {library} .*pip install 'loss-core\[cli\]'\n", result.stderr
    )


def test_importing_the_library_or_the_command_loads_none_of_the_commands_libraries():
    code = (
        "import sys, loss_core, loss_core.cli, loss_core.check.html\n"
        "print([m for m in ('typer', 'rich', 'yaml', 'jinja2', 'matplotlib', 'torch', 'jax') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_version_and_help():
    assert run("--version").stdout == f"loss-core {__version__}\n"
    assert run("check", "--help").exit_code == 0
    assert run("check", "--wat").exit_code == 2


def test_backends_names_every_flag():
    lines = run("backends").stdout.splitlines()
    for flag in loss_core.dispatch.flags.all_flags():
        assert any(re.match(rf"{flag} +(yes|no) ", line) for line in lines), flag
    assert any(re.match(r"torch:eager +yes +torch \d", line) for line in lines)


def test_losses_lists_fields_types_defaults_and_meaning():
    flat = re.sub(r" +", " ", run("losses", env={"COLUMNS": "200"}).stdout)
    assert "KDLoss (KDLossConfig)\n Knowledge distillation: a divergence of the student from the teacher" in flat
    assert "temperature float 1.0 softmax temperature T" in flat
    assert 'reduction str \'sum\' "sum", "mean" (over valid tokens) or "none".' in flat


def test_every_field_of_our_configs_has_a_meaning():
    for config_cls in LOSS_CONFIG_REGISTRY.values():
        summary, meanings = described(config_cls)
        assert summary
        assert set(meanings) == {f.name for f in fields(config_cls)}, config_cls


def test_a_users_loss_is_listed_and_checked(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(
        "from dataclasses import dataclass\n"
        "from loss_core import KDLossConfig, register_loss\n"
        "from loss_core_torch import KDLoss\n"
        "@dataclass\n"
        "class WarmKDConfig(KDLossConfig):\n"
        "    '''KD that is warm.\n\n    Attributes:\n        warmth: how warm, in kelvin.\n    '''\n"
        "    warmth: float = 300.0\n"
        "register_loss('WarmKD', WarmKDConfig, {'torch': lambda c: KDLoss(c.ignore_index, c.temperature)})\n"
    )
    listed = spawn("losses", "--import", "my_losses", cwd=tmp_path)
    assert "WarmKD (WarmKDConfig)\n  KD that is warm.\n" in listed.stdout, listed.stderr
    assert re.search(r"warmth +float +300.0 +how warm, in kelvin.", listed.stdout)
    assert "softmax temperature T" in listed.stdout, "the meaning of an inherited field"
    assert "WarmKD" not in run("losses").stdout
    missing = run("losses", "--import", "loss_core_absent")
    assert missing.exit_code == 2
    assert "--import loss_core_absent: ModuleNotFoundError" in missing.stderr
