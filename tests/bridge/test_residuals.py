"""What a JAX loss in torch saves between forward and backward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
import torch

import loss_core
from helpers.stand_ins import JaxCE, case, run_torch
from loss_core_bridge import build_torch_loss, jax_loss_as_torch
from loss_core_bridge import residuals as residuals_module


@pytest.fixture
def residual_sizes(monkeypatch):
    """Sizes of the residuals of a JAX loss in torch."""
    sizes = []
    real = residuals_module.value_and_residuals

    def spy(*args):
        result = real(*args)
        sizes.extend(array.size for array in result[1])
        return result

    monkeypatch.setattr(residuals_module, "value_and_residuals", spy)
    return sizes


def test_logits_are_not_saved_twice(residual_sizes):
    """jit copies a residual that is an input; only row-sized arrays may be saved for the backward."""
    logits, labels = case(torch.bfloat16, V=501)
    run_torch(jax_loss_as_torch(JaxCE()), logits, labels)
    assert residual_sizes
    assert max(residual_sizes) <= labels.numel()


def test_library_loss_saves_no_second_copy_of_the_logits(residual_sizes):
    logits, labels = case(V=501)
    run_torch(build_torch_loss(loss_core.MaskedCrossEntropyConfig(), backend="jax"), logits, labels)
    assert sum(residual_sizes) < logits.numel()


def test_no_residuals_without_a_gradient(monkeypatch):
    def never(*_):
        raise AssertionError("vjp was made")

    monkeypatch.setattr(residuals_module, "value_and_residuals", never)
    logits, labels = case()
    loss = jax_loss_as_torch(JaxCE())
    assert not loss(logits, labels).requires_grad
    with torch.no_grad():
        assert not loss(logits.clone().requires_grad_(), labels).requires_grad
    with torch.inference_mode():
        loss(logits, labels)
    with pytest.raises(AssertionError, match="vjp was made"):
        loss(logits.requires_grad_(), labels)


def test_residuals_are_freed_with_the_graph():
    import gc

    logits, _ = case(shape=(64,), V=1000)
    loss = jax_loss_as_torch(lambda logits: jnp.exp(logits).sum())
    leaf = logits.requires_grad_()
    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    result = loss(leaf)
    assert sum(array.nbytes for array in jax.live_arrays()) - before <= 64 * 1000 * 4 + 64
    result.backward()
    leaf.grad = None
    gc.collect()
    assert sum(array.nbytes for array in jax.live_arrays()) - before <= 64  # `result` itself is still held
