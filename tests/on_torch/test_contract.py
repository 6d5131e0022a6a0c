"""The contract of every loss on torch, beyond what `check` compares: errors, graphs, layouts, dtypes, traces."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from helpers.torch_calls import (
    assert_same,
    built,
    cells,
    configs,
    count_of,
    every_dtype,
    inputs,
    leaves,
    over_hidden_states,
    per_token,
    reduction_of,
    run,
    takes,
    weights_of,
)
from loss_core import KDLossConfig, MaskedCrossEntropyConfig
from loss_core_torch import FusedLinearCrossEntropy, KDLoss, MaskedCrossEntropy, TEParallelCrossEntropy

# V = vocabulary, H = hidden
V, H = 11, 5
FLAGS = ["torch:plain", "torch:eager"]
every_loss = cells(configs(), FLAGS)
every_sum = cells([config for config in configs(["sum"]) if count_of(config, 1)], FLAGS)


# --- results


@every_loss
@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (1, 2, 3), (0,), (2, 0)], ids=str)
def test_any_leading_dimensions(flag, config, lead):
    arguments = inputs(config, lead)
    found = run(built(config, flag), arguments)
    assert found["loss"].shape == (lead if reduction_of(config) == "none" else ())
    for name, leaf in leaves(arguments).items():
        assert found[name].shape == leaf.shape
        assert found[name].isfinite().all()


@every_loss
def test_all_ignored_is_a_connected_zero(flag, config):
    arguments = inputs(config)
    arguments["labels"].fill_(config.ignore_index)
    loss_fn = built(config, flag)
    assert loss_fn(**arguments).requires_grad
    assert not any(x.any() for x in run(loss_fn, arguments).values())


@every_sum
@pytest.mark.parametrize("count", [0, torch.tensor(0), 4, torch.tensor(4), torch.tensor(4.0), 2.5], ids=repr)
def test_counts(flag, config, count):
    arguments, loss_fn = inputs(config), built(config, flag)
    found = run(loss_fn, arguments | count_of(config, count))
    if float(count) == 0:
        assert not any(x.any() for x in found.values())
    else:
        total = run(loss_fn, arguments | count_of(config, 1))
        assert_same(found, {name: x / float(count) for name, x in total.items()})


@pytest.mark.parametrize("flag", FLAGS)
def test_zero_count_wins_over_an_infinite_loss(flag):
    loss_fn = MaskedCrossEntropyConfig().build(backend=flag)
    for count in (0, torch.tensor(0)):
        arguments = {"logits": torch.tensor([[0.0, -torch.inf]], requires_grad=True), "labels": torch.tensor([1])}
        assert not any(x.any() for x in run(loss_fn, arguments | {"num_label_tokens": count}).values())


@every_dtype
@every_loss
def test_result_and_gradient_dtypes(flag, config, dtype):
    arguments = inputs(config, dtype=dtype)
    found = run(built(config, flag), arguments)
    assert found.pop("loss").dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(grad.dtype == dtype for grad in found.values())


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("make", [MaskedCrossEntropyConfig, KDLossConfig])
def test_without_upcast_the_result_has_the_dtype_of_the_logits(flag, make):
    config = make(fp32_upcast=False)
    assert built(config, flag)(**inputs(config, dtype=torch.bfloat16)).dtype == torch.bfloat16


@every_loss
def test_deterministic(flag, config):
    loss_fn = built(config, flag)
    assert_same(run(loss_fn, inputs(config)), run(loss_fn, inputs(config)), rtol=0, atol=0)


# --- gradients


@every_sum
def test_backward_twice_gives_the_same(flag, config):
    arguments = inputs(config)
    loss, wanted = built(config, flag)(**arguments).sum() * 0.5, list(leaves(arguments).values())
    first = [grad.clone() for grad in torch.autograd.grad(loss, wanted, retain_graph=True)]
    torch.testing.assert_close(torch.autograd.grad(loss, wanted), tuple(first), rtol=1e-6, atol=1e-7)


@cells(configs(), ["torch:eager"])
def test_second_derivative_is_refused_with_advice(flag, config):
    arguments = inputs(config)
    loss = built(config, flag)(**arguments).sum() * torch.ones((), requires_grad=True)
    grads = torch.autograd.grad(loss, list(leaves(arguments).values()), create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='torch:plain'"):
        sum(grad.sum() for grad in grads).backward()


WEIGHTED = [config for config in configs(["sum"]) if takes(config, "loss_weights")]


@cells([config for config in WEIGHTED if hasattr(config, "reduction")], FLAGS)
def test_the_gradient_of_loss_weights_is_the_loss_of_each_token(flag, config):
    arguments = inputs(config)
    weights = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    found = run(built(config, flag), arguments | {"loss_weights": weights}, 1.0)
    per_token = type(config)(reduction="none").build(backend=flag)(**arguments)
    assert found["loss_weights"].dtype == torch.float64
    torch.testing.assert_close(found["loss_weights"], per_token.detach().double(), rtol=1e-6, atol=1e-6)


@cells(WEIGHTED, FLAGS)
def test_the_gradient_of_loss_weights_is_differentiable_or_refused(flag, config):
    # It depends on every other input: a second derivative must be right or raise.
    arguments = inputs(config)
    weights = torch.rand(2, 3, requires_grad=True)
    loss = built(config, flag)(**arguments, **weights_of(config, weights))
    (grad,) = torch.autograd.grad(loss, weights, create_graph=True)
    wanted = list(leaves(arguments).values())
    if flag == "torch:eager" and over_hidden_states(config):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(grad.sum(), wanted)
        return
    mixed = torch.autograd.grad(grad.sum(), wanted)
    torch.testing.assert_close(mixed, torch.autograd.grad(built(config, flag)(**arguments), wanted))


# --- inputs


@every_loss
def test_inputs_are_never_changed_and_may_be_views(flag, config):
    arguments, loss_fn = inputs(config, (2, 4)), built(config, flag)
    views = {n: x[:, :-1] if per_token(config, n) else x for n, x in arguments.items()}
    before = {name: (x.detach().clone(), x._version) for name, x in arguments.items()}
    loss = loss_fn(**views)
    loss.sum().backward()
    for name, x in arguments.items():
        assert torch.equal(x.detach(), before[name][0])
        assert x._version == before[name][1]
    dense = {name: x.detach().contiguous().requires_grad_(x.requires_grad) for name, x in views.items()}
    torch.testing.assert_close(loss_fn(**dense), loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("flag", FLAGS)
def test_transposed_logits(flag):
    loss_fn = MaskedCrossEntropyConfig().build(backend=flag)
    logits, labels = torch.randn(V, 3, 2).permute(2, 1, 0), torch.randint(0, V, (2, 3))
    expected = F.cross_entropy(logits.reshape(-1, V), labels.reshape(-1), reduction="sum")
    torch.testing.assert_close(loss_fn(logits, labels), expected)
    part, labels = logits[:, :2, ::2], labels[:, :2] % 6
    expected = F.cross_entropy(part.reshape(-1, 6), labels.reshape(-1), reduction="sum")
    torch.testing.assert_close(loss_fn(part, labels), expected)


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32], ids=str)
def test_labels_of_any_width(flag, dtype):
    loss_fn, logits, labels = (
        MaskedCrossEntropyConfig().build(backend=flag),
        torch.randn(4, V),
        torch.tensor([0, 3, 10, 5]),
    )
    torch.testing.assert_close(loss_fn(logits, labels.to(dtype)), loss_fn(logits, labels), rtol=0, atol=0)


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize(
    "mask", [torch.tensor([1, 0, 1]), torch.tensor([True, False, True]), torch.tensor([0.5, 0.0, 2.0])], ids=repr
)
def test_masks_of_any_dtype_broadcast(flag, mask):
    loss_fn = MaskedCrossEntropyConfig().build(backend=flag)
    logits, labels = torch.randn(2, 3, V), torch.randint(0, V, (2, 3))
    kept = labels.masked_fill(torch.tensor([False, True, False]), -100)
    torch.testing.assert_close(loss_fn(logits, labels, mask), loss_fn(logits, kept))


@every_loss
def test_nan_in_ignored_tokens_has_no_effect(flag, config):
    arguments = inputs(config)
    ignored = arguments["labels"] == config.ignore_index
    clean = run(built(config, flag), arguments)
    of_tokens = [name for name in leaves(arguments) if per_token(config, name)]
    for name in of_tokens:
        arguments[name].data[ignored] = torch.nan
    found = run(built(config, flag), arguments)
    assert_same(found, clean, rtol=1e-6, atol=1e-7)
    assert not any(found[name][ignored].any() for name in of_tokens)


# --- autocast and traces


@cells([config for config in configs() if over_hidden_states(config)], FLAGS)
def test_autocast_rounds_the_operands_and_nothing_else(flag, config):
    arguments, loss_fn = inputs(config), built(config, flag)
    operands = ("hidden_states", "lm_weight")
    rounded = {k: x.detach().bfloat16().float().requires_grad_() if k.endswith(operands) else x
               for k, x in arguments.items()}  # fmt: skip

    def forward(**arguments):
        # The backward runs outside of autocast, as PyTorch recommends.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_fn(**arguments)

    found = run(forward, arguments)
    assert all(x.dtype == torch.float32 for x in found.values())
    expected = run(loss_fn, rounded)
    assert_same(found, expected, rtol=0, atol=0)


@cells([config for config in configs() if not over_hidden_states(config)], FLAGS)
def test_autocast_does_not_affect_losses_over_logits(flag, config):
    arguments, loss_fn = inputs(config), built(config, flag)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(loss_fn, arguments)
    assert_same(inside, run(loss_fn, arguments), rtol=0, atol=0)


@pytest.mark.slow
@cells(configs(), ["torch:eager"])
def test_torch_compile_fullgraph(flag, config):
    arguments, loss_fn = inputs(config), built(config, flag)
    # aot_eager traces forward and backward as the default does, without the minutes of a C++ compiler.
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, arguments), run(loss_fn, arguments))
    torch._dynamo.reset()


@cells([config for config in configs() if takes(config, "label")], FLAGS)
def test_invalid_labels_give_nan_where_they_are_not_readable(flag, config):
    arguments = inputs(config, (3,), ignored=0)
    labels, floats = torch.tensor([1, V, 2]), {name: x.detach() for name, x in leaves(arguments).items()}

    def step(labels, *values):
        made = {name: x.detach().requires_grad_() for name, x in zip(floats, values, strict=True)}
        return tuple(run(built(config, flag), made | {"labels": labels}, 1.0).values())

    loss, *grads = make_fx(step)(labels, *floats.values())(labels, *floats.values())
    assert loss.isnan().tolist() == ([False, True, False] if reduction_of(config) == "none" else True)
    # torch:plain keeps NaN out of the weight, and so out of both gradients.
    if flag != "torch:plain" or not takes(config, "lm_weight"):
        assert grads[0].isnan().any(-1).tolist() == [False, True, False]


# --- objects


@pytest.mark.parametrize("flag", FLAGS)
def test_repr_pickle_and_deepcopy(flag):
    module = MaskedCrossEntropyConfig(reduction="mean").build(backend=flag)
    assert "reduction='mean'" in repr(module)
    assert flag in repr(module)
    arguments = inputs(MaskedCrossEntropyConfig(reduction="mean"))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert (twin.reduction, twin.kernel_choice) == ("mean", module.kernel_choice)
        assert_same(run(twin, arguments), run(module, arguments), rtol=0, atol=0)


# --- errors


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
