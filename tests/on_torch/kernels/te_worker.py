"""Tests of `torch:te` with TE's own sources on a CPU; run as a script by test_te.py, in a separate process.

Usage: te_worker.py one | te_worker.py overwriting | te_worker.py RANK WORLD_SIZE FOLDER | te_worker.py compiled

Prints a line for each scenario, passed or failed, and continues after a failure.
"""

import importlib
import re
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from loss_core import BackendUnavailable, MaskedCrossEntropyConfig, TEParallelCEConfig
from loss_core.check import check
from loss_core.dispatch.flags import flag_status
from loss_core.dispatch.observed import observing
from loss_core.losses.cases.drawing import named_cases, random_cases
from loss_core.row_terms import OPTIONS, CrossEntropy
from loss_core_torch.kernels import Rows, te
from on_torch.kernels import te_on_cpu
from worker_exit import leave_after

V = 11
# TEParallelCrossEntropy uses the same code.
LOSSES = ["MaskedCrossEntropy"]
DTYPES = ["float32", "bfloat16"]


def _none(**fields):
    return MaskedCrossEntropyConfig(reduction="none", **fields).build(backend="torch:te")


def _agrees(logits, labels):
    """Compare per-token loss and gradient with F.cross_entropy in float64, for different upstream gradients."""
    leaf = logits.detach().requires_grad_()  # the same memory, so the same strides
    before = leaf.detach().clone()
    loss = _none()(leaf, labels)
    upstream = torch.linspace(-2, 3, loss.numel()).view(loss.shape)
    (grad,) = torch.autograd.grad(loss, leaf, upstream)
    wide = before.double().requires_grad_()
    expected = F.cross_entropy(wide.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="none")
    (wanted,) = torch.autograd.grad(expected.view(loss.shape), wide, upstream.double())
    torch.testing.assert_close(loss.double(), expected.view(loss.shape), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(leaf, before), "the logits were changed"


# --- one process


def every_case_against_the_oracle():
    report = check(LOSSES, ["torch:te"], dtypes=DTYPES, num_random=6, seed=3)
    assert report.passed, str(report)
    # No case was skipped silently: unsupported options are reported.
    num_cases = {(row.loss, row.dtype): row.cases for row in report.rows}
    drawn = {loss: [*named_cases(loss), *random_cases(loss, 6, 3)] for loss in LOSSES}
    supported = {loss: sum(not _is_unsupported(case.config) for case in cases) for loss, cases in drawn.items()}
    assert num_cases == {(loss, dtype): supported[loss] for loss in LOSSES for dtype in DTYPES}
    assert all(re.search(r"'torch:te' has no \w+, got ", note) for note in report.skipped)
    assert report.skipped


def _is_unsupported(config):
    """Whether a config sets an option that TE does not support."""
    return any(getattr(config, name) for name in (*OPTIONS, "logit_softcapping") if name != "label_smoothing")


def the_flag_runs_te():
    module = sys.modules["transformer_engine.pytorch.cross_entropy"]
    kernels = module.triton_cross_entropy
    calls = []

    def counted(name):
        plain = getattr(kernels, name)
        return lambda *args, **kwargs: (calls.append(name), plain(*args, **kwargs))[1]

    with pytest.MonkeyPatch.context() as patch:
        for name in ("cross_entropy_forward", "cross_entropy_backward"):
            patch.setattr(kernels, name, counted(name))
        loss = TEParallelCEConfig().build(backend="torch:te")
        assert loss.kernel_choice.flag == "torch:te"
        with observing() as seen:
            loss(torch.randn(2, V, requires_grad=True), torch.tensor([1, 2])).backward()
    assert list(seen) == ["torch:te"]
    assert calls == ["cross_entropy_forward", "cross_entropy_backward"]


def any_leading_dimensions_and_strides():
    for lead in [(), (1,), (6,), (2, 3), (1, 2, 3), (2, 1, 2, 2)]:
        _agrees(torch.randn(*lead, V), torch.randint(0, V, lead))
    labels = torch.randint(0, V, (3, 4))
    _agrees(torch.randn(3, 5, V)[:, :-1], labels)  # rows of TE 2734: the stride of a batch is not S times that of a row
    _agrees(torch.randn(3, 5, V)[:, 1:], labels)
    _agrees(torch.randn(3, 4, 2 * V)[..., ::2], labels)
    _agrees(torch.randn(V, 4, 3).permute(2, 1, 0), labels)
    _agrees(torch.randn(4, V).expand(3, 4, V), labels)
    _agrees(torch.randn(2, 3, 5, V)[:, :, :-1], torch.randint(0, V, (2, 3, 4)))


def empty_input():
    for lead in [(0,), (2, 0), (0, 3)]:
        for reduction in ("none", "sum", "mean"):
            logits = torch.randn(*lead, V, requires_grad=True)
            loss = TEParallelCEConfig(reduction=reduction).build(backend="torch:te")(
                logits, torch.zeros(lead, dtype=torch.long)
            )
            assert loss.shape == (lead if reduction == "none" else ())
            loss.sum().backward()
            assert logits.grad.shape == logits.shape


def all_ignored_is_a_connected_zero():
    for reduction in ("none", "sum", "mean"):
        for ignore_index in (-100, 3):
            logits = torch.full((4, V), torch.nan, requires_grad=True)
            config = MaskedCrossEntropyConfig(ignore_index=ignore_index, reduction=reduction)
            loss = config.build(backend="torch:te")(logits, torch.full((4,), ignore_index))
            loss.sum().backward()
            assert not loss.any()
            assert not logits.grad.any()


def ignored_rows_have_zero_gradient_for_any_upstream_gradient():
    logits = torch.randn(4, V)
    logits[1] = torch.nan
    logits.requires_grad_()
    labels = torch.tensor([2, -100, 5, 1])
    loss = _none()(logits, labels, mask=torch.tensor([1, 1, 0, 1]))
    (grad,) = torch.autograd.grad(loss, logits, torch.tensor([0.5, torch.nan, torch.inf, 2.0]))
    assert not loss[1:3].any()
    assert not grad[1:3].any()
    torch.testing.assert_close(grad[0], 0.5 * (logits[0].softmax(-1) - F.one_hot(labels[0], V)))


def an_invalid_label():
    logits = torch.randn(3, V)
    with pytest.raises(ValueError, match=r"labels\[1\] is 11, which is neither a class"):
        _none()(logits, torch.tensor([1, V, -100]))
    # Where values can't be read, as on a GPU, invalid labels reach the kernels, and the caller makes their tokens NaN.
    # -100 is an invalid label here as well.
    for bad in (V, V + 10**9, -1, -100):
        leaf = logits.clone().requires_grad_()
        rows = Rows(leaf, torch.tensor([1, bad, 7]), torch.tensor([True, True, False]))
        (loss_T,) = te.KERNELS.values(rows, CrossEntropy(V))
        (loss_T * torch.tensor([1.0, torch.nan, 1.0])).sum().backward()
        torch.testing.assert_close(loss_T[0], F.cross_entropy(logits[0], torch.tensor(1)))
        assert leaf.grad.isnan().all(-1).tolist() == [False, True, False]
        assert not leaf.grad[2].any()


def backward_twice():
    logits = torch.randn(2, 3, V, requires_grad=True)
    loss = _none()(logits, torch.randint(0, V, (2, 3)))
    upstream = torch.randn(2, 3)
    first, second = (torch.autograd.grad(loss, logits, upstream, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (third,) = torch.autograd.grad(loss, logits, 2 * upstream)
    torch.testing.assert_close(third, 2 * first)


def no_second_derivative():
    logits = torch.randn(2, V, requires_grad=True)
    loss = TEParallelCEConfig().build(backend="torch:te")(logits, torch.tensor([1, 2]))
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='torch:plain'"):
        grad.sum().backward()


def te_buffers_are_freed_by_the_backward():
    # A training loop keeps its loss until the next step; it must not keep a copy of the logits alive.
    logits = torch.randn(2, V, requires_grad=True)
    (loss_T,) = te.KERNELS.values(Rows(logits, torch.tensor([1, 2]), None), CrossEntropy(V))
    assert loss_T.grad_fn.run is not None
    loss_T.sum().backward()
    assert loss_T.grad_fn.run is None
    with torch.no_grad():
        assert _none()(logits, torch.tensor([1, 2])).grad_fn is None


def compile_breaks_its_graph_only_here():
    logits, labels = torch.randn(2, V, requires_grad=True), torch.tensor([1, 2])
    loss = TEParallelCEConfig().build(backend="torch:te")
    compiled = torch.compile(loss, backend="eager")(logits, labels)
    assert torch.equal(compiled, loss(logits, labels))
    compiled.backward()
    assert torch.equal(logits.grad, torch.autograd.grad(loss(logits, labels), logits)[0])
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"TELosses\.values"):
        torch.compile(loss, backend="eager", fullgraph=True)(logits, labels)


def dtypes_that_te_does_not_accept():
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(BackendUnavailable, match=rf"takes float32 and bfloat16 logits, got {dtype}: use"):
            _none()(torch.randn(2, V).to(dtype), torch.tensor([1, 2]))
    rows = Rows(torch.randn(2, V, device="meta"), torch.zeros(2, dtype=torch.long, device="meta"), None)
    with pytest.raises(BackendUnavailable, match="takes logits on a CUDA device, got meta"):
        te.KERNELS.values(rows, CrossEntropy(V))
    report = check(LOSSES, ["torch:te"], dtypes=["float32", "float16"], only=["basic"])
    assert [row.dtype for row in report.rows] == ["float32"]
    assert "got torch.float16" in report.skipped[0]


def a_first_block_of_minus_inf_gives_nan():
    # The limit that te.py's docstring states: TE's kernels subtract -inf from -inf there.
    logits = torch.full((1, 32768 + 5), -torch.inf)
    logits[0, -5:] = 1.0
    assert _none()(logits, torch.tensor([32768])).isnan().all()
    logits[0, 0] = -1e4  # the workaround: a finite number
    torch.testing.assert_close(_none()(logits, torch.tensor([32768])), torch.tensor([5.0]).log())


class _StandIn(torch.autograd.Function):
    """Stand-in with the signature and the behaviour of Transformer Engine 2.5 to 2.7; not its code.

    As in these versions, forward overwrites the logits with their gradient, rounded to their dtype; backward scales it
    in place by the first upstream gradient, and returns one gradient too few if ignore_idx is passed; rows are read
    with the stride of the second to last dimension.
    """

    @staticmethod
    def forward(ctx, _input, target, label_smoothing=0.0, reduce_loss=False, dist_process_group=None, ignore_idx=-100):
        sequences, tokens, vocab = _input.shape
        rows = torch.as_strided(_input, (sequences * tokens, vocab), (_input.stride(-2), 1), _input.storage_offset())
        keep = (target != ignore_idx).view(-1, 1)
        labels = torch.where(keep, target.view(-1, 1), 0)
        lse = rows.float().logsumexp(-1, keepdim=True)
        target_logit, rest = rows.float().gather(1, labels), 1 - label_smoothing
        smoothed = rest * target_logit + (
            label_smoothing * rows.float().mean(1, keepdim=True) if label_smoothing else 0
        )
        loss = torch.where(keep, lse - smoothed, 0.0)
        grad = (rows.float() - lse).exp() - label_smoothing / vocab
        grad = grad.scatter_add(1, labels, torch.full_like(loss, -rest))
        rows.copy_(torch.where(keep, grad, 0.0))
        ctx.save_for_backward(_input.detach())
        return loss.view(sequences, tokens)

    @staticmethod
    def backward(ctx, grad_output):
        (buffer,) = ctx.saved_tensors
        buffer.mul_(grad_output.reshape(-1)[0])
        return buffer, None, None, None, None


def te_is_detected_to_overwrite_its_input():
    assert te.find_entry() == te.Entry(_StandIn.apply, preserves=False)
    report = check(LOSSES, ["torch:te"], dtypes=DTYPES)
    assert report.passed, str(report)


def versions_that_are_too_old():
    for version in ("1.13.0", "2.4.0+abc"):
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            metadata = Path(folder, f"transformer_engine-{version}.dist-info", "METADATA")
            metadata.parent.mkdir()
            metadata.write_text(f"Metadata-Version: 2.1\nName: transformer_engine\nVersion: {version}\n")
            patch.syspath_prepend(folder)
            status = flag_status("torch:te")
        assert not status.usable
        assert f"needs transformer_engine >= 2.5, found {version}: pip install 'loss-core[te]'" in status.reason
    assert flag_status("torch:te").usable


ONE = (
    every_case_against_the_oracle,
    the_flag_runs_te,
    any_leading_dimensions_and_strides,
    empty_input,
    all_ignored_is_a_connected_zero,
    ignored_rows_have_zero_gradient_for_any_upstream_gradient,
    an_invalid_label,
    backward_twice,
    no_second_derivative,
    te_buffers_are_freed_by_the_backward,
    compile_breaks_its_graph_only_here,
    dtypes_that_te_does_not_accept,
    a_first_block_of_minus_inf_gives_nan,
    versions_that_are_too_old,
)

# With the stand-in for an old TE instead of the installed one.
OVERWRITING = (
    te_is_detected_to_overwrite_its_input,
    any_leading_dimensions_and_strides,
    ignored_rows_have_zero_gradient_for_any_upstream_gradient,
    an_invalid_label,
    backward_twice,
    te_buffers_are_freed_by_the_backward,
)


# --- one process per shard of the vocabulary


def _sharded(make, dtype):
    """Compare loss and gradient of this rank's shard with F.cross_entropy over the full vocabulary in float64."""
    torch.manual_seed(0)
    full = torch.randn(3, 2, dist.get_world_size() * V).to(dtype)
    labels = torch.randint(0, full.shape[-1], (3, 2))
    labels[0, 1] = -100
    part = slice(dist.get_rank() * V, (dist.get_rank() + 1) * V)
    for reduction in ("sum", "mean", "none"):
        logits = full[..., part].clone().requires_grad_()
        loss = make(reduction=reduction, tp_group=dist.group.WORLD).build(backend="torch:te")(logits, labels)
        wide = full.double().requires_grad_()
        expected = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction=reduction).view(loss.shape)
        upstream = torch.linspace(0.5, 2, loss.numel(), dtype=torch.float64).view(loss.shape)
        (wanted,) = torch.autograd.grad(expected, wide, upstream)
        (grad,) = torch.autograd.grad(loss, logits, upstream.float())
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
        # Rounded once, to half a unit in the last place.
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(grad.double(), wanted[..., part], rtol=step, atol=1e-6)


def vocabulary_sharded_float32():
    _sharded(MaskedCrossEntropyConfig, torch.float32)


def vocabulary_sharded_bfloat16():
    _sharded(TEParallelCEConfig, torch.bfloat16)


def backward_twice_sharded():
    torch.manual_seed(0)
    logits = torch.randn(3, V)
    labels = torch.tensor([0, 2 * V - 1, -100])
    logits.requires_grad_()
    loss = TEParallelCEConfig(tp_group=dist.group.WORLD).build(backend="torch:te")(logits, labels)
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, logits)[0])


def uneven_shards_are_refused():
    loss_fn = TEParallelCEConfig(tp_group=dist.group.WORLD).build(backend="torch:te")
    with pytest.raises(ValueError, match="'torch:te' needs the vocabulary in equal shards"):
        loss_fn(torch.randn(3, 4 + dist.get_rank()), torch.tensor([0, 1, 2]))


RANKS = (vocabulary_sharded_float32, vocabulary_sharded_bfloat16, backward_twice_sharded, uneven_shards_are_refused)


# --- compiled, not run


def stores_round_to_nearest_on_a_gpu():
    """Why te_on_cpu patches the interpreter's float32 to bfloat16: compiled code rounds to nearest."""
    triton = importlib.import_module("triton")
    compiler = importlib.import_module("triton.compiler")
    from transformer_engine.common.triton.cross_entropy import cross_entropy_backward_kernel as kernel
    from triton.backends.compiler import GPUTarget

    pointers = dict.fromkeys(("Y_ptr", "n_non_ignore_ptr"), "*i64") | {"saved_input_ptr": "*bf16"}
    constants = {"reduce_loss": False, "label_smoothing": 0.0, "BLOCK_SIZE": 1024}
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    source = compiler.ASTSource(kernel, signature=signature, constexprs=constants)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 32}).asm["ptx"]
    assert "cvt.rn.bf16" in ptx


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if sys.argv[1] == "compiled":
        te_on_cpu.enter()
        return _run_scenarios([stores_round_to_nearest_on_a_gpu])
    module = te_on_cpu.load()
    if sys.argv[1] == "one":
        return _run_scenarios(ONE)
    if sys.argv[1] == "overwriting":
        module.parallel_cross_entropy = _StandIn.apply
        return _run_scenarios(OVERWRITING)
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=(Path(folder) / "store").as_uri(), rank=rank, world_size=ranks)
    try:
        return _run_scenarios(RANKS)
    finally:
        dist.destroy_process_group()


def _run_scenarios(scenarios):
    for scenario in scenarios:
        try:
            scenario()
        # pytest.fail raises a BaseException.
        except (Exception, pytest.fail.Exception):
            print(f"failed: {scenario.__name__}\n{traceback.format_exc()}", flush=True)
        else:
            print("passed:", scenario.__name__, flush=True)
    return 0


if __name__ == "__main__":
    leave_after(main)
