"""`torch:auto`: by the table until something was measured here, then by what `bench --tune` kept, call by call."""

import json
from pathlib import Path

import pytest
import torch

import loss_core_torch.auto
from loss_core import FusedLinearCEConfig, KDLossConfig, MaskedCrossEntropyConfig
from loss_core.backend import COMPILED_AT_FIRST_CALL
from loss_core.choices import store_choices
from loss_core_torch import compile_set, compiled, kernels
from loss_core_torch.auto import RULES


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """A cache of choices of its own; returns a function that adds one."""
    monkeypatch.setenv("LOSS_CORE_CACHE", str(tmp_path))
    loss_core_torch.auto.choose.cache_clear()
    yield lambda **entry: store_choices([{"backend": "torch", "device": "cpu", **entry}])
    loss_core_torch.auto.choose.cache_clear()


needs_compiler = pytest.mark.skipif(not compiled.status().usable, reason=compiled.status().reason)


@pytest.fixture
def marked(monkeypatch):
    """A second set of kernels, "triton" by name and eager by its functions, so that a CPU can run it."""
    monkeypatch.setitem(kernels._LOADED, "triton", kernels.find("eager"))


def _auto(config):
    loss = config.build(backend="torch:auto")
    return loss.with_kernel_choice(loss_core_torch.auto.by_rule(type(loss).__name__, "cpu", ("eager", "triton")))


def test_without_measurements_a_rule_decides_and_says_why(tuned):
    loss = MaskedCrossEntropyConfig().build(backend="torch")
    assert loss.kernel_choice.flag == "torch:eager"
    assert "BENCHMARKS.md" in loss.kernel_choice.reason
    assert "eager" in loss.kernel_choice.candidates
    assert "not measured" in loss_core_torch.auto.by_rule("KDLoss", "xpu", ("eager", "triton")).reason


@pytest.mark.parametrize(
    "rule", [rule for rule in RULES if rule.results], ids=lambda rule: f"{rule.device}-{rule.loss}"
)
def test_a_rule_takes_what_the_results_that_it_names_show_to_be_fastest(rule):
    for name in rule.results:
        text = (Path(__file__).parent.parent / f"examples/benchmarks/{name}.json").read_text(encoding="utf-8")
        rows = [row for row in json.loads(text)["rows"] if row["loss"] == rule.loss and row["seconds"]]
        ours = {row["implementation"]: row["seconds"] for row in rows if row["kind"] == "flag"}
        # None that compiles at its first call is a default.
        best = min(set(ours) - COMPILED_AT_FIRST_CALL, key=ours.__getitem__)
        assert best == f"torch:{rule.kernel}"
        if "ahead of F.linear_cross_entropy" in rule.why:
            assert ours[best] < min(row["seconds"] for row in rows if row["implementation"] == "torch-linear-ce")


def test_a_named_flag_is_never_changed(tuned, marked):
    tuned(loss="MaskedCrossEntropy", dtype="float32", shape=(4, 8), flag="torch:triton")
    loss = MaskedCrossEntropyConfig().build(backend="torch:eager")
    loss(torch.randn(4, 8), torch.arange(4))
    assert loss.kernel_choice.flag == "torch:eager"
    assert loss.kernel_choice.candidates == ()


def test_each_call_has_its_own_choice(tuned, marked):
    tuned(loss="MaskedCrossEntropy", dtype="float32", shape=(4, 8), flag="torch:triton")
    loss = _auto(MaskedCrossEntropyConfig())
    seen = []
    for rows, dtype in ((4, torch.float32), (64, torch.float32), (4, torch.float64), (4, torch.float32)):
        loss(torch.randn(rows, 8, dtype=dtype), torch.zeros(rows, dtype=torch.long))
        seen.append(loss.kernel_choice.flag)
    assert seen == ["torch:triton", "torch:eager", "torch:eager", "torch:triton"]
    assert "--tune" in loss.kernel_choice.reason
    assert loss.kernel_for(torch.device("cpu"), torch.float32, (5, 9)).flag == "torch:triton"


@needs_compiler
def test_a_kernel_that_compiles_is_taken_where_it_was_measured_and_nowhere_else(tuned, monkeypatch):
    ran = []
    for name in ("cross_entropy_with_grad", "cross_entropy_stats"):
        real = getattr(kernels.find("eager"), name)
        monkeypatch.setattr(compile_set, name, lambda *args, real=real: ran.append(real) or real(*args))
    tuned(loss="MaskedCrossEntropy", dtype="float32", shape=(64, 8192), flag="torch:compile")
    loss = MaskedCrossEntropyConfig().build(backend="torch")
    assert loss.kernel_choice.flag == "torch:eager"
    assert "compile" in loss.kernel_choice.candidates
    cpu = torch.device("cpu")
    assert loss.kernel_for(cpu, torch.float32, (64, 8192)).flag == "torch:compile"
    assert loss.kernel_for(cpu, torch.bfloat16, (64, 8192)).flag == "torch:eager"
    loss(torch.randn(64, 8192, requires_grad=True), torch.zeros(64, dtype=torch.int64)).backward()
    assert (loss.kernel_choice.flag, len(ran)) == ("torch:compile", 1)
    loss(torch.randn(2, 8192), torch.zeros(2, dtype=torch.int64))
    assert (loss.kernel_choice.flag, len(ran)) == ("torch:eager", 1)
    # The fused loss has no such kernel, whatever was kept.
    assert "compile" not in FusedLinearCEConfig().build(backend="torch").kernel_choice.candidates


def test_the_other_losses_are_asked_for_their_shapes(tuned, marked):
    tuned(loss="FusedLinearCrossEntropy", dtype="float32", shape=(4, 8, 16), flag="torch:triton")
    tuned(loss="KDLoss", dtype="float32", shape=(4, 8), flag="torch:triton")
    fused, kd = _auto(FusedLinearCEConfig()), _auto(KDLossConfig())
    labels = torch.arange(4)
    fused(torch.randn(4, 16), labels, torch.randn(8, 16))
    kd(torch.randn(2, 2, 8), torch.randn(2, 2, 8), labels.view(2, 2))
    assert fused.kernel_choice.flag == kd.kernel_choice.flag == "torch:triton"
    fused(torch.randn(4, 16), labels, torch.randn(64, 16))
    assert fused.kernel_choice.flag == "torch:eager"


def test_a_kernel_that_can_not_be_used_here_is_not_taken(tuned):
    tuned(loss="MaskedCrossEntropy", dtype="float32", shape=(4, 8), flag="torch:te")
    loss = _auto(MaskedCrossEntropyConfig())
    loss(torch.randn(4, 8), torch.arange(4))
    assert loss.kernel_choice.flag == "torch:eager"


def test_bad_input_gets_the_usual_error(tuned):
    loss = _auto(MaskedCrossEntropyConfig())
    with pytest.raises(TypeError, match=r"logits must be a torch\.Tensor"):
        loss([1.0], torch.arange(1))
    with pytest.raises(ValueError, match="at least one dimension"):
        loss(torch.tensor(1.0), torch.arange(1))


def test_inside_a_graph_the_choice_stands(tuned, marked):
    loss = _auto(MaskedCrossEntropyConfig())
    logits, labels = torch.randn(4, 8), torch.arange(4)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(logits, labels), loss(logits, labels))
