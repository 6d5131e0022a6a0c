"""The first backward returns the gradient computed in the forward where the upstream gradient is 1."""

import inspect

import pytest
import torch

from loss_core import KDLossConfig, MaskedCrossEntropyConfig, TopKDistillationConfig
from loss_core.dispatch.observed import names, observing
from loss_core_torch.autograd.base import Function

T, V, K = 6, 40, 3

CALLS = {
    "MaskedCrossEntropy": (MaskedCrossEntropyConfig(), lambda x, labels: (x, labels)),
    "KDLoss": (KDLossConfig(), lambda x, labels: (x, x.detach().flip(-1), labels)),
    "TopKDistillation": (
        TopKDistillationConfig(),
        lambda x, labels: (x, torch.arange(K).expand(T, K), torch.full((T, K), -2.0), labels),
    ),
}


def call(name):
    """(logits, loss) of the named call."""
    config, arguments = CALLS[name]
    logits = torch.randn(T, V, generator=torch.Generator().manual_seed(0), requires_grad=True)
    return logits, config.build(backend="torch:eager")(*arguments(logits, torch.arange(T)))


@pytest.mark.parametrize("name", CALLS)
def test_no_kernel_runs_again_where_the_upstream_gradient_is_1(name):
    logits, loss = call(name)
    with observing() as seen:
        (of_one,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert names(seen) == ""
    # It was returned without a copy, so another backward recomputes it.
    kept = of_one.clone()
    with observing() as seen:
        (again,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert names(seen) == "torch:eager"
    assert torch.equal(again, kept)
    assert again.data_ptr() != of_one.data_ptr()


@pytest.mark.parametrize("name", CALLS)
def test_another_upstream_gradient_scales_the_result(name):
    logits, loss = call(name)
    with observing() as seen:
        (of_three,) = torch.autograd.grad(3.0 * loss, logits)
    assert names(seen) == "torch:eager"
    logits, loss = call(name)
    torch.testing.assert_close(of_three, 3.0 * torch.autograd.grad(loss, logits)[0])


def test_the_signature_of_a_forward_is_cached():
    """PyTorch would inspect it in each call."""

    class Doubled(Function):
        @staticmethod
        def forward(ctx, x, times=2):
            return times * x

    assert inspect.signature(Doubled.forward) is inspect.signature(Doubled.forward)
    assert Doubled.apply(torch.tensor(3.0), 2) == 6.0
