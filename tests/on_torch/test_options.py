"""The options of all cross entropies against PyTorch's own operations, in one process and over several."""

import re

import pytest
import torch
import torch.nn.functional as F

from helpers.torch_calls import cells, configs, inputs, leaves
from loss_core import BackendUnavailable, FusedLinearCEConfig, FusedLinearLogProbsConfig, MaskedCrossEntropyConfig
from loss_core.check import check
from loss_core.row_terms import CrossEntropy
from loss_core_torch.evaluate import as_one
from loss_core_torch.kernels import Rows, te


def by_torch(config, arguments):
    logits = arguments.get("logits")
    if logits is None:
        logits = F.linear(arguments["hidden_states"], arguments["lm_weight"])
    if cap := config.logit_softcapping:
        logits = cap * torch.tanh(logits / cap)
    labels_T = arguments["labels"].flatten()
    loss_T = F.cross_entropy(
        logits.flatten(0, -2), labels_T, ignore_index=config.ignore_index, reduction="none",
        label_smoothing=config.label_smoothing,
    )  # fmt: skip
    loss_T = loss_T + (config.z_loss * logits.flatten(0, -2).logsumexp(-1) ** 2).masked_fill(
        labels_T == config.ignore_index, 0.0
    )
    if config.reduction == "none":
        return loss_T
    return loss_T.sum() / ((labels_T != config.ignore_index).sum() if config.reduction == "mean" else 1)


@pytest.mark.parametrize("minus_inf", [False, True])
@cells(
    [
        *configs(label_smoothing=0.1),
        *configs(("mean",), label_smoothing=0.9),
        *configs(z_loss=0.2),
        *configs(("none",), z_loss=1e-3, label_smoothing=0.1, logit_softcapping=2.0),
    ]
)
def test_as_in_torch(flag, config, minus_inf):
    ours, theirs = inputs(config, dtype=torch.float64), inputs(config, dtype=torch.float64)
    if config.logit_softcapping and minus_inf:
        pytest.skip("a softcap makes -inf a finite number")
    if minus_inf and "logits" in ours:
        # With smoothing, a masked class makes the loss infinite, but not the gradient.
        for arguments in (ours, theirs):
            arguments["logits"].data[..., 7] = -torch.inf
            arguments["labels"][arguments["labels"] == 7] = 3
    upstream = torch.arange(1.0, 7.0).double().sqrt() if config.reduction == "none" else torch.tensor(2.0).double()
    got, expected = config.build(backend=flag)(**ours).flatten(), by_torch(config, theirs).flatten()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    assert got.isinf().any() == (minus_inf and "logits" in ours and config.label_smoothing > 0)
    got.backward(upstream.view(-1))
    expected.backward(upstream.view(-1))
    for name, given in leaves(ours).items():
        torch.testing.assert_close(given.grad, theirs[name].grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("flag", ["torch:eager", "jax:xla"])
def test_over_ranks(flag):
    options = {"label_smoothing": 0.2, "z_loss": 0.1, "logit_softcapping": 3.0}
    losses = [MaskedCrossEntropyConfig(**options), FusedLinearCEConfig(**options)]
    report = check(losses, [flag], dtypes=["float32"], only=["basic", "edge-labels", "loss-weights"], tp=[2])
    assert report.passed, "\n".join(map(str, report.failures))
    assert [row.flag for row in report.rows] == [f"{flag} tp=2"] * len(losses)


def test_te_refuses_it_over_a_group():
    rows = Rows(torch.randn(2, 4), torch.tensor([1, 2]), None)
    with pytest.raises(BackendUnavailable, match=r"is wrong with label_smoothing over a group, got 0\.1: use"):
        te.KERNELS.values(rows, CrossEntropy(8, 0.1), object())


def test_te_has_neither_z_loss_nor_softcap():
    rows = Rows(torch.randn(2, 4), torch.tensor([1, 2]), None)
    with pytest.raises(BackendUnavailable, match=r"has no z_loss, got 0\.1: use 'torch:eager'"):
        te.KERNELS.values(rows, CrossEntropy(4, z_loss=0.1))
    with pytest.raises(BackendUnavailable, match=r"has no logit_softcapping, got 5\.0: use 'torch:eager'"):
        te.KERNELS.values(rows._replace(softcap=5.0), CrossEntropy(4))


@cells([FusedLinearCEConfig(z_loss=0.5, label_smoothing=smoothing) for smoothing in (0.0, 0.25)])
def test_a_z_loss_whose_gradient_cancels_all_probabilities(flag, config):
    # One class: lse is the logit, -1; the factor 1 + 2 l lse of every probability is 0, by which no kernel may divide.
    hidden, weight = torch.full((2, 1), 1.0, requires_grad=True), torch.full((1, 1), -1.0, requires_grad=True)
    loss = config.build(backend=flag)(hidden, torch.zeros(2, dtype=torch.int64), weight)
    loss.backward()
    assert float(loss.detach()) == 1.0  # twice l lse^2
    torch.testing.assert_close(hidden.grad, torch.full((2, 1), 1.0))  # 2 l lse times the weight
    torch.testing.assert_close(weight.grad, torch.full((1, 1), -2.0))


FUSED = [FusedLinearCEConfig(reduction="none", logit_softcapping=3.0), FusedLinearLogProbsConfig(entropy=True)]


@pytest.mark.parametrize("bias_dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@cells(FUSED)
def test_a_bias_is_added_to_the_logits(flag, config, bias_dtype):
    arguments = inputs(config, dtype=torch.float64)
    bias = torch.linspace(-2, 2, 11, dtype=bias_dtype).requires_grad_()
    hidden, weight = arguments["hidden_states"], arguments["lm_weight"]
    # As the weight of one hidden unit more, which is 1.
    wider = torch.cat([weight, bias[:, None].double()], 1)
    longer = torch.cat([hidden, torch.ones_like(hidden[..., :1])], -1)
    loss = config.build(backend=flag)
    got = as_one(loss(**arguments, lm_bias=bias))
    expected = as_one(loss(**arguments | {"hidden_states": longer, "lm_weight": wider}))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(0)).double()
    leaves_ = (hidden, weight, bias)
    for x, y in zip(*(torch.autograd.grad(result, leaves_, upstream) for result in (got, expected)), strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=1e-5 if x.dtype == torch.float32 else 1e-10, atol=1e-12)


@pytest.mark.parametrize("config", FUSED, ids=lambda config: type(config).__name__)
def test_invalid_biases(config):
    loss, arguments = config.build(backend="torch:eager"), inputs(config)
    with pytest.raises(ValueError, match=r"lm_bias has shape \(10,\) but lm_weight has shape \(11, 5\)"):
        loss(**arguments, lm_bias=torch.zeros(10))
    with pytest.raises(TypeError, match=r"lm_bias must be float32, bfloat16, float16 or float64, got torch\.int64"):
        loss(**arguments, lm_bias=torch.zeros(11).long())


@pytest.mark.parametrize("flag", ["torch:eager", "jax:xla"])
def test_a_bias_over_ranks(flag):
    losses = [FusedLinearCEConfig(), FusedLinearLogProbsConfig(entropy=True)]
    report = check(losses, [flag], dtypes=["float32"], only=["bias"], tp=[2])
    assert report.passed, "\n".join(map(str, report.failures))
    assert len(report.rows) == len(losses)


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan"), "0.1", True, None])
@pytest.mark.parametrize("config", configs(("mean",), z_loss=0.0), ids=lambda config: type(config).__name__)
def test_invalid_factors(config, value):
    expected = re.escape(f"z_loss must be a finite number >= 0 (0 is off), got {value!r}")
    with pytest.raises(ValueError, match=expected):
        type(config)(z_loss=value)


@pytest.mark.parametrize("value", [1.0, -0.1, 1, float("nan"), "0.1", True, None])
@pytest.mark.parametrize("config", configs(("mean",), label_smoothing=0.0), ids=lambda config: type(config).__name__)
def test_invalid_smoothing(config, value):
    with pytest.raises(ValueError, match=re.escape(f"label_smoothing must be a number in [0, 1), got {value!r}")):
        type(config)(label_smoothing=value)
