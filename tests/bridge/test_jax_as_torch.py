"""A JAX loss in torch against the same loss written in torch."""

from __future__ import annotations

import copy
import inspect
import pickle

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from helpers.stand_ins import TOLERANCE, TRACES, JaxCE, TorchCE, case, run_torch
from loss_core_bridge import jax_loss_as_torch


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_jax_in_torch_equals_torch(dtype, reduction):
    logits, labels = case(dtype)
    upstream = torch.linspace(0.5, 2.0, labels.numel()).reshape(labels.shape) if reduction == "none" else None
    upstream = None if upstream is None else upstream.to(torch.float64 if dtype == torch.float64 else torch.float32)
    loss, grad = run_torch(jax_loss_as_torch(JaxCE(reduction)), logits, labels, upstream)
    want_loss, want_grad = run_torch(TorchCE(reduction), logits, labels, upstream)
    assert loss.dtype == want_loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    torch.testing.assert_close(loss, want_loss, rtol=1e-14 if dtype == torch.float64 else 1e-6, atol=0)
    torch.testing.assert_close(grad, want_grad, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_every_floating_input_gets_its_gradient_and_others_none():
    logits, labels = case()
    weights = torch.rand(labels.shape, requires_grad=True)
    logits.requires_grad_()
    mask = torch.ones(labels.shape, dtype=torch.bool)
    mask[0, 0] = False
    loss = jax_loss_as_torch(JaxCE())
    loss(logits, labels=labels, mask=mask, num_label_tokens=7, loss_weights=weights).backward()
    got = logits.grad, weights.grad
    logits.grad = weights.grad = None
    TorchCE()(logits, labels, mask, 7, weights).backward()
    torch.testing.assert_close(got, (logits.grad, weights.grad))

    logits.grad = weights.grad = None
    loss(logits.detach(), labels, loss_weights=weights).backward()
    assert logits.grad is None
    assert weights.grad is not None


def test_inputs_are_not_modified():
    logits, labels = case()
    before = logits.clone(), labels.clone()
    versions = logits._version, labels._version
    logits.requires_grad_()
    jax_loss_as_torch(JaxCE())(logits, labels, mask=labels > 3).backward()
    assert torch.equal(logits, before[0])
    assert torch.equal(labels, before[1])
    assert (logits._version, labels._version) == versions


def test_in_place_change_before_backward_is_detected():
    logits, labels = case()
    logits.requires_grad_()
    loss = jax_loss_as_torch(JaxCE())(logits, labels)
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_change_of_an_input_that_backward_does_not_read_is_allowed():
    weights = torch.ones(3, requires_grad=True)

    def linear(x, w):
        return (x * jnp.float32(2) + w * jnp.float32(3)).sum()

    x = torch.ones(3)
    loss = jax_loss_as_torch(linear)(x, weights)
    x.zero_()
    loss.backward()
    assert weights.grad.tolist() == [3, 3, 3]


def test_backward_twice():
    logits, labels = case()
    logits.requires_grad_()
    loss = jax_loss_as_torch(JaxCE())(logits, labels)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, logits)


def test_upstream_scales_the_gradient_and_results_share_no_memory():
    x = torch.randn(64, requires_grad=True)
    y = torch.randn(64, requires_grad=True)
    upstream = torch.randn(64)
    result = jax_loss_as_torch(lambda x, y: x + y)(x, y)
    result.backward(upstream)
    assert torch.equal(x.grad, upstream)
    assert torch.equal(y.grad, upstream)
    # Gradients that shared memory with each other or with the upstream would be changed by clipping.
    assert len({x.grad.data_ptr(), y.grad.data_ptr(), upstream.data_ptr(), x.data_ptr()}) == 4
    assert jax_loss_as_torch(lambda x: x)(x.detach()).data_ptr() != x.data_ptr()


def test_second_derivative_is_an_error():
    logits, labels = case()
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(jax_loss_as_torch(JaxCE())(logits, labels), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"jax\.hessian.*torch backend"):
        grad.square().sum().backward()
    # create_graph for another term of the loss is allowed.
    other = torch.randn(3, requires_grad=True)
    total = jax_loss_as_torch(JaxCE())(logits, labels) + other.pow(3).sum()
    (of_other,) = torch.autograd.grad(total, other, create_graph=True)
    of_other.sum().backward()


def test_no_recompilation_for_another_value_of_a_number():
    loss = jax_loss_as_torch(JaxCE(ignore_index=-7))
    logits, labels = case()
    logits.requires_grad_()
    labels = labels.clamp(min=0)
    loss(logits, labels, num_label_tokens=3).backward()
    TRACES.clear()
    results = [loss(logits, labels, num_label_tokens=n) for n in (4, torch.tensor(5), (labels >= 0).sum(), np.int64(7))]
    results[0].backward()
    assert not TRACES
    assert results[0].item() * 4 == pytest.approx(results[1].item() * 5, rel=1e-6)
    # Equal losses share compiled programs.
    jax_loss_as_torch(JaxCE(ignore_index=-7))(logits, labels, num_label_tokens=9).backward()
    assert not TRACES


def test_float64_is_not_lowered_and_64_bit_mode_is_reset():
    logits, labels = case(torch.float64)
    loss, grad = run_torch(jax_loss_as_torch(JaxCE()), logits, labels)
    want, _ = run_torch(TorchCE(), logits, labels)
    assert loss.dtype == grad.dtype == torch.float64
    assert abs(loss - want) < 1e-12
    assert jnp.ones(1).dtype == jnp.float32


def test_empty_batch():
    logits = torch.randn(0, 5, 37, requires_grad=True)
    jax_loss_as_torch(JaxCE())(logits, torch.zeros(0, 5, dtype=torch.int64)).backward()
    assert logits.grad.shape == (0, 5, 37)


def test_module_exposes_the_loss():
    module = jax_loss_as_torch(JaxCE("mean"))
    assert isinstance(module, torch.nn.Module)
    assert not module.state_dict()
    assert not list(module.parameters())
    assert (module.reduction, module.ignore_index) == ("mean", -100)
    assert module.kernel_choice.flag == "jax:xla"
    assert "reduction='mean'" in repr(module)
    for signature in (inspect.signature(module), inspect.signature(module.forward)):
        assert list(signature.parameters) == ["logits", "labels", "mask", "num_label_tokens", "loss_weights"]
    with pytest.raises(AttributeError, match="build a new loss"):
        module.reduction = "sum"
    with pytest.raises(AttributeError, match="nothing_such"):
        module.nothing_such  # noqa: B018
    logits, labels = case()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.eval().to("cpu")):
        assert torch.equal(twin(logits, labels), module(logits, labels))
        assert twin.reduction == "mean"


def test_autocast_casts_the_operands_of_the_product():
    def fused(hidden_states, lm_weight):
        assert hidden_states.dtype == lm_weight.dtype == jnp.bfloat16
        return (hidden_states @ lm_weight.T).astype(jnp.float32).sum()

    hidden = torch.randn(4, 8).bfloat16()
    weight = torch.randn(6, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = jax_loss_as_torch(fused)(hidden, weight)
    loss.backward()
    assert loss.dtype == weight.grad.dtype == torch.float32
    logits, labels = case()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(jax_loss_as_torch(JaxCE())(logits, labels), jax_loss_as_torch(JaxCE())(logits, labels))


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    logits, labels = case()
    loss = jax_loss_as_torch(JaxCE())
    _, want = run_torch(loss, logits, labels)
    _, grad = run_torch(lambda z, y: checkpoint(lambda z: loss(z * 1, y), z, use_reentrant=False), logits, labels)
    assert torch.equal(grad, want)


def test_torch_compile_breaks_the_graph_around_the_call():
    loss = jax_loss_as_torch(JaxCE())
    logits, labels = case()
    compiled = torch.compile(lambda z: loss(z * 2, labels) * 3, backend="eager")
    leaf = logits.clone().requires_grad_()
    compiled(leaf).backward()
    _, want = run_torch(lambda z, y: loss(z * 2, y) * 3, logits, labels)
    assert torch.equal(leaf.grad, want)
    with pytest.raises(Exception, match=r"torch\.compiler\.disable"):
        torch.compile(lambda z: loss(z, labels), backend="eager", fullgraph=True)(logits)
