"""Log-probabilities and entropies against PyTorch's own operations, and calls that are refused."""

import math
import re

import pytest
import torch

from helpers.operations import Operations
from helpers.torch_calls import cells, inputs, leaves
from loss_core import FusedLinearLogProbsConfig, LogProbsConfig
from loss_core.check import check

CONFIGS = [LogProbsConfig(entropy=True), FusedLinearLogProbsConfig(entropy=True)]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)


def by_torch(config, arguments, temperature):
    logits = arguments.get("logits")
    if logits is None:
        logits = arguments["hidden_states"] @ arguments["lm_weight"].T
    if cap := config.logit_softcapping:
        logits = cap * torch.tanh(logits / cap)
    labels, keep = arguments["labels"], arguments["labels"] != config.ignore_index
    tau = config.temperature if temperature is None else temperature
    log_p = (logits / (tau[..., None] if isinstance(tau, torch.Tensor) else tau)).log_softmax(-1)
    logprobs = log_p.gather(-1, labels.clamp(0)[..., None])[..., 0]
    return logprobs.masked_fill(~keep, 0.0), torch.special.entr(log_p.exp()).sum(-1).masked_fill(~keep, 0.0)


@pytest.mark.parametrize("temperature", [None, 0.5, "per token"])
@cells([*CONFIGS, LogProbsConfig(entropy=True, logit_softcapping=2.0, temperature=3.0)])
def test_as_in_torch(flag, config, temperature):
    ours, theirs = inputs(config, dtype=torch.float64), inputs(config, dtype=torch.float64)
    tau = torch.linspace(0.3, 2.0, 6).double().view(2, 3) if temperature == "per token" else temperature
    got, expected = config.build(backend=flag)(**ours, temperature=tau), by_torch(config, theirs, tau)
    upstreams = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13)
    torch.autograd.backward(tuple(got), tuple(upstreams))
    torch.autograd.backward(expected, tuple(upstreams))
    for name, given in leaves(ours).items():
        torch.testing.assert_close(given.grad, theirs[name].grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("which", [0, 1])
@cells(CONFIGS)
def test_one_result_may_be_differentiated_alone_and_twice(flag, config, which):
    arguments, theirs = inputs(config, dtype=torch.float64), inputs(config, dtype=torch.float64)
    wanted = list(leaves(arguments))
    expected = torch.autograd.grad(by_torch(config, theirs, None)[which].sum(), [theirs[name] for name in wanted])
    result = config.build(backend=flag)(**arguments)[which].sum()
    for retain in (True, False):
        found = torch.autograd.grad(result, [arguments[name] for name in wanted], retain_graph=retain)
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


@cells([LogProbsConfig(entropy=True)])
def test_the_limit_of_a_low_temperature(flag, config):
    logits = torch.tensor([[1e4, -1e4, 0.0, 1e4 - 1.0], [3.0, 3.0, -torch.inf, 2.0]], requires_grad=True)
    for temperature in (1e-6, 1e-30, torch.tensor([1e-38, 1e-25])):
        logprobs, entropy = config.build(backend=flag)(logits, torch.tensor([0, 1]), temperature)
        torch.testing.assert_close(logprobs, torch.tensor([0.0, -math.log(2.0)]))
        torch.testing.assert_close(entropy, torch.tensor([0.0, math.log(2.0)]))
        (gradient,) = torch.autograd.grad(entropy.sum(), logits)
        assert gradient.isfinite().all()


@cells(CONFIGS)
def test_entropy_is_none_by_default(flag, config):
    found = type(config)().build(backend=flag)(**inputs(config))
    assert found.entropy is None
    assert found.logprobs.requires_grad


@pytest.mark.parametrize("flag", ["torch:eager", "jax:xla"])
def test_over_ranks(flag):
    report = check(CONFIGS, [flag], dtypes=["float32"], only=["basic", "temperature-per-token"], tp=[2])
    assert report.passed, "\n".join(map(str, report.failures))
    assert [row.flag for row in report.rows] == [f"{flag} tp=2"] * len(CONFIGS)


def test_a_forward_holds_no_tensor_of_tokens_times_vocabulary():
    tokens, vocab = 300, 8000
    logits, labels = torch.randn(tokens, vocab, dtype=torch.bfloat16), torch.zeros(tokens, dtype=torch.int64)
    hidden, weight = torch.randn(tokens, 8), torch.randn(vocab, 8)
    with torch.no_grad(), Operations((logits, labels, hidden, weight)) as seen:
        CONFIGS[0].build(backend="torch:eager")(logits, labels)
        CONFIGS[1].build(backend="torch:eager")(hidden, labels, weight)
    assert 0 < seen.largest < tokens * vocab * 4 / 2


@each_config
@pytest.mark.parametrize(
    ("temperature", "error", "says"),
    [
        (0, ValueError, "temperature must be > 0, got 0."),
        (float("nan"), ValueError, "temperature must be > 0, got nan."),
        ("1", TypeError, "temperature must be a number or a floating tensor, got str."),
        (torch.ones(2, 3).long(), TypeError, "temperature must be a number or a floating tensor, got torch.int64."),
        (torch.tensor([[1.0, 1.0, -2.0], [1.0] * 3]), ValueError, "temperature must be > 0, got -2."),
        (torch.ones(3), ValueError, "temperature has shape (3,) but labels has shape (2, 3); it must have that shape"),
        (torch.ones((), requires_grad=True), ValueError, "temperature requires a gradient, and it has none here"),
    ],
    ids=str,
)
def test_invalid_temperatures(config, temperature, error, says):
    loss, arguments = config.build(backend="torch:eager"), inputs(config)
    with pytest.raises(error, match=re.escape(says)):
        loss(**arguments, temperature=temperature)


@each_config
@pytest.mark.parametrize("field", [{"temperature": 0.0}, {"entropy": 1}, {"logit_softcapping": -1.0}], ids=str)
def test_invalid_fields(config, field):
    with pytest.raises(ValueError, match=f"^{next(iter(field))} must be "):
        type(config)(**field)
