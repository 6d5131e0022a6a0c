"""`torch:te`: with TE's own sources on a CPU (te_worker.py, in separate processes), and where TE can't be used."""

import functools
import importlib.abc
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from loss_core import (
    BackendUnavailable,
    FusedLinearCEConfig,
    KDLossConfig,
    MaskedCrossEntropyConfig,
    TEParallelCEConfig,
)
from loss_core.cli import make_app
from loss_core.dispatch.flags import flag_status
from loss_core_torch.kernels import te
from on_torch.kernels import te_worker

TESTS = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("te_worker.py")
CHECK_WORKER = Path(__file__).with_name("te_check_worker.py")
TE_MODULE = "transformer_engine.pytorch.cross_entropy"
# In one process of pytest-xdist, so that the tests share the output of each worker.
pytestmark = pytest.mark.xdist_group("te")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux alone")


def _start(*arguments, interpret="1", worker=WORKER):
    folders = (TESTS.parent, TESTS.parent / "backends", TESTS)
    paths = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": interpret}
    return subprocess.Popen(
        [sys.executable, str(worker), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


def _finish(workers):
    try:
        outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output[-4000:]
    return outputs


def _passed(output):
    return [line.removeprefix("passed: ") for line in output.splitlines() if line.startswith("passed: ")]


@functools.cache
def _output(mode):
    """Output of one process with the sources of TE ("one"), or with a TE that overwrites its input."""
    return _finish([_start(mode)])[0]


@on_linux
@pytest.mark.parametrize(
    ("mode", "scenario"),
    [("one", x) for x in te_worker.ONE] + [("overwriting", x) for x in te_worker.OVERWRITING],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_in_one_process(mode, scenario):
    assert scenario.__name__ in _passed(_output(mode)), _output(mode)[-8000:]


@on_linux
def test_two_processes_with_the_sources_of_te(tmp_path):
    for output in _finish([_start(rank, 2, tmp_path) for rank in range(2)]):
        assert _passed(output) == [scenario.__name__ for scenario in te_worker.RANKS], output[-8000:]


@on_linux
def test_the_interpreter_is_patched_to_round_as_a_gpu():
    (output,) = _finish([_start("compiled", interpret="0")])
    assert _passed(output) == ["stores_round_to_nearest_on_a_gpu"], output[-4000:]


@on_linux
def test_check_judges_te_by_its_adapter(tmp_path):
    options = ("--implementation", "te", "--dtype", "float32", "--dtype", "bfloat16", "--json", tmp_path / "found.json")
    judging = _start("check", "--config", "MaskedCrossEntropy", *options, worker=CHECK_WORKER)
    output = judging.communicate(timeout=300)[0]
    verdicts = {verdict["clause"]: verdict for verdict in json.loads((tmp_path / "found.json").read_text())["verdicts"]}
    by_status = {
        status: {name for name, verdict in verdicts.items() if verdict["status"] == status}
        for status in ("ok", "broken", "unsupported", "not seen")
    }
    assert by_status == {
        "ok": {
            "gradient of logits", "result dtype", "inputs left alone", "ignored positions", "all ignored",
            "labels that are no class", "upstream gradient", "upstream per token", "more dimensions", "strided rows",
            "strided columns", "determinism",
        },
        # docs/defects.md
        "broken": {"values", "backward twice"},
        "unsupported": {"gradient of loss_weights"},
        # A tensor without values can't pass for one on CUDA.
        "not seen": {"no host sync"},
    }, output  # fmt: skip
    assert {(finding["case"], finding["problem"]) for finding in verdicts["values"]["findings"]} == {
        ("mean", "has shape (1,), not ()")
    }
    # Label smoothing and any ignore_index are supported; other options are reported.
    refused = " ".join(word for verdict in verdicts.values() for word in verdict["words"])
    assert "te has no z_loss=0.1" in refused
    assert "label_smoothing" not in refused
    assert "ignore_index" not in refused


# --- where TE can't run


class _Finder(importlib.abc.MetaPathFinder):
    """Raises this error at every import of transformer_engine."""

    def __init__(self, error):
        self.error = error

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "transformer_engine":
            raise self.error
        return None


@pytest.fixture
def te_import(monkeypatch):
    """A function that makes importing TE raise an error, or return a module."""

    def end_with(result):
        if isinstance(result, Exception):
            monkeypatch.setattr(sys, "meta_path", [_Finder(result), *sys.meta_path])
        else:
            for name in ("transformer_engine", "transformer_engine.pytorch", TE_MODULE):
                monkeypatch.setitem(sys.modules, name, result)

    return end_with


NOT_INSTALLED = ModuleNotFoundError("No module named 'transformer_engine'", name="transformer_engine")
PARTIAL = [
    ModuleNotFoundError("No module named 'onnxscript'", name="onnxscript"),
    OSError("libcudart.so.12: cannot open shared object file"),
    FileNotFoundError("Could not find shared object file for Transformer Engine torch lib."),
    AssertionError("TE's versions do not match"),
]


@pytest.mark.parametrize("config", [MaskedCrossEntropyConfig(), TEParallelCEConfig()], ids=lambda c: type(c).__name__)
def test_not_installed(te_import, config):
    te_import(NOT_INSTALLED)
    with pytest.raises(BackendUnavailable) as caught:
        config.build(backend="torch:te")
    assert str(caught.value) == (
        "'torch:te' needs transformer_engine (No module named 'transformer_engine'): pip install 'loss-core[te]'"
    )
    assert flag_status("torch:te").install == "pip install 'loss-core[te]'"


@pytest.mark.parametrize("error", PARTIAL, ids=lambda error: type(error).__name__)
def test_a_broken_install_is_reported_with_its_error(te_import, error):
    te_import(error)
    with pytest.raises(BackendUnavailable) as caught:
        MaskedCrossEntropyConfig().build(backend="torch:te")
    assert f"can't be imported ({type(error).__name__}: {error}): pip install 'loss-core[te]'" in str(caught.value)
    with pytest.raises(BackendUnavailable) as caught:
        te.find_entry()
    assert caught.value.__cause__ is error


def test_the_command_line_lists_it(te_import):
    te_import(NOT_INSTALLED)
    listed = CliRunner().invoke(make_app(), ["backends"], env={"COLUMNS": "400"})
    assert listed.exit_code == 0
    text = " ".join(listed.stdout.split())
    assert (
        "'torch:te' needs transformer_engine (No module named 'transformer_engine') pip install 'loss-core[te]'" in text
    )


def test_without_a_gpu(te_import, monkeypatch):
    te_import(SimpleNamespace(parallel_cross_entropy=lambda inp, target, *, overwrite_input=False: inp))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status = flag_status("torch:te")
    assert not status.usable
    assert status.reason == "'torch:te' needs a CUDA device, and torch.cuda.is_available() is False here."
    assert status.install == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert flag_status("torch:te").usable
    loss = MaskedCrossEntropyConfig().build(backend="torch:te")
    with pytest.raises(BackendUnavailable, match=r"takes logits on a CUDA device, got cpu: use 'torch:eager'"):
        loss(torch.randn(2, 3), torch.tensor([0, 1]))


@on_linux
def test_the_version_that_is_installed_for_the_tests():
    # Without its compiled part, the usual reason for an unusable flag: TE's own message is reported.
    assert int(importlib.metadata.version("transformer_engine").split(".")[0]) >= 2
    status = flag_status("torch:te")
    if not status.usable:
        assert "RuntimeError: Found empty `transformer-engine` meta package installed" in status.reason


@pytest.mark.parametrize("config", [FusedLinearCEConfig(), KDLossConfig()], ids=lambda c: type(c).__name__)
def test_losses_that_te_does_not_have(config):
    # The same message whether TE is installed or not: installing it would not help.
    name = type(config).__name__
    with pytest.raises(BackendUnavailable, match=f"'torch:te' has no kernel for {name}; it is served by .*torch:eager"):
        config.build(backend="torch:te")


def test_auto_never_imports_te(te_import):
    te_import(AssertionError("auto imported Transformer Engine"))
    for flag in ("torch", "torch:auto"):
        assert MaskedCrossEntropyConfig().build(backend=flag).kernel_choice.flag != "torch:te"
