"""Losses with optax's signature, in training loops of optax, flax NNX and equinox."""

# V = vocabulary, H = hidden

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loss_core import FusedLinearCEConfig, KDLossConfig, MaskedCrossEntropyConfig
from loss_core_jax.integrations.functional import linear_softmax_cross_entropy, softmax_cross_entropy

optax = pytest.importorskip("optax")

V, H, SHAPE = 97, 32, (4, 12)
WORKER = Path(__file__).with_name("sharded_worker.py")


def problem():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, weight_HV = jax.random.normal(keys[0], (*SHAPE, H)), jax.random.normal(keys[1], (H, V))
    return hidden, weight_HV, jax.random.randint(keys[2], SHAPE, 0, V), jax.random.bernoulli(keys[3], 0.7, SHAPE)


def close(ours, expected, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), ours, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_each_example_has_its_own_loss(masked):
    hidden, weight_HV, labels, where = problem()
    logits, where = hidden @ weight_HV, where if masked else None
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    expected = expected if where is None else jnp.where(where, expected, 0)
    assert expected.shape == SHAPE
    close(softmax_cross_entropy()(logits, labels, where=where), expected)
    close(linear_softmax_cross_entropy()(hidden, labels, lm_weight_HV=weight_HV, where=where), expected)
    close(linear_softmax_cross_entropy()(hidden, labels, lm_weight_VH=weight_HV.T, where=where), expected)


def test_the_mean_is_over_included_examples():
    hidden, weight_HV, labels, where = problem()
    expected = optax.softmax_cross_entropy_with_integer_labels(hidden @ weight_HV, labels).mean(where=where)
    loss = softmax_cross_entropy(MaskedCrossEntropyConfig(reduction="mean"))
    close(loss(hidden @ weight_HV, labels, where=where), expected)
    fused = linear_softmax_cross_entropy(FusedLinearCEConfig(reduction="mean"))
    close(fused(hidden, labels, lm_weight_HV=weight_HV, where=where), expected)


def test_a_mask_of_labels_that_can_not_hold_ignore_index():
    hidden, weight_HV, labels, where = problem()
    loss = linear_softmax_cross_entropy()
    narrow = loss(hidden, labels.astype(jnp.uint8), lm_weight_HV=weight_HV, where=where)
    close(narrow, loss(hidden, labels, lm_weight_HV=weight_HV, where=where))


def test_counts_and_weights_reach_the_loss():
    hidden, weight_HV, labels, _ = problem()
    arguments = {"num_label_tokens": 7, "loss_weights": jnp.linspace(0, 1, 48).reshape(SHAPE)}
    each = optax.softmax_cross_entropy_with_integer_labels(hidden @ weight_HV, labels)
    expected = (each * arguments["loss_weights"]).sum() / 7
    loss = softmax_cross_entropy(MaskedCrossEntropyConfig(reduction="sum"))
    close(loss(hidden @ weight_HV, labels, **arguments), expected)
    fused = linear_softmax_cross_entropy(FusedLinearCEConfig(reduction="sum"))
    close(fused(hidden, labels, lm_weight_HV=weight_HV, **arguments), expected)


def optax_loss(hidden, labels, weight_HV, where):
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ weight_HV, labels).mean(where=where)


def our_loss(hidden, labels, weight_HV, where):
    loss = softmax_cross_entropy(MaskedCrossEntropyConfig(reduction="mean"))
    return loss(hidden @ weight_HV, labels, where=where)


def our_fused_loss(hidden, labels, weight_HV, where):
    loss = linear_softmax_cross_entropy(FusedLinearCEConfig(reduction="mean"))
    return loss(hidden, labels, lm_weight_HV=weight_HV, where=where)


OURS = pytest.mark.parametrize("ours", [our_loss, our_fused_loss])


def batch(seed):
    keys = jax.random.split(jax.random.key(seed), 2)
    return jax.random.randint(keys[0], SHAPE, 0, V), jax.random.bernoulli(keys[1], 0.7, SHAPE)


@OURS
def test_training_with_optax_and_donated_buffers(ours):
    optimizer = optax.adam(1e-2)

    def trained(loss_of):
        @jax.jit
        def loss_and_gradients(params, tokens, where):
            def loss(params):
                return loss_of(params["embedding"][tokens], jnp.roll(tokens, -1, 1), params["head"], where)

            return jax.value_and_grad(loss)(params)

        def step(params, state, tokens, where):
            loss, gradients = loss_and_gradients(params, tokens, where)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, loss

        params = {"embedding": jax.random.normal(jax.random.key(1), (V, H)), "head": problem()[1]}
        state, losses, step = optimizer.init(params), [], jax.jit(step, donate_argnums=(0, 1))
        for seed in range(5):
            params, state, loss = step(params, state, *batch(seed))
            losses.append(loss)
        return losses, params

    close(trained(ours), trained(optax_loss))


@OURS
def test_training_with_flax_nnx(ours):
    nnx = pytest.importorskip("flax.nnx")

    def trained(loss_of):
        class Model(nnx.Module):
            def __init__(self, rngs):
                self.embedding = nnx.Embed(V, H, rngs=rngs)
                self.head = nnx.Linear(H, V, use_bias=False, rngs=rngs)

        model, losses = Model(nnx.Rngs(0)), []
        optimizer = nnx.Optimizer(model, optax.sgd(0.5), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, tokens, where):
            def loss(model):
                # The nnx.Param itself, not its value.
                return loss_of(model.embedding(tokens), jnp.roll(tokens, -1, 1), model.head.kernel, where)

            value, gradients = nnx.value_and_grad(loss)(model)
            optimizer.update(model, gradients)
            return value

        for seed in range(5):
            losses.append(step(model, optimizer, *batch(seed)))
        return losses, jax.tree.leaves(nnx.state(model, nnx.Param))

    close(trained(ours), trained(optax_loss))


@OURS
def test_training_with_equinox(ours):
    eqx = pytest.importorskip("equinox")

    def trained(loss_of):
        keys = jax.random.split(jax.random.key(0))
        model = (eqx.nn.Embedding(V, H, key=keys[0]), eqx.nn.Linear(H, V, use_bias=False, key=keys[1]))
        losses = []

        @eqx.filter_jit
        @eqx.filter_value_and_grad
        def loss_and_gradients(model, tokens, where):
            hidden = jax.vmap(jax.vmap(model[0]))(tokens)
            return loss_of(hidden, jnp.roll(tokens, -1, 1), model[1].weight.T, where)

        for seed in range(5):
            loss, gradients = loss_and_gradients(model, *batch(seed))
            model = eqx.apply_updates(model, jax.tree.map(lambda g: -0.5 * g, gradients))
            losses.append(loss)
        return losses, jax.tree.leaves(eqx.filter(model, eqx.is_array))

    close(trained(ours), trained(optax_loss))


class ArrayHolder:
    """As flax.nnx.Param: holds an array without being one."""

    def __init__(self, value):
        self.value = value

    def __jax_array__(self):
        return self.value


def test_objects_that_hold_an_array():
    hidden, weight_HV, labels, where = problem()
    loss, fused = softmax_cross_entropy(), linear_softmax_cross_entropy()
    holders = [ArrayHolder(x) for x in (hidden, labels, where)]
    expected = fused(hidden, labels, lm_weight_HV=weight_HV, where=where)
    close(fused(holders[0], holders[1], lm_weight_HV=ArrayHolder(weight_HV), where=holders[2]), expected)
    close(fused(holders[0], holders[1], lm_weight_VH=ArrayHolder(weight_HV.T), where=holders[2]), expected)
    close(loss(ArrayHolder(hidden @ weight_HV), holders[1], where=holders[2]), expected)


def test_sharded_parameters():
    paths = os.pathsep.join(map(str, (WORKER.parents[3], WORKER.parents[3] / "backends")))
    done = subprocess.run(
        [sys.executable, WORKER], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert set(results) == {"logits", "fused"}
    for loss, expected, difference, is_sharded in results.values():
        assert loss == pytest.approx(expected, abs=1e-5)
        assert difference < 1e-5
        assert is_sharded


def test_rejected_arguments():
    hidden, weight_HV, labels, _ = problem()
    loss, fused = softmax_cross_entropy(), linear_softmax_cross_entropy()
    with pytest.raises(TypeError, match="takes a MaskedCrossEntropyConfig or a TEParallelCEConfig, got a KDLossConfig"):
        softmax_cross_entropy(KDLossConfig())
    with pytest.raises(TypeError, match="got the class FusedLinearCEConfig"):
        linear_softmax_cross_entropy(FusedLinearCEConfig)
    with pytest.raises(TypeError, match="got neither"):
        fused(hidden, labels)
    with pytest.raises(TypeError, match="got both"):
        fused(hidden, labels, lm_weight_HV=weight_HV, lm_weight_VH=weight_HV.T)
    with pytest.raises(ValueError, match=r"lm_weight_HV has shape \(97, 32\).*goes under the name lm_weight_VH"):
        fused(hidden, labels, lm_weight_HV=weight_HV.T)
    with pytest.raises(ValueError, match="lm_weight"):
        fused(hidden, labels, lm_weight_VH=weight_HV)
    with pytest.raises(ValueError, match=r"where has shape \(4, 12, 97\).*mask of classes"):
        loss(hidden @ weight_HV, labels, where=jnp.ones((*SHAPE, V), bool))
    with pytest.raises(ValueError, match=r"where has shape \(5, 4, 12\)"):
        fused(hidden, labels, lm_weight_HV=weight_HV, where=jnp.ones((5, *SHAPE), bool))


def test_the_layout_of_a_square_weight_is_that_of_its_argument():
    hidden, _, labels, _ = problem()
    weight = jax.random.normal(jax.random.key(9), (H, H))
    labels = labels % H
    loss = linear_softmax_cross_entropy()
    expected = optax.softmax_cross_entropy_with_integer_labels(hidden @ weight, labels)
    close(loss(hidden, labels, lm_weight_HV=weight), expected)
    assert not np.allclose(loss(hidden, labels, lm_weight_VH=weight), expected)
