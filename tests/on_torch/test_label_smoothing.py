"""Label smoothing is that of F.cross_entropy, in one process and with the vocabulary over several."""

import re

import pytest
import torch
import torch.nn.functional as F

from helpers.torch_calls import cells, configs, inputs, leaves
from loss_core import BackendUnavailable, FusedLinearCEConfig, MaskedCrossEntropyConfig
from loss_core.check import check
from loss_core.row_terms import Objective
from loss_core_torch.kernels import Rows, te


def by_torch(config, arguments):
    logits = arguments.get("logits")
    if logits is None:
        logits = F.linear(arguments["hidden_states"], arguments["lm_weight"])
    return F.cross_entropy(
        logits.flatten(0, -2), arguments["labels"].flatten(), ignore_index=config.ignore_index,
        reduction=config.reduction, label_smoothing=config.label_smoothing,
    )  # fmt: skip


@pytest.mark.parametrize("minus_inf", [False, True])
@cells([*configs(label_smoothing=0.1), *configs(("mean",), label_smoothing=0.9)])
def test_as_in_torch(flag, config, minus_inf):
    ours, theirs = inputs(config, dtype=torch.float64), inputs(config, dtype=torch.float64)
    if minus_inf and "logits" in ours:
        # A class that is masked is as unlikely as can be: the loss is infinite, and the gradient is not.
        for arguments in (ours, theirs):
            arguments["logits"].data[..., 7] = -torch.inf
            arguments["labels"][arguments["labels"] == 7] = 3
    upstream = torch.arange(1.0, 7.0).double().sqrt() if config.reduction == "none" else torch.tensor(2.0).double()
    got, expected = config.build(backend=flag)(**ours).flatten(), by_torch(config, theirs).flatten()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    assert got.isinf().any() == (minus_inf and "logits" in ours)
    got.backward(upstream.view(-1))
    expected.backward(upstream.view(-1))
    for name, given in leaves(ours).items():
        torch.testing.assert_close(given.grad, theirs[name].grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("flag", ["torch:eager", "jax:xla"])
def test_over_ranks(flag):
    for config in (MaskedCrossEntropyConfig(label_smoothing=0.2), FusedLinearCEConfig(label_smoothing=0.2)):
        report = check(config, [flag], dtypes=["float32"], only=["basic", "edge-labels"], tp=[2])
        assert report.passed, "\n".join(map(str, report.failures))
        assert [row.flag for row in report.rows] == [f"{flag} tp=2"]


def test_te_refuses_it_over_a_group():
    rows = Rows(torch.randn(2, 4), torch.tensor([1, 2]), None)
    with pytest.raises(BackendUnavailable, match=r"is wrong with label_smoothing over a group, got 0\.1: use"):
        te.KERNELS.cross_entropy(rows, Objective(8, 0.1), object())


@pytest.mark.parametrize("value", [1.0, -0.1, 1, float("nan"), "0.1", True, None])
@pytest.mark.parametrize("config", configs(("mean",), label_smoothing=0.0), ids=lambda config: type(config).__name__)
def test_what_is_no_share(config, value):
    with pytest.raises(ValueError, match=re.escape(f"label_smoothing must be a number in [0, 1), got {value!r}")):
        type(config)(label_smoothing=value)
