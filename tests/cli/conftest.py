"""Fixtures: a loss whose kernel is wrong, and machines without frameworks."""

from __future__ import annotations

import importlib
import sys

import pytest

import loss_core.dispatch.flags
from loss_core import unregister_loss

FORGETFUL = """
from dataclasses import dataclass
from loss_core import KDLossConfig, register_loss

@dataclass
class ForgetfulConfig(KDLossConfig):
    pass

# A realistic bug: the temperature is ignored.
def build(config):
    return KDLossConfig(config.ignore_index, temperature=1.0).build(backend="torch:eager")

register_loss("ForgetfulKD", ForgetfulConfig, {"torch:eager": build})
"""


@pytest.fixture
def forgetful(tmp_path, monkeypatch):
    """The module in tmp_path that registers `ForgetfulKD`, which ignores its temperature."""
    (tmp_path / "forgetful_loss.py").write_text(FORGETFUL)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("forgetful_loss")
    yield "forgetful_loss"
    unregister_loss("ForgetfulKD")
    del sys.modules["forgetful_loss"]


@pytest.fixture
def no_jax(monkeypatch):
    """A machine without JAX, whatever this one has."""
    kernels = loss_core.dispatch.flags.BACKENDS["jax"][1]
    monkeypatch.setitem(loss_core.dispatch.flags.BACKENDS, "jax", ("absent_framework.backend", kernels))


@pytest.fixture
def no_framework(monkeypatch, no_jax):
    """A machine without torch, too."""
    kernels = loss_core.dispatch.flags.BACKENDS["torch"][1]
    monkeypatch.setitem(loss_core.dispatch.flags.BACKENDS, "torch", ("absent_framework.backend", kernels))
