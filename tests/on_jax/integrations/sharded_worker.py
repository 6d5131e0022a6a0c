"""Parameters sharded over four devices: prints loss, optax's loss, the largest difference of gradients."""

import json
import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from loss_core import FusedLinearCEConfig, MaskedCrossEntropyConfig
from loss_core_jax.integrations.functional import linear_softmax_cross_entropy, softmax_cross_entropy

V, H, SHAPE = 128, 32, (8, 12)
mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
keys = jax.random.split(jax.random.key(0), 3)
hidden = jax.device_put(jax.random.normal(keys[0], (*SHAPE, H)), NamedSharding(mesh, P("data")))
weight = jax.device_put(jax.random.normal(keys[1], (H, V)), NamedSharding(mesh, P("data", "tensor")))
labels = jax.device_put(jax.random.randint(keys[2], SHAPE, 0, V), NamedSharding(mesh, P("data")))


def optax_loss(weight_HV, hidden):
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ weight_HV, labels).mean()


def logits_loss(weight_HV, hidden):
    return softmax_cross_entropy(MaskedCrossEntropyConfig(reduction="mean"))(hidden @ weight_HV, labels)


def fused_loss(weight_HV, hidden):
    loss = linear_softmax_cross_entropy(FusedLinearCEConfig(reduction="mean"))
    return loss(hidden, labels, lm_weight_HV=weight_HV)


expected, expected_gradients = jax.jit(jax.value_and_grad(optax_loss, (0, 1)))(weight, hidden)
results = {}
for name, function in (("logits", logits_loss), ("fused", fused_loss)):
    shardings = (None, (weight.sharding, hidden.sharding))
    loss, gradients = jax.jit(jax.value_and_grad(function, (0, 1)), out_shardings=shardings)(weight, hidden)
    difference = max(float(jnp.abs(a - b).max()) for a, b in zip(gradients, expected_gradients, strict=True))
    results[name] = (float(loss), float(expected), difference, gradients[0].sharding == weight.sharding)
print(json.dumps(results))
