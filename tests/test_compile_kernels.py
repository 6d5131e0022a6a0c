"""`torch:compile`: right to the last rounding, compiled few times, and in nobody's way."""

import functools
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile

from loss_core import BackendUnavailable, FusedLinearCEConfig, KDLossConfig, MaskedCrossEntropyConfig, row_stats
from loss_core.backend import flag_status
from loss_core.check import check
from loss_core_torch import compile_set, compiled, eager

FLAG = "torch:compile"
ROOT = Path(__file__).parent.parent
LOGITS_LOSSES = ["MaskedCrossEntropy", "TEParallelCrossEntropy", "KDLoss"]

pytestmark = pytest.mark.skipif(not compiled.status().usable, reason=compiled.status().reason)


def _programs():
    return counters["stats"]["unique_graphs"]


def _loss_and_grad(loss, logits, labels, **more):
    leaf = logits.detach().clone().requires_grad_()
    value = loss(leaf, labels, **more)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), grad


# --- numbers


def test_within_what_rounding_explains():
    report = check(LOGITS_LOSSES, [FLAG], dtypes=["float32"])
    assert report.passed, str(report)
    assert all(row.cases >= 15 for row in report.rows)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(dtype):
    report = check(LOGITS_LOSSES, [FLAG], dtypes=[dtype], only=["basic"])
    assert report.passed, str(report)


def test_parts_of_the_vocabulary_fold_to_the_whole():
    z, teacher, labels = torch.randn(5, 40), torch.randn(5, 40), torch.tensor([0, 12, 13, 39, 7])
    keep, coef = torch.tensor([True, True, False, True, True]), torch.rand(5)
    z[0, 14:] = teacher[0, 14:] = -torch.inf
    m, s, t = eager.cross_entropy_stats(z, labels, 0)
    # The state of a row that does not count may be left out.
    every = torch.ones_like(keep)
    kd = eager.distillation_stats(z, teacher, every, 0.5, 0)
    kl = row_stats.finish_kd(torch, row_stats.KDRowState(*kd))
    states, grads, kd_states, kd_grads = [], [], [], []
    # A rank may own nothing, or one class.
    for start, stop in ((0, 13), (13, 13), (13, 14), (14, 40)):
        part, of_teacher = z[:, start:stop], teacher[:, start:stop]
        states.append(row_stats.RowState(*compile_set.cross_entropy_stats(part, labels, start)))
        grads.append(compile_set.cross_entropy_grad(part, labels, start, keep, m, s, coef))
        kd_states.append(row_stats.KDRowState(*compile_set.distillation_stats(part, of_teacher, every, 0.5, 0)))
        kd_grads.append(compile_set.distillation_grad(part, of_teacher, keep, 0.5, 0, list(kd), kl, coef, False))
    pairs = [
        (functools.reduce(functools.partial(row_stats.combine, torch), states), (m, s, t)),
        (functools.reduce(functools.partial(row_stats.combine_kd, torch), kd_states), kd),
        ((torch.cat(grads, 1),), (eager.cross_entropy_grad(z, labels, 0, keep, m, s, coef),)),
        ((torch.cat(kd_grads, 1),), (eager.distillation_grad(z, teacher, keep, 0.5, 0, list(kd), kl, coef, False),)),
    ]
    for got, wanted in pairs:
        torch.testing.assert_close(tuple(got), tuple(wanted), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("vocab", [5000, 37])
def test_rows_of_minus_infinity_alone_are_as_eager_has_them(vocab):
    logits = torch.randn(6, vocab)
    logits[1] = -torch.inf
    logits[2, 1:] = -torch.inf
    logits[3] = torch.nan
    labels = torch.tensor([1, 1, 0, -100, 4, 5])
    per_token = MaskedCrossEntropyConfig(reduction="none")
    for got, wanted in zip(
        *(_loss_and_grad(per_token.build(backend=flag), logits, labels) for flag in (FLAG, "torch:eager")), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7, equal_nan=True)


def test_the_gradient_over_the_logits_is_bitwise_the_same():
    # Many rows whose last columns fill no vector: the compiler may round these in another way.
    labels = torch.randint(0, 45, (2, 200))
    labels[:, ::3] = -100
    whole = torch.randn(2, 201, 45)
    for reduction in ("mean", "none"):
        results = []
        for inplace in (False, True):
            logits = whole.clone().requires_grad_().clone()[:, :-1]
            loss = MaskedCrossEntropyConfig(reduction=reduction, inplace_grad=inplace).build(backend=FLAG)
            value = loss(logits, labels)
            (grad,) = torch.autograd.grad(value, logits, torch.full_like(value, -2.0))
            assert not inplace or grad.data_ptr() == logits.data_ptr()
            results.append((value.detach(), grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- programs


def test_any_number_of_tokens_and_classes_is_served_by_two_programs():
    loss = MaskedCrossEntropyConfig().build(backend=FLAG)
    torch._dynamo.reset()
    compiled._program.cache_clear()
    before = _programs()
    # Also T = V, after which they must not be taken for one size; and rows of more than 4096.
    sizes = [(37, 37), (2, 2), (5, 4096), (3, 4097), (4097, 3), *((t, 11) for t in range(2, 40)), (7, 9000)]
    with torch.no_grad():
        for tokens, vocab in sizes:
            logits = torch.randn(tokens, vocab)
            labels = torch.arange(tokens) % vocab
            expected = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum")
            torch.testing.assert_close(loss(logits, labels).double(), expected, rtol=1e-6, atol=1e-6)
    # Nor is whether a gradient will be asked for another kind.
    MaskedCrossEntropyConfig(reduction="none").build(backend=FLAG)(logits.requires_grad_(), labels)
    assert _programs() - before == 2


def test_a_temperature_costs_no_program_and_a_number_of_threads_one():
    student, teacher, labels = torch.randn(4, 37), torch.randn(4, 37), torch.arange(4)
    threads = torch.get_num_threads()

    def run(temperature):
        with torch.no_grad():
            KDLossConfig(temperature=temperature).build(backend=FLAG)(student, teacher, labels)

    run(1.0)
    before = _programs()
    for temperature in (0.5, 2.0, 3.0):
        run(temperature)
    assert _programs() == before
    try:
        torch.set_num_threads(threads + 1)
        run(1.0)
    finally:
        torch.set_num_threads(threads)
    run(1.0)
    assert _programs() == before + 1


def _plus_one(x):
    return x + 1


def test_where_torch_gives_up_compiling_it_is_an_error():
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled.run(_plus_one, torch.randn(3, 4))
        # Another kind of input counts apart.
        compiled.run(_plus_one, torch.randn(3, 4, dtype=torch.float64))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            compiled.run(_plus_one, torch.randn(1, 4))


def test_a_single_row_or_class_and_scattered_columns_are_eagers(monkeypatch):
    ran = []
    monkeypatch.setattr(compile_set, "run", lambda function, *tensors: ran.append(function.__name__))
    loss = MaskedCrossEntropyConfig(reduction="none").build(backend=FLAG)
    for logits in (torch.randn(1, 9), torch.randn(9, 1), torch.randn(9, 4).T, torch.randn(0, 5), torch.randn(7)):
        labels = torch.zeros(logits.shape[:-1], dtype=torch.int64)
        expected = MaskedCrossEntropyConfig(reduction="none").build(backend="torch:eager")
        for got, wanted in zip(_loss_and_grad(loss, logits, labels), _loss_and_grad(expected, logits, labels),
                               strict=True):  # fmt: skip
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)
    assert ran == []


def _largest_allocation(call):
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    return max(event.self_cpu_memory_usage for event in profiler.events())


def _allocated(function):
    """Bytes of all tensors that a call makes, whether it frees them or not."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    return sum(max(event.nbytes(), 0) for event in events if event.name() == "[memory]")


@torch.no_grad()
def test_evaluation_makes_no_tensor_of_tokens_times_vocabulary():
    tokens, vocab = 64, 5000
    logits, labels = torch.randn(tokens, vocab), torch.zeros(tokens, dtype=torch.int64)
    ce, kd = (config.build(backend=FLAG) for config in (MaskedCrossEntropyConfig(), KDLossConfig()))
    size = tokens * vocab * 4
    assert _largest_allocation(lambda: torch.exp(logits)) >= size
    assert _largest_allocation(lambda: ce(logits, labels)) < size / 20
    assert _largest_allocation(lambda: kd(logits, logits * 1, labels)) <= size  # that of the product here


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_is_the_only_tensor_of_tokens_times_vocabulary(dtype):
    tokens, vocab = 64, 5000
    logits = torch.randn(tokens, vocab, dtype=dtype, requires_grad=True)
    labels = torch.zeros(tokens, dtype=torch.int64)
    loss = MaskedCrossEntropyConfig().build(backend=FLAG)
    loss(logits, labels).backward()
    grad_size = logits.nbytes
    assert _allocated(lambda: loss(logits, labels)) < 1.1 * grad_size
    assert _allocated(lambda: logits.float().exp()) >= tokens * vocab * 4


@pytest.mark.parametrize("largest", [0.0, 25.0, 60.0, 1e4])
@pytest.mark.parametrize("ignored", [torch.nan, -torch.inf, 0.0])
def test_a_row_whose_largest_logit_is_found_late(largest, ignored):
    torch.manual_seed(5)
    logits, labels = torch.randn(8, 5000), torch.randint(0, 4000, (8,))
    logits[3, 4900] = largest  # behind the columns that are looked at first, and not the label
    logits[4, :300] = -torch.inf
    logits[5], labels[5] = ignored, -100
    # exp(z - m) is off by 2.25 r u for r up to 64, and by what near_enough says of the sum.
    rounding = (2.25 * 64 + 50) * 2.0**-24
    for reduction in ("sum", "none"):
        loss = MaskedCrossEntropyConfig(reduction=reduction).build(backend=FLAG)
        z = logits.double()
        wanted = torch.nn.functional.cross_entropy(z.requires_grad_(), labels, reduction=reduction)
        wanted.sum().backward()
        got, grad = _loss_and_grad(loss, logits, labels)
        torch.testing.assert_close(got, wanted.float(), rtol=1e-6, atol=0)
        torch.testing.assert_close(
            grad, torch.where((labels == -100)[:, None], 0, z.grad).float(), rtol=rounding, atol=1e-30
        )
        with torch.no_grad():
            torch.testing.assert_close(loss(logits, labels), wanted.float(), rtol=1e-6, atol=0)
            in_batches = loss(logits.view(2, 4, -1), labels.view(2, 4))
            torch.testing.assert_close(in_batches, wanted.float().view(in_batches.shape), rtol=1e-6, atol=0)


# --- beside what callers do


def test_inside_the_callers_graph_it_is_an_operator():
    logits, labels = torch.randn(2, 3, 37), torch.tensor([[1, -100, 3], [0, 36, 2]])
    for config in (MaskedCrossEntropyConfig(reduction="mean"), MaskedCrossEntropyConfig(reduction="none")):
        loss = config.build(backend=FLAG)
        traced = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for got, wanted in zip(
            _loss_and_grad(traced, logits, labels), _loss_and_grad(loss, logits, labels), strict=True
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)
    torch._dynamo.reset()


@torch.no_grad()
def test_a_forward_mode_tangent_is_refused_and_not_dropped():
    loss = MaskedCrossEntropyConfig().build(backend=FLAG)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.randn(4, 5000), torch.ones(4, 5000))
        with pytest.raises(NotImplementedError, match="jvp"):
            loss(dual, torch.zeros(4, dtype=torch.int64))


def test_after_the_callers_reset_in_inference_mode_and_under_torch_func():
    logits, labels = torch.randn(4, 37), torch.tensor([1, 2, -100, 3])
    loss = MaskedCrossEntropyConfig().build(backend=FLAG)
    value, grad = _loss_and_grad(loss, logits, labels)
    torch._dynamo.reset()
    again, grad_again = _loss_and_grad(loss, logits, labels)
    assert torch.equal(value, again)
    assert torch.equal(grad, grad_again)
    with torch.inference_mode():
        assert torch.equal(loss(logits, labels), value)
        assert torch.equal(loss(logits.clone(), labels), value)
    assert torch.equal(torch.func.grad(lambda z: loss(z, labels))(logits), grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_loss_and_grad(loss, logits, labels)[1], grad)


def test_first_calls_in_several_threads():
    logits, labels = torch.randn(5, 37, dtype=torch.float64), torch.arange(5)
    loss = MaskedCrossEntropyConfig().build(backend=FLAG)
    compiled._program.cache_clear()
    found = []
    threads = [threading.Thread(target=lambda: found.append(_loss_and_grad(loss, logits, labels))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


# --- the flag


def test_the_fused_loss_says_who_serves_it():
    with pytest.raises(BackendUnavailable, match=r"'torch:compile' has no kernel for FusedLinearCEConfig.*torch:eager"):
        FusedLinearCEConfig().build(backend=FLAG)


def _without(variables, code):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "backends"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, **variables}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


SAYS = """
import sys
from loss_core import BackendUnavailable, MaskedCrossEntropyConfig
from loss_core.backend import flag_status
status = flag_status("torch:compile")
assert MaskedCrossEntropyConfig().build(backend="torch").kernel_choice.flag == "torch:eager"
assert "torch._inductor.compile_fx" not in sys.modules, "the status compiled, or made ready to"
try:
    MaskedCrossEntropyConfig().build(backend="torch:compile")
except BackendUnavailable as error:
    assert str(error) == status.reason
print(status.usable, status.reason)
"""


def test_without_a_compiler_the_flag_says_what_it_needs(monkeypatch):
    said = _without({"CXX": "", "PATH": "/nowhere"}, SAYS)
    assert re.match(r"False 'torch:compile' needs a C\+\+ compiler, and '.+' is not found: .* CXX", said)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "'no-such-compiler' is not found" in flag_status(FLAG).reason
    monkeypatch.undo()
    monkeypatch.setattr(compiled.sysconfig, "get_path", lambda name: "/nowhere")
    assert "no Python.h in /nowhere" in flag_status(FLAG).reason


def test_with_a_compiler_it_is_usable_and_nothing_is_compiled_to_find_out():
    assert _without({}, SAYS).startswith("True")
    assert flag_status(FLAG).version.startswith("torch ")
