"""The contract of every loss on torch, beyond what `check` compares: errors, graphs, layouts, dtypes, traces."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loss_core import FusedLinearCEConfig, KDLossConfig, MaskedCrossEntropyConfig, TEParallelCEConfig
from loss_core.check import check
from loss_core_torch import (
    FusedLinearCrossEntropy,
    KDLoss,
    MaskedCrossEntropy,
    TEParallelCrossEntropy,
    eager,
    kernels,
    values,
)
from loss_core_torch.products import Products

T, V, H = 6, 11, 5
CONFIGS = {
    "masked": MaskedCrossEntropyConfig(),
    "parallel": TEParallelCEConfig(),
    "fused": FusedLinearCEConfig(),
    "kd": KDLossConfig(),
}
REDUCED = [
    MaskedCrossEntropyConfig(reduction=r) if name == "masked" else
    TEParallelCEConfig(reduction=r) if name == "parallel" else FusedLinearCEConfig(reduction=r)
    for name in ("masked", "parallel", "fused") for r in ("sum", "mean", "none")
] + [KDLossConfig()]  # fmt: skip


def _ids(config):
    return f"{type(config).__name__}-{getattr(config, 'reduction', 'kd')}"


def _inputs(config, lead=(2, 3), dtype=torch.float32, seed=0):
    """Keyword arguments, floats requiring gradients; one label in three ignored."""
    g = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=g).to(dtype).requires_grad_()

    labels = torch.randint(0, V, lead, generator=g)
    labels.view(-1)[::3] = config.ignore_index
    if isinstance(config, FusedLinearCEConfig):
        return {"hidden_states": leaf(*lead, H), "labels": labels, "lm_weight": leaf(V, H)}
    if isinstance(config, KDLossConfig):
        return {"student_logits": leaf(*lead, V), "teacher_logits": leaf(*lead, V), "labels": labels}
    return {"logits": leaf(*lead, V), "labels": labels}


def _leaves(inputs):
    return [value for value in inputs.values() if value.requires_grad]


@pytest.mark.parametrize("config", REDUCED, ids=_ids)
@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (1, 2, 3), (0,), (2, 0)])
def test_any_leading_dimensions(config, lead):
    inputs = _inputs(config, lead)
    loss = config.build()(**inputs)
    assert loss.shape == (lead if getattr(config, "reduction", "") == "none" else ())
    loss.sum().backward()
    assert all(leaf.grad.shape == leaf.shape and leaf.grad.isfinite().all() for leaf in _leaves(inputs))


@pytest.mark.parametrize("config", REDUCED, ids=_ids)
def test_all_ignored_is_a_connected_zero(config):
    inputs = _inputs(config)
    inputs["labels"].fill_(config.ignore_index)
    loss = config.build()(**inputs)
    assert loss.requires_grad
    assert not loss.any()
    loss.sum().backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in _leaves(inputs))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("count", [0, torch.tensor(0), 4, torch.tensor(4), torch.tensor(4.0), 2.5])
def test_counts(config, count):
    name = "num_batch_labels" if isinstance(config, KDLossConfig) else "num_label_tokens"
    inputs = _inputs(config)
    loss = config.build()(**inputs, **{name: count})
    loss.backward()
    if float(count) == 0:
        assert loss.item() == 0
        assert not any(leaf.grad.any() for leaf in _leaves(inputs))
    else:
        total = config.build()(**inputs, **({name: 1} if isinstance(config, KDLossConfig) else {}))
        torch.testing.assert_close(loss, total / float(count))


def test_zero_count_wins_over_an_infinite_loss():
    logits = torch.tensor([[0.0, -torch.inf]], requires_grad=True)
    for count in (0, torch.tensor(0)):
        loss = MaskedCrossEntropy()(logits, torch.tensor([1]), num_label_tokens=count)
        assert loss.item() == 0
        (grad,) = torch.autograd.grad(loss, logits)
        assert not grad.any()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_backward_twice_gives_the_same(config):
    inputs = _inputs(config)
    loss = config.build()(**inputs) * 0.5
    first = [grad.clone() for grad in torch.autograd.grad(loss, _leaves(inputs), retain_graph=True)]
    second = torch.autograd.grad(loss, _leaves(inputs))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_second_derivative_is_refused_with_advice(config):
    inputs = _inputs(config)
    weight = torch.ones((), requires_grad=True)
    loss = config.build()(**inputs) * weight
    grads = torch.autograd.grad(loss, _leaves(inputs), create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*Use .*(cross_entropy|kl_div)"):
        sum(grad.sum() for grad in grads).backward()


@pytest.mark.parametrize("name", ["masked", "parallel", "fused"])
def test_the_gradient_of_loss_weights_is_no_constant(name):
    # It is the loss of each token, which depends on every other input: differentiated again it must say so.
    inputs = _inputs(CONFIGS[name])
    weights = torch.rand(2, 3, requires_grad=True)
    loss = CONFIGS[name].build()(**inputs, loss_weights=weights)
    (grad,) = torch.autograd.grad(loss, weights, create_graph=True)
    if name == "fused":
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(grad.sum(), _leaves(inputs))
        return
    (mixed,) = torch.autograd.grad(grad.sum(), _leaves(inputs))
    (plain,) = torch.autograd.grad(CONFIGS[name].build()(**inputs), _leaves(inputs))
    torch.testing.assert_close(mixed, plain)


@pytest.mark.parametrize("config", REDUCED, ids=_ids)
def test_inputs_are_never_changed_and_may_be_views(config):
    inputs = _inputs(config, (2, 4))
    views = {name: value if name == "lm_weight" else value[:, :-1] for name, value in inputs.items()}
    before = {name: value.detach().clone() for name, value in inputs.items()}
    versions = {name: value._version for name, value in inputs.items()}
    loss = config.build()(**views)
    loss.sum().backward()
    for name, value in inputs.items():
        assert torch.equal(value.detach(), before[name])
        assert value._version == versions[name]
    dense = {name: value.detach().contiguous().requires_grad_(value.requires_grad) for name, value in views.items()}
    torch.testing.assert_close(config.build()(**dense), loss, rtol=0, atol=0)


def test_student_and_teacher_may_differ_in_layout():
    base = torch.randn(2, 5, V)
    student, teacher, labels = base[:, :-1], torch.randn(2, 4, V), torch.randint(0, V, (2, 4))
    expected = KDLoss()(student.contiguous(), teacher, labels)
    torch.testing.assert_close(KDLoss()(student, teacher, labels), expected, rtol=0, atol=0)
    torch.testing.assert_close(
        KDLoss()(teacher, student, labels), KDLoss()(teacher, student.contiguous(), labels), rtol=0, atol=0
    )
    leaf = base.clone().requires_grad_()
    KDLoss()(leaf[:, :-1], teacher, labels).backward()
    dense = student.detach().contiguous().requires_grad_()
    KDLoss()(dense, teacher, labels).backward()
    torch.testing.assert_close(leaf.grad[:, :-1], dense.grad, rtol=0, atol=0)


def test_an_empty_part_of_the_vocabulary_is_the_identity():
    labels = torch.tensor([0, 1])
    state = eager.cross_entropy_stats(torch.empty(2, 0), labels, 5)
    assert [part.tolist() for part in state] == [[-torch.inf] * 2, [0.0] * 2, [-torch.inf] * 2]
    keep = torch.ones(2, dtype=torch.bool)
    state = eager.distillation_stats(torch.empty(2, 0), torch.empty(2, 0), keep, 1.0, 0)
    assert [part[0].item() for part in state] == [-torch.inf, 0.0, 0.0, -torch.inf, 0.0]


def test_transposed_logits():
    base = torch.randn(V, 3, 2)
    logits = base.permute(2, 1, 0).requires_grad_()
    labels = torch.randint(0, V, (2, 3))
    expected = F.cross_entropy(logits.reshape(-1, V), labels.reshape(-1), reduction="sum")
    torch.testing.assert_close(MaskedCrossEntropy()(logits, labels), expected)
    torch.testing.assert_close(MaskedCrossEntropy()(logits[:, :2, ::2], labels[:, :2] % 6),
                               F.cross_entropy(logits[:, :2, ::2].reshape(-1, 6), (labels[:, :2] % 6).reshape(-1),
                                               reduction="sum"))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_width(dtype):
    logits = torch.randn(4, V)
    labels = torch.tensor([0, 3, 10, 5])
    torch.testing.assert_close(
        MaskedCrossEntropy()(logits, labels.to(dtype)), MaskedCrossEntropy()(logits, labels), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    "mask", [torch.tensor([1, 0, 1]), torch.tensor([True, False, True]), torch.tensor([0.5, 0.0, 2.0])]
)
def test_masks_of_any_dtype_broadcast(mask):
    logits, labels = torch.randn(2, 3, V), torch.randint(0, V, (2, 3))
    kept = labels.masked_fill(torch.tensor([False, True, False]), -100)
    torch.testing.assert_close(MaskedCrossEntropy()(logits, labels, mask), MaskedCrossEntropy()(logits, kept))


def test_nan_hidden_states_where_ignored_touch_nothing():
    hidden = torch.randn(3, H)
    hidden[1] = torch.nan
    hidden.requires_grad_()
    weight = torch.randn(V, H, requires_grad=True)
    loss = FusedLinearCrossEntropy()(hidden, torch.tensor([1, -100, 2]), weight)
    loss.backward()
    assert loss.isfinite()
    assert weight.grad.isfinite().all()
    assert not hidden.grad[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("config", REDUCED, ids=_ids)
def test_result_and_gradient_dtypes(config, dtype):
    inputs = _inputs(config, dtype=dtype)
    loss = config.build()(**inputs)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    loss.sum().backward()
    assert all(leaf.grad.dtype == dtype for leaf in _leaves(inputs))


@pytest.mark.parametrize("make", [MaskedCrossEntropyConfig, KDLossConfig])
def test_without_upcast_the_result_has_the_dtype_of_the_logits(make):
    config = make(fp32_upcast=False)
    assert config.build()(**_inputs(config, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("config", [FusedLinearCEConfig(), FusedLinearCEConfig(reduction="none")], ids=_ids)
def test_autocast_rounds_the_operands_and_nothing_else(config):
    inputs = _inputs(config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = config.build()(**inputs)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    rounded = {k: v.detach().bfloat16().float().requires_grad_() if v.requires_grad else v for k, v in inputs.items()}
    expected = config.build()(**rounded)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    expected.sum().backward()
    for name in ("hidden_states", "lm_weight"):
        assert inputs[name].grad.dtype == torch.float32
        torch.testing.assert_close(inputs[name].grad, rounded[name].grad, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["masked", "kd"])
def test_autocast_leaves_losses_over_logits_alone(name):
    config = CONFIGS[name]
    inputs = _inputs(config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = config.build()(**inputs)
    torch.testing.assert_close(inside, config.build()(**inputs), rtol=0, atol=0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_deterministic(config):
    def run():
        inputs = _inputs(config)
        loss = config.build()(**inputs)
        return [loss, *torch.autograd.grad(loss, _leaves(inputs))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("config", REDUCED, ids=_ids)
def test_torch_compile_fullgraph(config):
    inputs = _inputs(config)
    module = config.build()
    expected = module(**inputs)
    grads = torch.autograd.grad(expected.sum(), _leaves(inputs))
    # aot_eager traces forward and backward as the default does, without the minutes of a C++ compiler.
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got = compiled(**inputs)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got.sum(), _leaves(inputs)), grads, strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


def test_out_of_range_labels_are_nan_under_a_trace():
    logits = torch.randn(3, V, requires_grad=True)
    labels = torch.tensor([1, V, 2])
    compiled = torch.compile(MaskedCrossEntropy(reduction="none"), fullgraph=True, backend="aot_eager")
    loss = compiled(logits, labels)
    assert loss.isnan().tolist() == [False, True, False]
    loss.sum().backward()
    assert logits.grad.isnan().any(-1).tolist() == [False, True, False]
    student = torch.randn(3, V, requires_grad=True)
    torch.compile(KDLoss(), fullgraph=True, backend="aot_eager")(student, torch.randn(3, V), labels).backward()
    assert student.grad.isnan().all(-1).tolist() == [False, True, False]
    fused = torch.compile(FusedLinearCrossEntropy(), fullgraph=True, backend="aot_eager")
    assert fused(torch.randn(3, H), labels, torch.randn(V, H)).isnan()
    torch._dynamo.reset()


def test_torch_func_grad():
    logits, labels = torch.randn(4, V), torch.tensor([1, 2, -100, 3])
    got = torch.func.grad(lambda z: MaskedCrossEntropy()(z, labels))(logits)
    leaf = logits.clone().requires_grad_()
    MaskedCrossEntropy()(leaf, labels).backward()
    torch.testing.assert_close(got, leaf.grad, rtol=0, atol=0)


def test_forward_only_makes_no_gradient_buffers(monkeypatch):

    seen = []
    real = eager.linear_cross_entropy
    monkeypatch.setattr(eager, "linear_cross_entropy", lambda *args: seen.append(args[7]) or real(*args))
    inputs = _inputs(FusedLinearCEConfig())
    with torch.no_grad():
        FusedLinearCrossEntropy()(**inputs)
    frozen = {**inputs, "hidden_states": inputs["hidden_states"].detach()}
    FusedLinearCrossEntropy()(**frozen)
    assert seen == [[False, False], [False, True]]


def test_ignored_tokens_take_part_in_no_product(monkeypatch):
    rows = []
    real = Products.into
    monkeypatch.setattr(Products, "into", lambda self, z, a, b: rows.append(a.shape[0]) or real(self, z, a, b))
    labels = torch.full((40,), -100)
    labels[::8] = 1
    FusedLinearCrossEntropy()(torch.randn(40, H), labels, torch.randn(V, H))
    assert sum(rows) == 5


def test_fused_loss_holds_no_logits():
    # 4096 x 20000 float32 logits are 328 MB; a block's budget is 64 MiB.
    peak = _peak_of_allocations(lambda: FusedLinearCrossEntropy()(torch.randn(4096, 8), torch.zeros(4096).long(),
                                                                  torch.randn(20000, 8)))  # fmt: skip
    assert peak < 68 << 20


def test_kd_and_cross_entropy_keep_no_float32_copy():
    logits = torch.randn(512, 20000).bfloat16()  # 20 MB; in float32 41 MB
    labels = torch.zeros(512).long()
    peak = _peak_of_allocations(lambda: MaskedCrossEntropy()(logits, labels))
    assert peak < 12 << 20
    peak = _peak_of_allocations(lambda: KDLoss()(logits, logits, labels))
    assert peak < 24 << 20


def _peak_of_allocations(run):
    """Most bytes that torch's CPU allocator held at once during a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak > 0
    return peak


def test_repr_pickle_and_deepcopy():
    module = MaskedCrossEntropyConfig(reduction="mean").build(backend="torch:eager")
    assert "reduction='mean'" in repr(module)
    assert "torch:eager" in repr(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert (twin.reduction, twin.kernel_choice) == ("mean", module.kernel_choice)


def test_another_process_finds_the_kernels_of_a_pickled_module(monkeypatch):
    module = MaskedCrossEntropyConfig().build(backend="torch:eager")
    module._kernel = kernels.load("compile")
    stored = pickle.dumps(module)
    monkeypatch.delitem(kernels._LOADED, "compile")
    pickle.loads(stored)
    assert kernels.find("compile").__name__ == "loss_core_torch.compile_set"


def test_auto_says_what_it_chose_and_why():
    choice = KDLossConfig().build().kernel_choice
    assert choice.flag == "torch:eager"
    assert choice.reason
    assert KDLossConfig().build(backend="torch:eager").kernel_choice.reason == "named by the flag"


def test_the_path_of_devices_whose_values_stay_there(monkeypatch):
    # What an accelerator runs: no skipping of ignored tokens, no look at labels or at the upstream gradient.
    monkeypatch.setattr(values, "may_read", lambda x: False)
    report = check(backends=["torch:eager"], dtypes=["float32", "bfloat16"])
    assert report.passed, str(report)
    loss = MaskedCrossEntropy(reduction="none")(torch.randn(3, V), torch.tensor([1, V, -100]))
    assert loss.isnan().tolist() == [False, True, False]


LOGITS, LABELS = torch.randn(4, 7, V), torch.zeros(4, 7, dtype=torch.long)
HIDDEN, WEIGHT = torch.randn(4, 7, H), torch.randn(V, H)
BAD_CALLS = {
    "labels-shape": (
        lambda: MaskedCrossEntropy()(LOGITS, LABELS[:, :6]),
        ValueError,
        r"labels has shape \(4, 6\) but logits has leading shape \(4, 7\); they must match",
    ),
    "labels-flat": (lambda: KDLoss()(LOGITS, LOGITS, LABELS.view(-1)), ValueError, r"\(28,\).*\(4, 7\)"),
    "labels-float": (lambda: MaskedCrossEntropy()(LOGITS, LABELS.float()), TypeError, "integers of any width.*float32"),
    "labels-bool": (lambda: KDLoss()(LOGITS, LOGITS, LABELS.bool()), TypeError, "torch.bool"),
    "labels-none": (lambda: MaskedCrossEntropy()(LOGITS, None), TypeError, "labels must be a torch.Tensor, got None"),
    "label-too-large": (
        lambda: MaskedCrossEntropy()(LOGITS, LABELS.index_fill(1, torch.tensor([2]), 11)),
        ValueError,
        r"labels\[0, 2\] is 11, which is neither a class in \[0, 11\) nor ignore_index \(-100\)",
    ),
    "label-negative": (
        lambda: FusedLinearCrossEntropy(ignore_index=0)(HIDDEN, LABELS - 1, WEIGHT),
        ValueError,
        r"labels\[0, 0\] is -1",
    ),
    "kd-label": (lambda: KDLoss()(LOGITS, LOGITS, LABELS + 11), ValueError, r"labels\[0, 0\] is 11"),
    "mask-shape": (
        lambda: MaskedCrossEntropy()(LOGITS, LABELS, mask=torch.ones(28)),
        ValueError,
        r"mask.shape == labels.shape",
    ),
    "count-mean": (
        lambda: MaskedCrossEntropy(reduction="mean")(LOGITS, LABELS, num_label_tokens=3),
        ValueError,
        "num_label_tokens is only supported when reduction is 'sum'",
    ),
    "count-vector": (
        lambda: MaskedCrossEntropy()(LOGITS, LABELS, num_label_tokens=torch.tensor([3])),
        ValueError,
        "0-d tensor",
    ),
    "count-negative": (lambda: MaskedCrossEntropy()(LOGITS, LABELS, num_label_tokens=-1), ValueError, ">= 0, got -1"),
    "count-text": (lambda: MaskedCrossEntropy()(LOGITS, LABELS, num_label_tokens="3"), TypeError, "got str"),
    "weights-mean": (
        lambda: TEParallelCrossEntropy(reduction="mean")(LOGITS, LABELS, loss_weights=torch.ones(4, 7)),
        ValueError,
        "loss_weights is only supported when reduction is 'sum'",
    ),
    "weights-shape": (
        lambda: FusedLinearCrossEntropy()(HIDDEN, LABELS, WEIGHT, loss_weights=torch.ones(28)),
        ValueError,
        r"loss_weights has shape \(28,\) but labels has shape \(4, 7\)",
    ),
    "hidden-size": (
        lambda: FusedLinearCrossEntropy()(HIDDEN, LABELS, WEIGHT[:, 1:]),
        ValueError,
        r"\(11, 4\).*\(4, 7, 5\).*H = 5",
    ),
    "weight-dtype": (
        lambda: FusedLinearCrossEntropy()(HIDDEN, LABELS, WEIGHT.bfloat16()),
        TypeError,
        "float32.*bfloat16.*autocast",
    ),
    "kd-shapes": (lambda: KDLoss()(LOGITS, LOGITS[..., 1:], LABELS), ValueError, r"\(4, 7, 11\).*\(4, 7, 10\)"),
    "logits-int": (lambda: MaskedCrossEntropy()(LABELS, LABELS), TypeError, "logits must be float32.*int64"),
    "logits-numpy": (lambda: MaskedCrossEntropy()(np.zeros((2, 3)), LABELS), TypeError, "got ndarray"),
    "group": (lambda: TEParallelCrossEntropy(tp_group="tp")(LOGITS, LABELS), ValueError, "not initialised"),
    "reduction": (lambda: MaskedCrossEntropy(reduction="avg"), ValueError, "^Invalid reduction: 'avg'"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_gets_a_clear_error(name):
    call, kind, text = BAD_CALLS[name]
    with pytest.raises(kind, match=text):
        call()


def test_loss_weights_get_their_gradient_everywhere():
    for config in (MaskedCrossEntropyConfig(), FusedLinearCEConfig(), TEParallelCEConfig()):
        inputs = _inputs(config)
        weights = torch.rand(2, 3, dtype=torch.float64).requires_grad_()
        config.build()(**inputs, loss_weights=weights).backward()
        none = type(config)(reduction="none").build()(**inputs)
        assert weights.grad.dtype == torch.float64
        torch.testing.assert_close(weights.grad, none.detach().double(), rtol=1e-6, atol=1e-6)
