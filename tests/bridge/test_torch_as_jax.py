"""A torch loss in JAX against the same loss written in JAX."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers.stand_ins import JaxCE, TorchCE, case
from loss_core_bridge import jax_loss_as_torch, torch_loss_as_jax

JAX_TOLERANCE = {"float32": 1e-5, "bfloat16": 8e-3, "float16": 1e-3}


@pytest.mark.parametrize("dtype", JAX_TOLERANCE)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_torch_in_jax_equals_jax(dtype, jit):
    logits, labels = case()
    x, y = jnp.asarray(logits.numpy()).astype(dtype), jnp.asarray(labels.numpy())
    wrap = jax.jit if jit else (lambda f: f)
    for reduction in ("sum", "mean"):
        loss, grad = wrap(jax.value_and_grad(torch_loss_as_jax(TorchCE(reduction))))(x, y)
        want, want_grad = jax.value_and_grad(JaxCE(reduction))(x, y)
        assert loss.dtype == want.dtype
        assert grad.dtype == x.dtype
        np.testing.assert_allclose(loss, want, rtol=1e-5)
        tolerance = JAX_TOLERANCE[dtype]
        np.testing.assert_allclose(grad.astype("float32"), want_grad.astype("float32"), rtol=tolerance, atol=tolerance)
    weights = jnp.linspace(0.5, 2.0, 15).reshape(3, 5)
    f = torch_loss_as_jax(TorchCE("none"))
    got = wrap(jax.grad(lambda x: (f(x, labels=y) * weights).sum()))(x)
    want = jax.grad(lambda x: (JaxCE("none")(x, y) * weights).sum())(x)
    np.testing.assert_allclose(got.astype("float32"), want.astype("float32"), rtol=tolerance, atol=tolerance)


def test_torch_in_jax_float64():
    logits, labels = case(torch.float64)
    with jax.enable_x64(True):
        x, y = jnp.asarray(logits.numpy()), jnp.asarray(labels.numpy())
        loss, grad = jax.jit(jax.value_and_grad(torch_loss_as_jax(TorchCE())))(x, y)
        assert loss.dtype == grad.dtype == jnp.float64
        np.testing.assert_allclose(grad, jax.grad(JaxCE())(x, y), rtol=0, atol=1e-14)


def test_torch_in_jax_every_floating_input():
    logits, labels = case()
    x, y, n = jnp.asarray(logits.numpy()), jnp.asarray(labels.numpy()), jnp.float32(7)
    weights = jnp.linspace(0.5, 2.0, 15).reshape(3, 5)

    def both(f, x, weights, n):
        return f(x, y, None, n, loss_weights=weights)

    got = jax.jit(jax.grad(functools.partial(both, torch_loss_as_jax(TorchCE())), argnums=(0, 1, 2)))(x, weights, n)
    want = jax.grad(functools.partial(both, JaxCE()), argnums=(0, 1, 2))(x, weights, n)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    _, of_labels = jax.grad(torch_loss_as_jax(TorchCE()), argnums=(0, 1), allow_int=True)(x, y)
    assert of_labels.dtype == jax.dtypes.float0


def test_torch_in_jax_computes_only_the_needed_gradients():
    seen = []

    class Spy(TorchCE):
        def forward(self, logits, labels, loss_weights=None):
            if torch.is_grad_enabled():
                seen.append((logits.requires_grad, loss_weights.requires_grad))
            return super().forward(logits, labels, loss_weights=loss_weights)

    logits, labels = case()
    jax.grad(torch_loss_as_jax(Spy()))(jnp.asarray(logits.numpy()), labels.numpy().astype("int32"), jnp.ones((3, 5)))
    assert seen == [(True, False)]


def test_torch_in_jax_shapes_without_data():
    class ReadsValues(torch.nn.Module):
        def forward(self, logits, labels):
            if labels.max() >= logits.shape[-1]:  # fails on meta tensors
                raise ValueError("label out of range")
            return F.cross_entropy(logits, labels.long())

    f = torch_loss_as_jax(ReadsValues())
    shapes = jax.eval_shape(f, jax.ShapeDtypeStruct((4, 9), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32))
    assert shapes.shape == ()
    assert shapes.dtype == jnp.float32
    with pytest.raises(ValueError, match="label out of range"):
        f(jnp.ones((4, 9)), jnp.full(4, 9))
    with pytest.raises(jax.errors.JaxRuntimeError, match="label out of range"):
        jax.block_until_ready(jax.jit(f)(jnp.ones((4, 9)), jnp.full(4, 9)))
    with pytest.raises(ValueError, match="batch_size"):  # torch's own error, at trace time
        jax.jit(f)(jnp.ones((4, 9)), jnp.zeros(5, jnp.int32))


def test_torch_in_jax_rejects():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        torch_loss_as_jax(lambda x: x)
    with pytest.raises(ValueError, match="trainable parameters \\(weight, bias\\)"):
        torch_loss_as_jax(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="inside its own callback"):
        torch_loss_as_jax(torch.nn.Sequential(jax_loss_as_torch(JaxCE())))
    f = torch_loss_as_jax(TorchCE())
    logits, labels = case()
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        f(logits, jnp.zeros(3))
    wide = labels.numpy().copy()
    wide[0, 0] = 2**32 + 1
    with pytest.raises(ValueError, match="labels has values from -100 to 4294967297"):
        f(jnp.asarray(logits.numpy()), wide)

    class Detached(torch.nn.Module):
        def forward(self, x):
            return x.detach().sum()

    with pytest.raises(RuntimeError, match="not connected to x"):
        jax.grad(torch_loss_as_jax(Detached()))(jnp.ones(3))


def test_torch_in_jax_can_not_modify_jax_memory():
    class Writes(torch.nn.Module):
        def forward(self, logits, labels):
            labels.zero_()
            return logits.sum()

    x, y = jnp.ones((2, 3)), jnp.ones(2, jnp.int32)
    f = torch_loss_as_jax(Writes())
    f(x, y)
    jax.jit(jax.grad(f))(x, y)
    assert (y == 1).all()


def test_torch_in_jax_is_a_static_hashable_callable():
    module = TorchCE("mean")
    f = torch_loss_as_jax(module)
    assert f == torch_loss_as_jax(module)
    assert hash(f) == hash(torch_loss_as_jax(module))
    assert f != torch_loss_as_jax(TorchCE("mean"))
    assert jax.tree.leaves(f) == []
    assert f.reduction == "mean"
    assert list(inspect.signature(f).parameters)[:2] == ["logits", "labels"]
    logits, labels = case()
    jax.jit(lambda loss, x, y: loss(x, y))(f, jnp.asarray(logits.numpy()), jnp.asarray(labels.numpy()))
