"""`torch:auto`: by its rules, or for each call by a measurement that `bench --tune` has stored."""

import json
from pathlib import Path

import pytest
import torch

from helpers.torch_calls import configs, inputs, name_of, run, takes
from loss_core import FusedLinearCEConfig, KDLossConfig, MaskedCrossEntropyConfig
from loss_core.dispatch.flags import COMPILED_AT_FIRST_CALL, flag_status
from loss_core.dispatch.observed import names, observing
from loss_core.dispatch.tuned import store_choices
from loss_core_torch import auto

CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[2] / "examples/benchmarks"
COMPILE = flag_status("torch:compile")


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """A temporary cache of measured choices; returns a function that adds one."""
    monkeypatch.setenv("LOSS_CORE_CACHE", str(tmp_path))
    auto.chosen.cache_clear()
    here = {"backend": "torch", "device": "cpu", "version": str(torch.__version__), "threads": torch.get_num_threads()}
    yield lambda **entry: store_choices([{**here, "dtype": "float32", **entry}])
    auto.chosen.cache_clear()


def _ran(loss, config, **sizes):
    """Which kernels ran for a call, forward and backward."""
    with observing() as seen:
        run(loss, inputs(config, **sizes))
    return names(seen)


# --- the table


@pytest.mark.parametrize("config", configs(), ids=name_of)
def test_small_calls_are_plain_and_others_eager(tuned, config):
    loss = config.build(backend="torch")
    assert loss.kernel_choice.flag == "torch:eager"
    # torch:plain has no blocks of tokens.
    small = "torch:eager" if hasattr(config, "chunk_len") else "torch:plain"
    assert _ran(loss, config, lead=(4,), vocab=8, hidden=4) == small
    assert _ran(loss, config, lead=(40,), vocab=8000, hidden=4) == "torch:eager"
    # Of any dtype.
    assert _ran(loss, config, lead=(4,), vocab=8, hidden=4, dtype=torch.bfloat16) == small


def test_the_size_limit_is_that_of_the_table():
    small = next(rule.max_logits for rule in auto.RULES if rule.kernel == "plain")
    assert auto.by_rule("cpu", ("plain", "eager"), small).flag == "torch:plain"
    assert auto.by_rule("cpu", ("plain", "eager"), small + 1).flag == "torch:eager"
    # Before the first call.
    assert auto.by_rule("cpu", ("plain", "eager")).flag == "torch:eager"


@pytest.mark.parametrize(
    ("device", "candidates", "expected", "why"),
    [
        ("cpu", ("plain", "eager", "compile", "triton"), "torch:eager", "does not compile at its first call"),
        ("cuda", ("plain", "eager", "triton"), "torch:triton", "agreed with torch:eager"),
        ("cuda", ("plain", "eager"), "torch:eager", "not measured on this one"),
        ("xpu", ("plain", "eager", "triton"), "torch:eager", "not measured on this one"),
        ("cpu", ("te",), "torch:te", "the only kernel"),
    ],
)
def test_a_rule_decides_and_says_why(device, candidates, expected, why):
    choice = auto.by_rule(device, candidates, 1 << 30)
    assert choice.flag == expected
    assert why in choice.reason
    assert choice.candidates == candidates


def _measured():
    """(rule, seconds of each flag) for each loss of the results that a rule names, where these exist."""
    # torch:plain was a baseline before it was a flag.
    flag_of = {"plain-torch": "torch:plain"}
    for rule in auto.RULES:
        for name in rule.results:
            path = RESULTS / f"{name}.json"
            rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
            for loss in sorted({row["loss"] for row in rows}):
                seconds = {
                    flag_of.get(row["implementation"], row["implementation"]): row["seconds"]
                    for row in rows
                    if row["loss"] == loss and row["seconds"]
                }
                ours = {flag: x for flag, x in seconds.items() if flag.startswith("torch:")}
                yield pytest.param(rule, ours, id=f"{name}-{loss}")


@pytest.mark.parametrize(("rule", "seconds"), list(_measured()))
def test_a_rule_takes_what_the_results_that_it_names_show_to_be_fastest(rule, seconds):
    # No kernel that compiles at its first call is a default.
    best = min(set(seconds) - COMPILED_AT_FIRST_CALL, key=seconds.__getitem__)
    assert best == f"torch:{rule.kernel}"


def test_every_result_that_a_rule_names_is_there():
    assert [name for rule in auto.RULES for name in rule.results if not (RESULTS / f"{name}.json").exists()] == []


# --- measured choices


def test_a_named_flag_is_never_changed(tuned):
    tuned(loss="MaskedCrossEntropy", shape=(4, 8), flag="torch:plain")
    config = MaskedCrossEntropyConfig()
    loss = config.build(backend="torch:eager")
    assert _ran(loss, config, lead=(4,), vocab=8) == "torch:eager"
    assert loss.kernel_choice.candidates == ()


def test_each_call_has_its_own_choice(tuned):
    tuned(loss="MaskedCrossEntropy", shape=(4, 8), flag="torch:eager")
    config = MaskedCrossEntropyConfig()
    loss = config.build(backend="torch")
    calls = [(4, torch.float32), (64, torch.float32), (4, torch.float64), (4, torch.float32)]
    seen = [_ran(loss, config, lead=(rows,), vocab=8, dtype=dtype) for rows, dtype in calls]
    assert seen == ["torch:eager", "torch:plain", "torch:plain", "torch:eager"]
    # Sizes are rounded to powers of two.
    choice = loss.kernel_for(CPU, torch.float32, (5, 9))
    assert choice.flag == "torch:eager"
    assert "--tune" in choice.reason


def test_a_measurement_with_other_threads_is_not_used(tuned):
    tuned(loss="MaskedCrossEntropy", shape=(4, 8), flag="torch:eager")
    loss, threads = MaskedCrossEntropyConfig().build(backend="torch"), torch.get_num_threads()
    assert loss.kernel_for(CPU, torch.float32, (4, 8)).flag == "torch:eager"
    torch.set_num_threads(threads + 1)
    try:
        assert loss.kernel_for(CPU, torch.float32, (4, 8)).flag == "torch:plain"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not COMPILE.usable, reason=COMPILE.reason)
def test_a_compiling_kernel_is_chosen_only_where_it_was_measured(tuned):
    tuned(loss="MaskedCrossEntropy", shape=(64, 8192), flag="torch:compile")
    loss = MaskedCrossEntropyConfig().build(backend="torch")
    assert "compile" in loss.kernel_choice.candidates
    assert loss.kernel_for(CPU, torch.float32, (64, 8192)).flag == "torch:compile"
    assert loss.kernel_for(CPU, torch.bfloat16, (64, 8192)).flag == "torch:eager"
    assert loss.kernel_for(CPU, torch.float32, (640, 8192)).flag == "torch:eager"
    # The fused loss has no such kernel, whatever is stored.
    assert "compile" not in FusedLinearCEConfig().build(backend="torch").kernel_choice.candidates


def test_each_loss_is_looked_up_by_its_own_shape(tuned):
    tuned(loss="FusedLinearCrossEntropy", shape=(4, 8, 16), flag="torch:eager")
    tuned(loss="KDLoss", shape=(4, 8), flag="torch:eager")
    for config in (FusedLinearCEConfig(), KDLossConfig()):
        loss = config.build(backend="torch")
        assert _ran(loss, config, lead=(2, 2), vocab=8, hidden=16) == "torch:eager"
        assert _ran(loss, config, lead=(4,), vocab=64, hidden=16) == "torch:plain"
        if takes(config, "lm_weight"):
            assert _ran(loss, config, lead=(4,), vocab=8, hidden=64) == "torch:plain"


def test_an_unusable_kernel_is_not_chosen(tuned):
    tuned(loss="FusedLinearCrossEntropy", shape=(4, 8, 16), flag="torch:te")
    config = FusedLinearCEConfig()
    assert _ran(config.build(backend="torch"), config, lead=(4,), vocab=8, hidden=16) == "torch:plain"


# --- errors and traces


def test_bad_input_gets_the_usual_error(tuned):
    loss = MaskedCrossEntropyConfig().build(backend="torch")
    with pytest.raises(TypeError, match=r"logits must be a torch\.Tensor"):
        loss([1.0], torch.arange(1))
    with pytest.raises(ValueError, match="at least one dimension"):
        loss(torch.tensor(1.0), torch.arange(1))


def test_a_graph_uses_the_default_choice(tuned):
    loss = MaskedCrossEntropyConfig().build(backend="torch")
    logits, labels = torch.randn(4, 8), torch.arange(4)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(logits, labels), loss(logits, labels))
    torch._dynamo.reset()


def test_the_choice_and_its_reason_are_reported():
    choice = KDLossConfig().build().kernel_choice
    assert choice.flag == "torch:eager"
    assert "examples/benchmarks" in choice.reason
    assert KDLossConfig().build(backend="torch:eager").kernel_choice.reason == "named by the flag"
