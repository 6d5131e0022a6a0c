"""`torch:compile`: few compilations, independence of the caller's state, and usability with and without a compiler."""

import os
import re
import subprocess
import sys
import sysconfig
import threading
from itertools import product
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from helpers.torch_calls import assert_same, run
from loss_core import BackendUnavailable, FusedLinearCEConfig, KDLossConfig, MaskedCrossEntropyConfig
from loss_core.dispatch.flags import flag_status
from loss_core_torch.kernels.compiled import programs

FLAG = "torch:compile"
ROOT = Path(__file__).parents[4]

needs_compiler = pytest.mark.skipif(not programs.status().usable, reason=programs.status().reason)
compiles = [needs_compiler, pytest.mark.slow]


def compiled(function):
    """Decorator of a test that compiles."""
    for mark in compiles:
        function = mark(function)
    return function


def _programs():
    return counters["stats"]["unique_graphs"]


def _results(loss, logits, labels, **more):
    return run(loss, {"logits": logits.detach().clone().requires_grad_(), "labels": labels, **more}, 1.0)


# --- programs


@compiled
def test_two_programs_serve_any_number_of_tokens_and_classes():
    loss, before = MaskedCrossEntropyConfig().build(backend=FLAG), _programs()
    # Also T = V, which must not fix T = V for later calls; and rows of more than 4096.
    sizes = [(37, 37), (2, 2), (5, 4096), (3, 4097), (4097, 3), *((t, 11) for t in range(2, 40)), (7, 9000)]
    # A single row or class, no row.
    sizes += [(1, 9), (9, 1), (0, 5), (1, 1)]
    with torch.no_grad():
        for tokens, vocab in sizes:
            logits = torch.randn(tokens, vocab)
            labels = torch.arange(tokens) % vocab
            expected = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum")
            for layout in (logits, logits.t().contiguous().t(), logits.repeat(1, 2)[:, :vocab].contiguous()):
                torch.testing.assert_close(loss(layout, labels).double(), expected, rtol=1e-6, atol=1e-6)
    # requires_grad needs no other program.
    MaskedCrossEntropyConfig(reduction="none").build(backend=FLAG)(logits.requires_grad_(), labels)
    assert _programs() - before <= 2


@compiled
def test_switches_of_the_process_cost_no_program():
    """With a program for each state, the ninth call would fail: torch.compile gives up after eight."""
    arguments = {
        "student_logits": torch.randn(4, 37, requires_grad=True),
        "teacher_logits": torch.randn(4, 37),
        "labels": torch.arange(4),
    }
    loss, matmul = KDLossConfig().build(backend=FLAG), torch.backends.cuda.matmul
    expected, before = run(loss, arguments, 1.0), _programs()
    switches = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction", "fp32_precision")
    kept = {name: getattr(matmul, name) for name in switches}
    try:
        for *states, is_deterministic in product((True, False), (True, False), ("ieee", "tf32"), (True, False)):
            torch.use_deterministic_algorithms(is_deterministic)
            for name, state in zip(switches, states, strict=True):
                setattr(matmul, name, state)
            assert_same(run(loss, arguments, 1.0), expected, rtol=0, atol=0)
    finally:
        torch.use_deterministic_algorithms(False)
        for name, state in kept.items():
            setattr(matmul, name, state)
    assert _programs() == before


@compiled
def test_a_temperature_costs_no_program_and_a_number_of_threads_one():
    student, teacher, labels = torch.randn(4, 37), torch.randn(4, 37), torch.arange(4)
    threads = torch.get_num_threads()

    def call(temperature):
        with torch.no_grad():
            KDLossConfig(temperature=temperature).build(backend=FLAG)(student, teacher, labels)

    call(1.0)
    before = _programs()
    for temperature in (0.5, 2.0, 3.0):
        call(temperature)
    assert _programs() == before
    try:
        torch.set_num_threads(threads + 1)
        call(1.0)
    finally:
        torch.set_num_threads(threads)
    call(1.0)
    assert _programs() == before + 1


def _plus_one(x):
    return x + 1


@compiled
def test_the_recompile_limit_raises():
    with torch._dynamo.config.patch(recompile_limit=1):
        programs.run(_plus_one, torch.randn(3, 4))
        # Other dtypes count separately.
        programs.run(_plus_one, torch.randn(3, 4, dtype=torch.float64))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            programs.run(_plus_one, torch.randn(1, 4))


# --- independence of the caller's state


@compiled
def test_inside_the_callers_graph_it_is_an_operator():
    logits, labels = torch.randn(2, 3, 37), torch.tensor([[1, -100, 3], [0, 36, 2]])
    for reduction in ("mean", "none"):
        loss = MaskedCrossEntropyConfig(reduction=reduction).build(backend=FLAG)
        traced = torch.compile(loss, fullgraph=True, backend="aot_eager")
        assert_same(_results(traced, logits, labels), _results(loss, logits, labels), rtol=1e-6, atol=1e-7)
    torch._dynamo.reset()


@compiled
def test_after_the_callers_reset_in_inference_mode_and_under_torch_func():
    logits, labels = torch.randn(4, 37), torch.tensor([1, 2, -100, 3])
    loss = MaskedCrossEntropyConfig().build(backend=FLAG)
    found = _results(loss, logits, labels)
    torch._dynamo.reset()
    assert_same(_results(loss, logits, labels), found, rtol=0, atol=0)
    with torch.inference_mode():
        assert torch.equal(loss(logits, labels), found["loss"])
        assert torch.equal(loss(logits.clone(), labels), found["loss"])
    assert torch.equal(torch.func.grad(lambda z: loss(z, labels))(logits), found["logits"])
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(_results(loss, logits, labels), found, rtol=0, atol=0)


@compiled
def test_a_first_call_in_a_dispatch_mode():
    logits, labels = torch.randn(4, 37, requires_grad=True), torch.tensor([1, 2, -100, 3])
    # No other test compiles for this z_loss.
    config = MaskedCrossEntropyConfig(z_loss=0.0123)
    with FlopCounterMode(display=False):
        loss = config.build(backend=FLAG)(logits, labels)
        loss.backward()
    expected = config.build(backend="torch:eager")(logits, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(logits.grad, torch.autograd.grad(expected, logits)[0], rtol=1e-5, atol=1e-7)


@compiled
def test_first_calls_in_several_threads():
    # A dtype that no other test of this file has compiled for.
    logits, labels = torch.randn(5, 37, dtype=torch.float16), torch.arange(5)
    loss = MaskedCrossEntropyConfig().build(backend=FLAG)
    found = []
    threads = [threading.Thread(target=lambda: found.append(_results(loss, logits, labels))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    for other in found[1:]:
        assert_same(other, found[0], rtol=0, atol=0)


# --- the flag


@needs_compiler
def test_the_fused_loss_is_unavailable_with_advice():
    with pytest.raises(BackendUnavailable, match=r"'torch:compile' has no kernel for FusedLinearCEConfig.*torch:eager"):
        FusedLinearCEConfig().build(backend=FLAG)


def _run_with(variables, code):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "backends"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, **variables}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


PRINT_STATUS = """
import sys
from loss_core import BackendUnavailable, MaskedCrossEntropyConfig
from loss_core.dispatch.flags import flag_status
status = flag_status("torch:compile")
assert MaskedCrossEntropyConfig().build(backend="torch").kernel_choice.flag == "torch:eager"
assert "torch._inductor.compile_fx" not in sys.modules, "the status compiled, or imported the compiler"
try:
    MaskedCrossEntropyConfig().build(backend="torch:compile")
except BackendUnavailable as error:
    assert str(error) == status.reason
print(status.usable, status.reason)
"""


def test_without_a_compiler_the_flag_reports_what_it_needs(monkeypatch):
    output = _run_with({"CXX": "", "PATH": "/nowhere"}, PRINT_STATUS)
    assert re.match(r"False 'torch:compile' needs a C\+\+ compiler, and '.+' is not found: .* CXX", output)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "'no-such-compiler' is not found" in flag_status(FLAG).reason
    monkeypatch.undo()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "/nowhere")
    assert "no Python.h in /nowhere" in flag_status(FLAG).reason


@needs_compiler
def test_with_a_compiler_it_is_usable_and_the_status_compiles_nothing():
    assert _run_with({}, PRINT_STATUS).startswith("True")
    assert flag_status(FLAG).version.startswith("torch ")
