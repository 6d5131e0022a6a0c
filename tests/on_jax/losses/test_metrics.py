"""Metrics of the cross entropies, beside their loss; test_matrix.py tests their values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loss_core import FusedLinearCEConfig, MaskedCrossEntropyConfig
from loss_core.field_checks import METRICS

V = 11


def _logits():
    return jax.random.normal(jax.random.key(0), (2, 3, V)), np.array([[1, -100, 2], [3, 4, 5]])


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_metrics_are_an_aux_of_value_and_grad(reduction):
    logits, labels = _logits()
    loss_fn = MaskedCrossEntropyConfig(reduction=reduction, metrics=METRICS).build(backend="jax")
    alone = MaskedCrossEntropyConfig(reduction=reduction).build(backend="jax")

    def of(z):
        loss, metrics = loss_fn(z, labels)
        return loss.sum(), metrics

    (loss, metrics), grad = jax.jit(jax.value_and_grad(of, has_aux=True))(logits)
    expected, expected_grad = jax.value_and_grad(lambda z: alone(z, labels).sum())(logits)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(grad, expected_grad, atol=1e-7)
    assert metrics.keys() == set(METRICS)
    assert int(metrics["num_valid"]) == 5


def test_metrics_are_not_differentiated():
    logits, labels = _logits()
    loss_fn = MaskedCrossEntropyConfig(metrics=["lse"]).build(backend="jax")

    def of(z, weights):
        return loss_fn(z, labels, loss_weights=weights)[1]["lse"]

    for grad in jax.grad(of, argnums=(0, 1))(logits, jnp.ones(labels.shape)):
        assert not grad.any()


@pytest.mark.parametrize("skip_ignored", [None, True, False])
def test_skipped_tokens_have_metrics_of_0(skip_ignored):
    _, labels = _logits()
    hidden, weight = jax.random.normal(jax.random.key(1), (2, 3, 4)), jax.random.normal(jax.random.key(2), (V, 4))
    config = FusedLinearCEConfig(reduction="none", metrics=["lse"], skip_ignored=skip_ignored)
    _, metrics = config.build(backend="jax")(hidden, labels, weight)
    lse = jax.nn.logsumexp(hidden @ weight.T, axis=-1)
    np.testing.assert_allclose(metrics["lse"], np.where(labels == -100, 0.0, lse), rtol=1e-5)


def test_no_tokens():
    for reduction in ("sum", "none"):
        loss_fn = FusedLinearCEConfig(reduction=reduction, metrics=METRICS).build(backend="jax")
        loss, metrics = loss_fn(jnp.zeros((0, 4)), np.zeros(0, int), jnp.zeros((V, 4)))
        assert all(metrics[name].shape == loss.shape for name in METRICS[:-1])
        assert int(metrics["num_valid"]) == 0
