"""Other projects judged by name: their adapters, versions, and the error if they are not installed."""

import importlib
import re

import pytest
import torch

from loss_core import FusedLinearCEConfig, KDLossConfig, MaskedCrossEntropyConfig
from loss_core.baselines import BASELINES, JUDGED, TIMED, Baseline
from loss_core.check import check
from loss_core.check.judge.implementation import baseline_implementation, implementation_named
from loss_core.dispatch.protocol import BackendUnavailable
from loss_core_baselines import build


def test_each_baseline_is_timed_or_judged():
    assert set(BASELINES) == set(TIMED) | set(JUDGED)


@pytest.mark.parametrize("name", JUDGED)
def test_each_adapter_has_builders_of_known_losses(name):
    losses = importlib.import_module(f"loss_core_baselines.{BASELINES[name].adapter}").LOSSES
    known = {"cross_entropy", "linear_cross_entropy", "distillation", "log_probs"}
    assert losses
    assert known.issuperset(losses)


def test_the_defects_of_torch_itself_are_found_by_name():
    cases = ["none-ignored", "basic", "all-ignored"]
    report = check(MaskedCrossEntropyConfig(reduction="mean"), implementations=[implementation_named("torch-own")],
                   dtypes=["float32"], only=cases)  # fmt: skip
    assert {verdict.clause for verdict in report.broken} == {"all ignored"}
    assert report.versions["torch-own"] == torch.__version__
    assert "--implementation torch-own " in report.failures[0].reproduce


def test_a_missing_project_is_reported_with_its_install_command(monkeypatch):
    absent = Baseline("absent", "", "torch", (), ("torch", "no_such_package"), "pip install absent", adapter="liger")
    monkeypatch.setitem(BASELINES, "absent", absent)
    monkeypatch.setitem(JUDGED, "absent", absent)
    with pytest.raises(BackendUnavailable, match="absent needs no_such_package: pip install absent"):
        build("absent", MaskedCrossEntropyConfig())
    report = check("MaskedCrossEntropy", implementations=[baseline_implementation("absent")], dtypes=["float32"],
                   only=["basic"])  # fmt: skip
    assert not report.passed
    assert report.verdicts[0].words[0].startswith("absent needs no_such_package: pip install absent")


def test_what_a_baseline_lacks_is_refused_by_name():
    with pytest.raises(BackendUnavailable, match=re.escape("torch-own has no z_loss=0.1.")):
        build("torch-own", MaskedCrossEntropyConfig(z_loss=0.1))
    with pytest.raises(BackendUnavailable, match="torch-own has no loss for KDLossConfig"):
        build("torch-own", KDLossConfig())
    with pytest.raises(BackendUnavailable, match=re.escape("torch-own has no logit_softcapping=2.0")):
        build("torch-own", FusedLinearCEConfig(logit_softcapping=2.0))
