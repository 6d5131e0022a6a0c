"""Every loss and its gradients, ignored rows included, under each of JAX's strict modes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loss_core_jax import FusedLinearCrossEntropy, KDLoss, MaskedCrossEntropy, TEParallelCrossEntropy
from loss_core_jax.kernels.xla import CPU, XlaKernels

MODES = {
    "jax_numpy_rank_promotion": "raise",
    "jax_numpy_dtype_promotion": "strict",
    "jax_debug_nans": True,
    "jax_debug_infs": True,
    "jax_enable_checks": True,
    "jax_check_tracer_leaks": True,
}
SIZES = CPU._replace(logits_bytes=0, row_bytes=0, pair_bytes=0, chunk=(4, 4), tile=16)
SMALL = XlaKernels(cpu=SIZES, accelerator=SIZES)

RNG = np.random.default_rng(0)
B, S, V, H = 2, 20, 37, 8
LABELS = RNG.integers(0, V, (B, S))
LABELS[0, ::3] = -100
MASK = (np.arange(S) % 2)[None]
LOSSES = {
    "masked": MaskedCrossEntropy(kernels=SMALL),
    "masked-mean": MaskedCrossEntropy(reduction="mean", fp32_upcast=False, kernels=SMALL),
    "te-none": TEParallelCrossEntropy(reduction="none", kernels=SMALL),
    "fused": FusedLinearCrossEntropy(logit_softcapping=5.0, kernels=SMALL),
    "fused-skip": FusedLinearCrossEntropy(skip_ignored=True, kernels=SMALL),
    "fused-none": FusedLinearCrossEntropy(reduction="none", kernels=SMALL),
    "kd": KDLoss(temperature=2.0, kernels=SMALL),
}


def call(name: str, dtype: str) -> Any:
    """Loss and gradients of a call with every argument that the loss accepts."""
    loss, kind = LOSSES[name], name.split("-")[0]
    size = H if kind == "fused" else V
    x = jnp.asarray(RNG.normal(size=(B, S, size)), dtype)
    labels = jnp.asarray(LABELS, "int32")
    more: dict[str, Any] = {}
    if name in ("masked", "fused"):
        more = {"num_label_tokens": jnp.asarray(7), "loss_weights": jnp.asarray(RNG.random((B, S)), "float32")}
    if kind in ("masked", "te"):
        more["mask"] = jnp.asarray(MASK)
        fn = lambda x: loss(x, labels, **more).sum()  # noqa: E731
        return jax.value_and_grad(fn), (x,)
    second = jnp.asarray(RNG.normal(size=(V, H) if kind == "fused" else x.shape), dtype)
    if kind == "fused":
        return jax.value_and_grad(lambda x, w: loss(x, labels, w, **more).sum(), (0, 1)), (x, second)
    return jax.value_and_grad(lambda x, t: loss(x, t, labels, num_batch_labels=9), (0, 1)), (x, second)


@pytest.mark.parametrize("name", LOSSES)
def test_under_every_mode(name: str) -> None:
    fn, arrays = call(name, "bfloat16" if name == "masked-mean" else "float32")
    if name != "fused-skip":  # which reads labels
        fn = jax.jit(fn)
    expected = fn(*arrays)
    for mode, strict in MODES.items():
        before = getattr(jax.config, mode)
        jax.config.update(mode, strict)
        try:
            found = fn(*arrays)
        finally:
            jax.config.update(mode, before)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=mode)
