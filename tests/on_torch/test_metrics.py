"""Metrics that the cross entropies return with their loss."""

import pytest
import torch

from loss_core import BackendUnavailable, FusedLinearCEConfig, MaskedCrossEntropyConfig, TEParallelCEConfig
from loss_core.field_checks import METRICS
from loss_core.row_terms import CrossEntropy
from loss_core_torch.integrations import hf, megatron, nemo
from loss_core_torch.kernels import Rows, te

V = 11
each_flag = pytest.mark.parametrize("flag", ["torch:plain", "torch:eager", "torch:compile"])


def _arguments(flag="torch:eager"):
    torch.manual_seed(0)
    labels = torch.tensor([1, -100, 2, 3, 4])
    return torch.randn(5, V, requires_grad=True), labels


@each_flag
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_metrics_do_not_change_loss_and_gradient(flag, reduction):
    logits, labels = _arguments()
    loss, metrics = MaskedCrossEntropyConfig(reduction=reduction, metrics=METRICS).build(backend=flag)(logits, labels)
    alone = MaskedCrossEntropyConfig(reduction=reduction).build(backend=flag)(logits, labels)
    assert list(metrics) == list(METRICS)
    assert not any(value.requires_grad for value in metrics.values())
    torch.testing.assert_close(loss, alone, rtol=1e-6, atol=1e-7)
    grads = [torch.autograd.grad(x.sum(), logits)[0] for x in (loss, alone)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


def test_num_valid_is_a_count_for_every_reduction():
    logits, labels = _arguments()
    for reduction in ("sum", "mean", "none"):
        config = MaskedCrossEntropyConfig(reduction=reduction, metrics=["num_valid"])
        _, metrics = config.build()(logits, labels, mask=labels != 2)
        assert metrics["num_valid"].dtype == torch.int64
        assert metrics["num_valid"].shape == ()
        assert metrics["num_valid"] == 3


def test_metrics_are_weighted_and_divided_as_the_loss():
    logits, labels = _arguments()
    weights = torch.tensor([1.0, torch.inf, 0.5, 0.0, 2.0])
    config = MaskedCrossEntropyConfig(metrics=["lse"])
    _, metrics = config.build()(logits, labels, loss_weights=weights, num_label_tokens=7)
    lse = logits.detach().logsumexp(-1)
    torch.testing.assert_close(metrics["lse"], (lse * torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0])).sum() / 7)


@each_flag
def test_a_label_that_shares_the_largest_logit_is_right(flag):
    logits = torch.tensor([[2.0, 2.0, 0.0], [1.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
    config = MaskedCrossEntropyConfig(reduction="none", metrics=["accuracy"], logit_softcapping=5.0)
    _, metrics = config.build(backend=flag)(logits, torch.tensor([1, 0, 2]))
    assert metrics["accuracy"].tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("flag", ["torch:plain", "torch:eager"])
def test_one_graph_holds_loss_and_metrics(flag):
    loss_fn = FusedLinearCEConfig(reduction="mean", metrics=METRICS, z_loss=0.1).build(backend=flag)
    arguments = torch.randn(5, 4), torch.tensor([1, -100, 2, 3, 4]), torch.randn(V, 4)
    loss, metrics = torch.compile(loss_fn, backend="eager", fullgraph=True)(*arguments)
    expected, others = loss_fn(*arguments)
    torch.testing.assert_close(loss, expected)
    assert metrics.keys() == others.keys()
    for name, value in others.items():
        torch.testing.assert_close(metrics[name], value)


def test_no_tokens():
    for reduction, shape in (("sum", ()), ("mean", ()), ("none", (0,))):
        config = MaskedCrossEntropyConfig(reduction=reduction, metrics=METRICS)
        loss, metrics = config.build()(torch.empty(0, V), torch.empty(0, dtype=torch.int64))
        assert loss.shape == shape
        assert all(metrics[name].shape == shape for name in METRICS[:-1])
        assert metrics["num_valid"] == 0


def test_transformer_engine_refuses_metrics():
    with pytest.raises(BackendUnavailable, match="'torch:te' returns no metrics: use 'torch:eager'"):
        te.KERNELS.terms(Rows(*_arguments(), None), CrossEntropy(V, metrics=True).sums)


@pytest.mark.parametrize("given", ["lse", ["speed"], ["lse", "lse"], [["lse"]], 3], ids=str)
def test_invalid_metrics(given):
    with pytest.raises(ValueError, match=r"metrics must be a list of names among .accuracy., .* each once, got"):
        FusedLinearCEConfig(metrics=given)


def test_adapters_that_accept_only_a_loss_refuse_metrics():
    metrics = ("lse",)
    for adapt in (
        lambda: hf.causal_lm_loss(MaskedCrossEntropyConfig(metrics=metrics)),
        lambda: hf.use_fused_loss(None, FusedLinearCEConfig(metrics=metrics)),
        lambda: megatron.language_model_loss(TEParallelCEConfig(reduction="none", metrics=metrics)),
        lambda: nemo.masked_ce(metrics=metrics),
        lambda: nemo.fused_ce(metrics=metrics),
    ):
        with pytest.raises(ValueError, match=r"takes a loss alone, but config has metrics=\['lse'\]"):
            adapt()
