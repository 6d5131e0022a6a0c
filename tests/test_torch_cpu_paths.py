"""The short cuts of torch:eager on a CPU (one pass, exp2, huge pages, ordinary calls), where each could go wrong."""

import mmap

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loss_core import FusedLinearCEConfig, KDLossConfig, MaskedCrossEntropyConfig
from loss_core_torch import (
    checks,
    eager_distillation,
    eager_linear,
    eager_logits,
    huge_pages,
    ordinary,
    row_blocks,
)

T, V, H = 6, 33, 8


def _inputs(config, dtype=torch.float32):
    torch.manual_seed(0)
    if isinstance(config, FusedLinearCEConfig):
        floats = {"hidden_states": torch.randn(T, H), "lm_weight": torch.randn(V, H)}
    elif isinstance(config, KDLossConfig):
        floats = {"student_logits": torch.randn(T, V), "teacher_logits": torch.randn(T, V)}
    else:
        floats = {"logits": torch.randn(T, V)}
    return {name: x.to(dtype).requires_grad_() for name, x in floats.items()} | {"labels": torch.arange(T)}


CONFIGS = [MaskedCrossEntropyConfig(), MaskedCrossEntropyConfig(reduction="mean"), KDLossConfig(),
           FusedLinearCEConfig(reduction="mean")]  # fmt: skip


@pytest.mark.parametrize("small", [0, 1 << 19])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_an_ordinary_call_gives_what_the_checked_one_gives(config, small, monkeypatch):
    monkeypatch.setattr(ordinary, "_SMALL", small)

    def run(**change):
        inputs = _inputs(config)
        loss = config.build()(**inputs | change)
        loss.backward()
        return [loss.detach(), *(x.grad for x in inputs.values() if x.requires_grad)]

    expected = run(labels=torch.arange(T, dtype=torch.int32))  # no ordinary call
    monkeypatch.setattr(checks, "tokens", None)  # the long way would fail
    # F.cross_entropy makes p as exp(log p): log p, of at most 16 here, is rounded first, which is 16 u = 1e-6.
    rtol = 1e-6 if small else 3e-7
    for got, wanted in zip(run(), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=rtol, atol=0)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ordinary_evaluation_gives_what_the_checked_one_gives(reduction, dtype, monkeypatch):
    monkeypatch.setattr(ordinary, "_SMALL", 0)
    loss = MaskedCrossEntropyConfig(reduction=reduction, fp32_upcast=False).build()
    logits, labels = torch.randn(T, V, dtype=dtype, requires_grad=True), torch.arange(T)
    with torch.no_grad():
        checked = loss(logits, labels, mask=torch.ones(T))  # no ordinary call
        monkeypatch.setattr(checks, "tokens", None)  # the long way would fail
        for given in (logits, logits.detach()):
            got = loss(given, labels)
            assert not got.requires_grad
            assert got.dtype == dtype
            assert torch.equal(got, checked)


def test_which_calls_are_small(monkeypatch):
    seen = []
    real = ordinary.F.cross_entropy
    monkeypatch.setattr(
        ordinary.F, "cross_entropy", lambda *args, **kw: seen.append(args[0].shape) or real(*args, **kw)
    )
    mean, labels = MaskedCrossEntropyConfig(reduction="mean", ignore_index=2).build(), torch.tensor([[0, 1], [3, 0]])
    logits = torch.randn(2, 3, 4)[:, :-1].requires_grad_()
    mean(logits, labels).backward()
    with torch.no_grad():
        mean(logits, labels)
    assert seen == [(4, 4)] * 2
    # Other dtypes would be rounded in between; labels are ignored; the call is large.
    mean(logits.bfloat16(), labels)
    mean(logits, labels.masked_fill(labels == 0, 2))
    MaskedCrossEntropyConfig(reduction="none").build()(logits, labels)
    monkeypatch.setattr(ordinary, "_SMALL", 15)
    MaskedCrossEntropyConfig().build()(logits, labels)
    assert len(seen) == 2


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_an_ordinary_call_notices_what_is_none(config):
    inputs = _inputs(config)
    with pytest.raises(ValueError, match=r"labels\[5\] is 33"):
        config.build()(**inputs | {"labels": torch.tensor([0, 1, 2, 3, 4, V])})
    ignored = type(config)(ignore_index=3).build()(**inputs)
    other = type(config)().build()(**inputs | {"labels": torch.tensor([0, 1, 2, -100, 4, 5])})
    torch.testing.assert_close(ignored, other, rtol=0, atol=0)


@pytest.mark.parametrize("config", [MaskedCrossEntropyConfig(), KDLossConfig()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_infinite_upstream_leaves_ignored_rows_at_zero(config, dtype):
    inputs = _inputs(config, dtype)
    inputs["labels"][2] = -100
    loss = config.build()(**inputs)
    (grad, *_) = torch.autograd.grad(loss, [x for x in inputs.values() if x.requires_grad], torch.tensor(torch.inf))
    assert not grad[2].any()
    assert not grad[1].isfinite().any()


@pytest.mark.parametrize("scale", [1e7, 1e12, 1e30])
def test_logits_too_large_for_a_rounded_product(scale):
    # z log2(e) rounded before the maximum is taken off: above 2^24 the difference has no digits left.
    logits = torch.tensor([[scale, scale, -scale, 0.0]], requires_grad=True)
    loss = MaskedCrossEntropyConfig().build()(logits, torch.tensor([1]))
    loss.backward()
    torch.testing.assert_close(loss.item(), float(np.log(2.0)), rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5, -0.5, 0.0, 0.0]]), rtol=1e-6, atol=0)
    student, teacher = torch.tensor([[scale, scale, 0.0]], requires_grad=True), torch.tensor([[scale, 0.0, 0.0]])
    kl = KDLossConfig().build()(student, teacher, torch.tensor([0]))
    torch.testing.assert_close(kl.item(), float(np.log(2.0)), rtol=1e-6, atol=0)


def test_a_row_does_not_depend_on_the_block_it_is_in(monkeypatch):
    logits, labels = torch.randn(12, 507), torch.arange(12)

    def grad():
        leaf = logits.clone().requires_grad_()
        MaskedCrossEntropyConfig().build()(leaf, labels).backward()
        return leaf.grad

    whole = grad()
    monkeypatch.setattr(row_blocks, "_BLOCK_ELEMENTS_CPU", 507 * 5)
    assert torch.equal(grad(), whole)


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made, views of the inputs left aside."""

    def __init__(self, inputs):
        super().__init__()
        self.size, self.given = 0, {x.untyped_storage().data_ptr() for x in inputs}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in self.given:
            self.size = max(self.size, result.nbytes)
        return result


def test_evaluation_makes_no_tensor_of_tokens_times_vocabulary():
    tokens, vocab = 300, 8000
    labels = torch.zeros(tokens, dtype=torch.int64)
    logits, hidden, weight = torch.randn(tokens, vocab), torch.randn(tokens, H), torch.randn(vocab, H)
    calls = [
        (MaskedCrossEntropyConfig(), (logits, labels)),
        (KDLossConfig(), (logits, logits * 2, labels)),
        (FusedLinearCEConfig(), (hidden, labels, weight)),
        (FusedLinearCEConfig(logit_softcapping=5.0, reduction="none"), (hidden, labels, weight)),
    ]
    for config, inputs in calls:
        with torch.no_grad(), _Largest(inputs) as largest:
            config.build()(*inputs)
        assert 0 < largest.size < tokens * vocab * 4 / 2, config


@pytest.mark.parametrize(("hidden", "mebibytes"), [(64, 48), (512, 48), (1024, 96), (4096, 384), (65536, 512)])
def test_a_block_of_a_large_vocabulary_keeps_to_its_budget(hidden, mebibytes):
    tokens = eager_linear.block_tokens(128256, hidden, torch.device("cpu"), 4)
    assert tokens > 64
    assert tokens * 128256 * 4 <= mebibytes << 20 < (tokens + 32) * 128256 * 4


@pytest.mark.parametrize("config", [MaskedCrossEntropyConfig(), KDLossConfig()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_do_not_count_are_not_looked_at(config, dtype, monkeypatch):
    seen = []
    real = row_blocks.log2_exp

    def log2_exp(z_BV, *rest):
        seen.append(z_BV.shape[0])
        return real(z_BV, *rest)

    for module in (eager_logits, eager_distillation):
        monkeypatch.setattr(module, "log2_exp", log2_exp)
    monkeypatch.setattr(ordinary, "_SMALL", 0)
    # Three rows a block.
    monkeypatch.setattr(row_blocks, "_BLOCK_ELEMENTS_CPU", (6 if isinstance(config, KDLossConfig) else 3) * V)
    sides = 2 if isinstance(config, KDLossConfig) else 1
    labels = torch.tensor([3, -100, -100, -100, -100, -100, -100, 5, 7, 7, 0, -100])

    def run(rows):
        torch.manual_seed(1)
        logits = [torch.randn(12, V).to(dtype) for _ in range(sides)]
        for x in logits:
            x[labels == -100] = torch.nan
        logits = [x[rows] for x in logits]
        logits[0].requires_grad_()
        loss = config.build(backend="torch:eager")
        with torch.no_grad():
            evaluated = loss(*logits, labels[rows])
        result = loss(*logits, labels[rows])
        (grad,) = torch.autograd.grad(result, logits[:1])
        return result.detach(), evaluated, grad

    loss, evaluated, grad = run(slice(None))
    assert sum(seen) == 5 * 2 * sides  # evaluation, and loss and gradient together
    counted = labels != -100
    for got, wanted in zip((loss, evaluated, grad[counted]), run(counted), strict=True):
        torch.testing.assert_close(got, wanted, rtol=3e-7, atol=0)
    assert not grad[~counted].any()
    assert all(not value for value in (run(~counted)[0], run(~counted)[2].any()))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_ignored_rows_of_a_slice_may_hold_nan(reduction):
    logits = torch.randn(2, 4, V)
    logits[:, 1] = torch.nan
    labels = torch.tensor([[3, -100, 5], [7, -100, 0]])
    logits.requires_grad_()
    loss = MaskedCrossEntropyConfig(reduction=reduction).build(backend="torch:eager")(logits[:, :-1], labels)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[:, 1].any()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="huge pages are Linux's")
def test_only_large_results_are_advised_and_only_their_own_pages(monkeypatch):
    calls = []
    monkeypatch.setattr(huge_pages, "_madvise", lambda: lambda *args: calls.append(args))
    cpu = torch.device("cpu")
    huge_pages.empty(torch.Size([1 << 20]), torch.float32, cpu)
    assert calls == []
    x = huge_pages.empty(torch.Size([(8 << 20) + 3]), torch.float32, cpu)
    ((start, length, advice),) = calls
    assert advice == mmap.MADV_HUGEPAGE
    assert start % mmap.PAGESIZE == length % mmap.PAGESIZE == 0
    assert x.data_ptr() <= start
    assert start + length <= x.data_ptr() + x.nbytes
    assert x.nbytes - length < 2 * mmap.PAGESIZE


@pytest.mark.parametrize(
    ("named", "features", "wanted"),
    [
        ("", [], True),
        ("", ["0110010"], False),
        ("", ["0000000", "0110010"], False),
        ("", ["0110"], True),
        ("1", ["0110010"], True),
        ("0", [], False),
    ],
)
def test_huge_pages_are_left_to_machines_that_keep_their_memory(named, features, wanted, monkeypatch, tmp_path):
    for number, bits in enumerate(features):
        (tmp_path / f"virtio{number}").mkdir()
        (tmp_path / f"virtio{number}" / "features").write_text(bits + "\n")
    monkeypatch.setattr(huge_pages, "_BALLOONS", tmp_path)
    monkeypatch.setenv(huge_pages.VARIABLE, named)
    assert huge_pages._wanted() == wanted


def test_a_wrong_value_of_the_variable_is_told(monkeypatch):
    monkeypatch.setenv(huge_pages.VARIABLE, "yes")
    with pytest.raises(ValueError, match="LOSS_CORE_HUGE_PAGES must be 0 or 1, got 'yes'"):
        huge_pages._wanted()
