"""Meshes with explicit axes, which are part of the types of arrays, on one CPU device."""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from loss_core import FusedLinearCEConfig, FusedLinearKDConfig, KDLossConfig, MaskedCrossEntropyConfig

T, V, H = 6, 11, 4
RNG = np.random.default_rng(0)
LABELS = np.array([-100, 3, 0, 10, 7, 1])
# The floating arguments of each loss, and their PartitionSpecs over the vocabulary; hidden states have none.
LOGITS, ALONG_V = RNG.normal(size=(2, T, V)).astype("float32"), P(None, "tp")
CALLS = {
    MaskedCrossEntropyConfig: (("logits",), LOGITS[:1], [ALONG_V]),
    FusedLinearCEConfig: (
        ("hidden_states", "lm_weight"),
        [RNG.normal(size=(n, H)).astype("float32") for n in (T, V)],
        [P(), P("tp")],
    ),
    KDLossConfig: (("student_logits", "teacher_logits"), LOGITS, [ALONG_V] * 2),
    FusedLinearKDConfig: (
        ("student_hidden_states", "student_lm_weight", "teacher_hidden_states", "teacher_lm_weight"),
        [RNG.normal(size=size).astype("float32") for size in ((T, H), (V, H), (T, H + 1), (V, H + 1))],
        [P(), P("tp")] * 2,
    ),
}


# Without jit each operation compiles a program: only one loss of each kind is tested there.
@pytest.mark.parametrize(
    ("config_cls", "compiled"),
    [(config_cls, config_cls in (KDLossConfig, FusedLinearKDConfig)) for config_cls in CALLS],
    ids=[config_cls.__name__ for config_cls in CALLS],
)
def test_an_explicit_axis_of_one_device(config_cls: Any, compiled: bool) -> None:
    names, floats, axes = CALLS[config_cls]

    def pulled_back(loss: Any, *arrays: Any) -> Any:
        value, pull = jax.vjp(lambda *xs: loss(labels=LABELS, **dict(zip(names, xs, strict=True))), *arrays)
        return value, *pull(value)

    program = jax.jit(pulled_back, static_argnums=0)
    expected = program(config_cls().build(backend="jax"), *floats)
    mesh = jax.make_mesh((1,), ("tp",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        loss = replace(config_cls(), tp_group="tp").build(backend="jax")
        arrays = [jax.device_put(x, NamedSharding(mesh, axis)) for x, axis in zip(floats, axes, strict=True)]
        got = (program if compiled else pulled_back)(loss, *arrays)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
