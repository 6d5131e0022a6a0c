"""Flags on the command line: unusable ones are reported, those that compile run only when named."""

from __future__ import annotations

import re

import pytest

from helpers.command import QUICK, run
from loss_core import (
    BackendUnavailable,
    FlagStatus,
)
from loss_core.check import calls, check


@pytest.mark.usefixtures("no_jax")
def test_flags_that_cannot_be_used_are_listed_with_reason_and_install_line():
    checked = run("check", "--dtype", "float32", "--case", "basic")
    assert checked.exit_code == 0
    for result in (checked, run("backends")):
        flat = " ".join(result.stdout.split())
        assert "jax:xla: backend 'jax' needs absent_framework" in flat
        assert "\n    pip install 'loss-core[jax]'\n" in result.stdout


@pytest.mark.usefixtures("no_jax")
@pytest.mark.parametrize("options", [("--backend", "jax:xla"), ("--backend", "jax"), ("--against", "jax:xla")])
def test_naming_a_flag_that_cannot_be_used_exits_2(options):
    result = run("check", "--config", "KDLoss", "--case", "basic", *options)
    assert result.exit_code == 2
    assert "needs absent_framework" in result.stderr
    assert "\n    pip install 'loss-core[jax]'\n" in result.stderr
    assert result.stdout == ""


def test_check_never_skips_the_flag_to_compare_with_silently(monkeypatch):
    from loss_core_torch import backend

    def status(kernel):
        return FlagStatus(f"torch:{kernel}", kernel == "eager", "no such kernel today", "torch 2", "")

    monkeypatch.setattr(backend, "kernel_status", status)
    for named in (["torch:eager"], None):
        with pytest.raises(BackendUnavailable, match="no such kernel today"):
            check("KDLoss", named, against="torch:te", dtypes=["float32"], only=["basic"])


@pytest.mark.usefixtures("no_framework")
def test_without_any_framework_there_is_nothing_to_check():
    result = run("check")
    assert result.exit_code == 2
    assert "pip install 'loss-core[torch]'" in result.stderr
    assert "pip install 'loss-core[jax]'" in result.stderr
    assert "nothing to check" in result.stderr
    assert run("backends").exit_code == 0


def test_a_kernel_that_compiles_is_skipped_unless_it_is_named(monkeypatch):
    assert "torch:compile" in calls.COMPILED_AT_FIRST_CALL
    # Another in its place: compiling takes a while, and `make check` names torch:compile itself.
    monkeypatch.setattr(calls, "COMPILED_AT_FIRST_CALL", {"torch:plain"})
    quick = ("--config", "MaskedCrossEntropy", "--dtype", "float32", "--case", "vocab-1")
    bare = run("check", *quick)
    assert bare.exit_code == 0
    assert not re.search(r"^ok torch:plain", bare.stdout, re.M)
    flat = " ".join(bare.stdout.split())
    assert "Skipped: torch:plain: it compiles for each kind of input" in flat
    assert "(--backend torch:plain)" in flat
    for named in (("--backend", "torch:plain"), ("--against", "torch:plain")):
        result = run("check", *quick, *named)
        assert result.exit_code == 0
        assert re.search(r"^ok torch:plain", result.stdout, re.M)
        assert "it compiles" not in result.stdout


def test_a_loss_that_a_flag_does_not_support_is_listed_as_skipped(forgetful):
    result = run("check", "--config", "KDLoss", "--config", "ForgetfulKD", "--backend", "torch:plain", *QUICK[2:])
    assert result.exit_code == 0
    assert re.search(r"Skipped:\n  ForgetfulKD torch:plain: ", result.stdout)
    only = run("check", "--config", "ForgetfulKD", "--backend", "torch:plain", *QUICK[2:])
    assert only.exit_code == 2
    assert "Nothing could be run" in only.stderr
