"""The contract of JAX losses besides values: errors, transformations, memory, determinism, the backend table."""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import loss_core
from loss_core.dispatch.flags import flag_status, load_backend
from loss_core_jax import (
    FusedLinearCrossEntropy,
    KDLoss,
    LogProbs,
    MaskedCrossEntropy,
    TEParallelCrossEntropy,
)

B, S, V, H = 3, 6, 11, 4
RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(B, S, H)), "float32")
WEIGHT = jnp.asarray(RNG.normal(size=(V, H)), "float32")
LOGITS = HIDDEN @ WEIGHT.T
TEACHER = LOGITS[..., ::-1]
LABELS = RNG.integers(0, V, (B, S))
LABELS[0, :2] = -100
# TEParallelCrossEntropy shares the code of MaskedCrossEntropy.
LOSSES = ("masked", "fused", "kd")
CLASSES = ("masked", "fused")  # whose labels are classes
# KL(student || teacher) is KL(teacher || student) with the roles exchanged.
REVERSE_KL = pytest.param("reverse_kl", marks=pytest.mark.slow)


def call(name: str, x: Any, labels: Any, reduction: str = "sum", **more: Any) -> jax.Array:
    """A loss as a function of its first floating argument: hidden states for the fused loss, else logits."""
    match name:
        case "masked":
            return MaskedCrossEntropy(reduction=reduction)(x, labels, **more)
        case "fused":
            return FusedLinearCrossEntropy(reduction=reduction)(x, labels, WEIGHT, **more)
    teacher = jnp.broadcast_to(TEACHER[0, 0], x.shape).astype(x.dtype)
    more = {"num_batch_labels" if k == "num_label_tokens" else k: v for k, v in more.items()}
    return KDLoss()(x, teacher, labels, **more)


def first(name: str) -> jax.Array:
    return HIDDEN if name == "fused" else LOGITS


# --- what a loss object is


@pytest.mark.parametrize("cls", [MaskedCrossEntropy, TEParallelCrossEntropy, FusedLinearCrossEntropy, KDLoss])
def test_a_loss_is_hashable_and_has_no_leaves(cls: Any) -> None:
    loss = cls()
    assert jax.tree.leaves(loss) == []
    assert hash(loss) == hash(cls())
    assert loss == cls()
    assert loss.ignore_index == -100
    assert jax.jit(lambda fn, x: x)(loss, 1.0) == 1.0
    with pytest.raises(AttributeError):
        loss.ignore_index = 0


def test_direct_construction_validates() -> None:
    with pytest.raises(ValueError, match="Invalid reduction: 'avg'"):
        MaskedCrossEntropy(reduction="avg")
    with pytest.raises(ValueError, match="temperature"):
        KDLoss(temperature=0.0)


@pytest.mark.parametrize("cls", [MaskedCrossEntropy, TEParallelCrossEntropy, FusedLinearCrossEntropy, KDLoss])
def test_a_group_is_the_name_of_a_mesh_axis(cls: Any) -> None:
    assert hash(cls(tp_group="model")) == hash(cls(tp_group="model")) != hash(cls())
    with pytest.raises(TypeError, match=r"got builtins\.object\. A torch process group belongs to a torch backend"):
        cls(tp_group=object())
    with pytest.raises(ValueError, match="at least one mesh axis"):
        cls(tp_group=())
    with pytest.raises(ValueError, match="no mesh is set, and no argument lies on one"):
        call_with(cls(tp_group="model"))


def call_with(loss: Any) -> jax.Array:
    if isinstance(loss, FusedLinearCrossEntropy):
        return loss(HIDDEN, LABELS, WEIGHT)
    return loss(LOGITS, TEACHER, LABELS) if isinstance(loss, KDLoss) else loss(LOGITS, LABELS)


def test_sequence_parallel_needs_an_axis() -> None:
    with pytest.raises(ValueError, match="sequence_parallel=True needs tp_group"):
        FusedLinearCrossEntropy(sequence_parallel=True)


# --- refusals


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_labels_must_be_integers(name: str, dtype: str) -> None:
    with pytest.raises(TypeError, match="labels must be integers"):
        call(name, first(name), LABELS.astype(dtype))


@pytest.mark.parametrize("name", LOSSES)
def test_shapes_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"\(3, 5\).*\(3, 6, ") as error:
        call(name, first(name), LABELS[:, :5])
    if name == "masked":
        assert "logits.shape[:-1] == labels.shape" in str(error.value)


def test_other_refusals() -> None:
    ce, fused, kd = MaskedCrossEntropy(), FusedLinearCrossEntropy(), KDLoss()
    with pytest.raises(ValueError, match=r"mask\.shape == labels\.shape"):
        ce(LOGITS, LABELS, np.ones((2, S)))
    with pytest.raises(ValueError, match=r"mask\.shape == labels\.shape"):
        ce(LOGITS, LABELS, np.ones((2, B, S)))  # broadcasts, but to another shape
    with pytest.raises(TypeError, match="logits must be a floating array"):
        ce(LOGITS.astype(int), LABELS)
    with pytest.raises(TypeError, match=r"must be a jax or NumPy array, got builtins\.list"):
        ce(LOGITS, LABELS.tolist())
    with pytest.raises(ValueError, match=r"loss_weights has shape \(6,\) but labels has shape \(3, 6\)"):
        ce(LOGITS, LABELS, loss_weights=np.ones(S))
    with pytest.raises(ValueError, match="num_label_tokens has shape"):
        ce(LOGITS, LABELS, num_label_tokens=np.ones(2))
    with pytest.raises(ValueError, match=r"hidden_states\.shape\[-1\] == lm_weight\.shape\[1\]"):
        fused(HIDDEN[..., :3], LABELS, WEIGHT)
    with pytest.raises(TypeError, match="float32 but lm_weight has dtype bfloat16; they must match, or be bfloat16"):
        fused(HIDDEN, LABELS, WEIGHT.astype("bfloat16"))
    with pytest.raises(ValueError, match="grad_reduce_group must be None"):
        fused(HIDDEN, LABELS, WEIGHT, grad_reduce_group="data")
    with pytest.raises(ValueError, match="they must match"):
        kd(LOGITS, TEACHER[..., :5], LABELS)
    with pytest.raises(ValueError, match="loss_weights is only supported with num_batch_labels"):
        kd(LOGITS, TEACHER, LABELS, loss_weights=np.ones((B, S)))
    with pytest.raises(ValueError, match=r"loss_weights has shape \(6,\) but labels has shape \(3, 6\)"):
        kd(LOGITS, TEACHER, LABELS, 4, np.ones(S))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_sum_only_arguments(name: str, reduction: str) -> None:
    for more in ({"num_label_tokens": 3}, {"loss_weights": np.ones((B, S))}):
        with pytest.raises(ValueError, match=f"{next(iter(more))} is only supported when reduction is 'sum'"):
            call(name, first(name), LABELS, reduction, **more)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("bad", [V, -1, 2**30])
def test_a_wrong_label_is_refused_where_it_can_be_read(name: str, as_array: Any, bad: int) -> None:
    labels = LABELS.copy()
    labels[1, 2] = bad
    with pytest.raises(ValueError, match=rf"labels\[1, 2\] is {bad}, outside \[0, 11\)"):
        call(name, first(name), as_array(labels))
    with pytest.raises(ValueError, match=rf"labels\[1, 2\] is {bad}"):
        jax.grad(lambda x: call(name, x, as_array(labels)))(first(name))


@pytest.mark.parametrize("name", CLASSES)
def test_a_wrong_label_under_a_trace_is_nan_for_its_row(name: str) -> None:
    labels = LABELS.copy()
    labels[1, 2] = V
    value, grad = jax.jit(jax.value_and_grad(lambda x, y: call(name, x, y)))(first(name), labels)
    assert np.isnan(value)
    wrong = np.isnan(np.asarray(grad)).all(-1)
    assert wrong[1, 2]
    assert wrong.sum() == 1
    assert np.isnan(np.asarray(grad)).any(-1).sum() == 1
    rows = np.isnan(jax.jit(lambda x, y: call(name, x, y, "none"))(first(name), labels))
    assert rows[1, 2]
    assert rows.sum() == 1


def test_a_wrong_label_that_is_masked_is_ignored() -> None:
    labels, mask = LABELS.copy(), np.ones((B, S))
    labels[1, 2], mask[1, 2] = 2**40, 0  # beyond JAX's default integer, too
    right = MaskedCrossEntropy()(LOGITS, np.where(mask == 0, -100, LABELS))
    assert MaskedCrossEntropy()(LOGITS, labels, mask) == right
    assert MaskedCrossEntropy(ignore_index=2**40)(LOGITS, np.where(LABELS < 0, 2**40, labels)) == right


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64"])
def test_labels_of_any_signed_width(dtype: str) -> None:
    wide = jnp.asarray(RNG.normal(size=(B, S, 507)), "float32")  # more classes than int8 has
    expected = MaskedCrossEntropy()(wide, LABELS)
    assert MaskedCrossEntropy()(wide, LABELS.astype(dtype)) == expected
    assert MaskedCrossEntropy()(wide, jnp.asarray(LABELS.astype(dtype))) == expected


@pytest.mark.parametrize("dtype", ["uint8", "uint32"])
def test_minus_100_is_no_unsigned_label(dtype: str) -> None:
    # -100 as uint8 is 156, which is a class.
    wide = jnp.asarray(RNG.normal(size=(B, S, 507)), "float32")
    labels = np.full((B, S), 156)
    for given in (labels.astype(dtype), jnp.asarray(labels.astype(dtype))):
        assert MaskedCrossEntropy()(wide, given) == MaskedCrossEntropy()(wide, labels) > 0


# --- edges


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_all_ignored_is_a_connected_zero(name: str, reduction: str) -> None:
    labels = np.full((B, S), -100)
    value, grad = jax.value_and_grad(lambda x: jnp.sum(call(name, x, labels, reduction)))(first(name))
    assert value == 0
    assert (grad == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_count_of_zero_is_a_connected_zero(name: str) -> None:
    for count in (0, np.int64(0), jnp.asarray(0)):
        value, grad = jax.value_and_grad(lambda x, n=count: call(name, x, LABELS, num_label_tokens=n))(first(name))
        assert value == 0
        assert (grad == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_count_divides_traced_or_not(name: str) -> None:
    plain = call(name, first(name), LABELS, num_label_tokens=1)
    compiled = jax.jit(lambda x, n: call(name, x, LABELS, num_label_tokens=n))
    for count in (4, 2**40, np.float32(2.5)):
        np.testing.assert_allclose(call(name, first(name), LABELS, num_label_tokens=count), plain / float(count), 1e-6)
    np.testing.assert_allclose(compiled(first(name), jnp.asarray(4)), plain / 4, 1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_any_number_of_leading_dimensions(name: str) -> None:
    x = first(name)
    flat = call(name, x.reshape(B * S, -1), LABELS.reshape(-1))
    np.testing.assert_allclose(call(name, x, LABELS), flat, rtol=1e-6)
    np.testing.assert_allclose(call(name, x[None], LABELS[None]), flat, rtol=1e-6)
    assert call(name, x[1, 1], LABELS[1, 1]).shape == ()
    value, grad = jax.value_and_grad(lambda y: call(name, y, LABELS[:0]))(x[:0])
    assert value == 0
    assert grad.shape == x[:0].shape
    if name != "kd":
        assert call(name, x, LABELS, "none").shape == (B, S)


def test_fp32_upcast_false_gives_the_logits_dtype() -> None:
    half = LOGITS.astype("bfloat16")
    assert MaskedCrossEntropy(fp32_upcast=False)(half, LABELS).dtype == jnp.bfloat16
    assert KDLoss(fp32_upcast=False)(half, TEACHER, LABELS).dtype == jnp.bfloat16
    assert MaskedCrossEntropy()(half, LABELS).dtype == jnp.float32
    exact = MaskedCrossEntropy()(half, LABELS)
    assert MaskedCrossEntropy(fp32_upcast=False)(half, LABELS) == exact.astype(jnp.bfloat16)


def test_the_mask_may_be_of_any_real_dtype_and_broadcast() -> None:
    keep = np.array([1, 0, 1, 1, 0, 1])
    expected = MaskedCrossEntropy()(LOGITS, np.where(keep == 0, -100, LABELS))
    for mask in (keep, keep.astype(bool), keep * 0.25, jnp.asarray(keep * 0.25), keep[None]):
        assert MaskedCrossEntropy()(LOGITS, LABELS, mask) == expected
    grad = jax.grad(lambda m: MaskedCrossEntropy()(LOGITS, LABELS, m))(jnp.asarray(keep * 0.25, "float32"))
    assert (grad == 0).all()


# --- transformations


@pytest.mark.parametrize("name", LOSSES)
def test_vmap_over_a_leading_axis(name: str) -> None:
    x, labels = first(name), jnp.asarray(LABELS)
    counts = jnp.arange(1, B + 1)
    fn = jax.value_and_grad(lambda x, y, n: call(name, x, y, num_label_tokens=n))
    values, grads = jax.vmap(fn)(x, labels, counts)
    for i in range(B):
        value, grad = fn(x[i], LABELS[i], counts[i])
        np.testing.assert_allclose(values[i], value, rtol=1e-5)
        np.testing.assert_allclose(grads[i], grad, atol=1e-6)
    outside = jax.grad(
        lambda x: jax.vmap(lambda x, y, n: call(name, x, y, num_label_tokens=n))(x, labels, counts).sum()
    )
    np.testing.assert_allclose(outside(x), grads, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_upstream_scales_and_pull_back_twice(name: str) -> None:
    value, pull_back = jax.vjp(lambda x: call(name, x, LABELS), first(name))
    once, again = pull_back(jnp.ones_like(value))[0], pull_back(jnp.ones_like(value))[0]
    assert (once == again).all()
    np.testing.assert_allclose(pull_back(jnp.full_like(value, -0.5))[0], -0.5 * once, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", CLASSES)
def test_upstream_scales_the_gradient_of_loss_weights(name: str) -> None:
    weights = jnp.ones((B, S))
    rows = call(name, first(name), LABELS, "none")
    grad = jax.grad(lambda w: -0.5 * call(name, first(name), LABELS, loss_weights=w))(weights)
    np.testing.assert_allclose(grad, -0.5 * rows, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_an_ignored_row_gets_zero_even_from_an_infinite_weight(reduction: str) -> None:
    loss = FusedLinearCrossEntropy(reduction=reduction)
    grad = jax.grad(lambda h: jnp.sum(loss(h, LABELS, WEIGHT.at[3].set(jnp.inf))))(HIDDEN)
    assert (grad[0, :2] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_jit_and_eager_agree_and_repeat_bitwise(name: str) -> None:
    fn = jax.value_and_grad(lambda x: call(name, x, LABELS))
    eager, again, compiled = fn(first(name)), fn(first(name)), jax.jit(fn)(first(name))
    for a, b, c in zip(eager, again, compiled, strict=True):
        assert (a == b).all()
        np.testing.assert_allclose(a, c, rtol=1e-5, atol=1e-6)


def test_a_frozen_weight_needs_no_gradient_of_it() -> None:
    loss = FusedLinearCrossEntropy()
    both = jax.grad(lambda h, w: loss(h, LABELS, w), argnums=(0, 1))(HIDDEN, WEIGHT)
    np.testing.assert_allclose(jax.grad(lambda h: loss(h, LABELS, WEIGHT))(HIDDEN), both[0], atol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda w: loss(HIDDEN, LABELS, w))(WEIGHT), both[1], atol=1e-6)
    assert num_products(jax.grad(lambda h: loss(h, LABELS, WEIGHT))) == 2  # logits and hidden states


def num_products(fn: Any) -> int:
    """Products in the program of `fn(HIDDEN)` for this platform."""
    return jax.jit(fn).lower(HIDDEN).as_text().count("dot_general")


def test_an_undifferentiated_call_does_the_forward_product_only() -> None:
    for reduction in ("sum", "none"):
        loss = FusedLinearCrossEntropy(reduction=reduction)
        assert num_products(lambda h, loss=loss: loss(h, LABELS, WEIGHT)) == 1


def plain(name: str, x: jax.Array, w: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss in ordinary JAX, differentiable any number of times."""
    counted = labels != -100
    z = 2 * jnp.tanh(x @ w.T / 2) if name == "fused" else x
    if name == "jsd":
        log_t, log_s = (jax.nn.log_softmax(y / 2.0) for y in (w, x))
        log_m = jnp.logaddexp(log_t + np.log(0.3), log_s + np.log(0.7))
        kls = (jnp.exp(log_p) * (log_p - log_m) for log_p in (log_t, log_s))
        divergence = sum(share * kl.sum(-1) for share, kl in zip((0.3, 0.7), kls, strict=True))
        return 4 * jnp.where(counted, divergence, 0).sum() / counted.sum()
    if name == "kd":
        log_t, log_s = (jax.nn.log_softmax(y / 2.0) for y in (w, x))
        return 4 * jnp.where(counted, (jnp.exp(log_t) * (log_t - log_s)).sum(-1), 0).sum() / counted.sum()
    picked = jnp.take_along_axis(z, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    return jnp.where(counted, jax.nn.logsumexp(z, -1) - picked, 0).sum()


@pytest.mark.parametrize("name", ["masked", "fused", "fused-none", "kd", "jsd"])
def test_second_derivatives_are_right(name: str) -> None:
    labels = jnp.asarray(LABELS)
    kind = name.split("-")[0]

    def ours(x: jax.Array, w: jax.Array) -> jax.Array:
        if kind == "fused":
            reduction = "none" if "none" in name else "sum"
            return jnp.sum(FusedLinearCrossEntropy(logit_softcapping=2.0, reduction=reduction)(x, labels, w))
        if kind == "masked":
            return MaskedCrossEntropy()(x, labels)
        divergence = {"kd": "forward_kl", "jsd": "jsd"}[kind]
        return KDLoss(temperature=2.0, divergence=divergence, beta=0.3)(x, w, labels)

    x, w = first(kind), {"kd": TEACHER, "jsd": TEACHER}.get(kind, WEIGHT)

    def squared_gradient(fn: Any) -> Any:
        # unused for masked: the gradient by w is then 0
        return lambda x, w: sum((g**2).sum() for g in jax.grad(fn, (0, 1))(x, w)) + fn(x, w)

    poisoned = x.at[0, 0].set(jnp.inf).at[0, 1].set(jnp.nan)  # rows that are ignored
    actual = jax.jit(jax.grad(squared_gradient(ours), (0, 1)))(poisoned, w)
    expected = jax.jit(jax.grad(squared_gradient(lambda x, w: plain(kind, x, w, labels)), (0, 1)))(x, w)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("divergence", ["forward_kl", REVERSE_KL, "jsd"])
def test_second_derivatives_where_both_rule_a_class_out(divergence: str) -> None:
    loss = KDLoss(divergence=divergence)

    def squared_gradient(x: jax.Array, w: jax.Array) -> jax.Array:
        return sum((g**2).sum() for g in jax.grad(lambda x, w: loss(x, w, LABELS), (0, 1))(x, w))

    second = jax.jit(jax.grad(squared_gradient, (0, 1)))
    expected = second(LOGITS[..., 1:], TEACHER[..., 1:])
    for found, wanted in zip(second(*(x.at[..., 0].set(-jnp.inf) for x in (LOGITS, TEACHER))), expected, strict=True):
        np.testing.assert_allclose(found[..., 1:], wanted, rtol=1e-4, atol=1e-6)
        assert not found[..., 0].any()


def test_forward_mode_is_refused() -> None:
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: MaskedCrossEntropy()(x, LABELS), (LOGITS,), (LOGITS,))


# --- memory: temporaries do not grow with T * V


def temporaries(fn: Any, *shapes: Any) -> int:
    return int(jax.jit(fn).lower(*shapes).compile().memory_analysis().temp_size_in_bytes)


def struct(shape: tuple[int, ...], dtype: str) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_memory_of_the_fused_loss(reduction: str, dtype: str) -> None:
    vocab, hidden = 32000, 16
    loss = FusedLinearCrossEntropy(reduction=reduction)
    grad = jax.grad(lambda h, w, y: jnp.sum(loss(h, y, w)), argnums=(0, 1))
    used = [
        temporaries(grad, struct((n, hidden), dtype), struct((vocab, hidden), dtype), struct((n,), "int32"))
        for n in (1024, 16384)
    ]
    # In float32: three arrays of [T, H]; and of each token m, s, t and its coefficient.
    growth_without_logits = (16384 - 1024) * 4 * (3 * hidden + 4)
    assert used[1] - used[0] <= growth_without_logits
    assert used[1] < 100 << 20 < 16384 * vocab * 4  # one chunk of logits, and the weight's gradient in float32


@pytest.mark.skipif(jax.__version_info__ < (0, 9), reason="XLA of JAX 0.8 writes the exponentials of all logits out")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["masked", "softcap", "entropy", "kd", REVERSE_KL, "jsd"])
def test_memory_of_the_losses_over_logits(kind: str, dtype: str) -> None:
    tokens, vocab = 4096, 8192
    logits, labels = struct((tokens, vocab), dtype), struct((tokens,), "int32")
    if kind in ("masked", "softcap"):
        loss = MaskedCrossEntropy(fp32_upcast=False, logit_softcapping=30.0 if kind == "softcap" else 0.0)
        calls = [(lambda x, y: loss(x, y), (0,), (logits, labels))]
    elif kind == "entropy":
        log_probs = LogProbs(entropy=True)
        calls = [(lambda x, y: sum(found.sum() for found in log_probs(x, y)), (0,), (logits, labels))]
    else:
        kd = KDLoss() if kind == "kd" else KDLoss(divergence=kind)
        calls = [(lambda x, t, y: kd(x, t, y), argnums, (logits, logits, labels)) for argnums in ((0,), (0, 1))]
    for fn, argnums, shapes in calls:
        for transformed in (fn, jax.value_and_grad(fn, argnums=argnums)):
            # At most four of a chunk, of 8 MiB each.
            assert temporaries(transformed, *shapes) < 33 << 20 < tokens * vocab * 4


def test_eager_gradients_copy_no_weight() -> None:
    loss = FusedLinearCrossEntropy(reduction="mean")
    jaxpr = jax.make_jaxpr(lambda h, w: loss(h, LABELS, w))(HIDDEN, WEIGHT)
    outer = [str(eqn.primitive) for eqn in jaxpr.eqns for v in eqn.invars if v is jaxpr.jaxpr.invars[1]]
    assert outer == ["custom_vjp_call"]


# --- shard_map: four devices in a separate process

SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from loss_core_jax import FusedLinearCrossEntropy, KDLoss, MaskedCrossEntropy

mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
h, w = jax.random.normal(jax.random.key(0), (40, 8)), jax.random.normal(jax.random.key(1), (53, 8))
y = jnp.arange(40) % 53
none = FusedLinearCrossEntropy(reduction="none")
for loss in (FusedLinearCrossEntropy(), none, MaskedCrossEntropy(), KDLoss(chunk_size=3)):
    def local(h, y, w):
        z = h @ w.T
        if isinstance(loss, FusedLinearCrossEntropy):
            return loss(h, y, w).sum()
        return loss(z, y) if isinstance(loss, MaskedCrossEntropy) else loss(z, z[:, ::-1], y, num_batch_labels=40)
    sharded = jax.shard_map(
        lambda h, y, w: jax.lax.psum(local(h, y, w), "data"),
        mesh=mesh, in_specs=(P("data"), P("data"), P()), out_specs=P(),
    )
    got = jax.jit(jax.value_and_grad(sharded, argnums=(0, 2)))(h, y, w)
    want = jax.jit(jax.value_and_grad(local, argnums=(0, 2)))(h, y, w)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
print("sharded ok")
"""


def test_under_shard_map_the_gradient_of_a_replicated_weight_is_summed() -> None:
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "backends")])
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    env = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "sharded ok", done.stderr[-3000:]


# --- the backend table


def test_flags() -> None:
    assert flag_status("jax:xla").usable
    assert flag_status("jax:xla").version == f"jax {jax.__version__}"
    with pytest.raises(ValueError, match="Unknown backend flag 'jax:pallas'"):
        loss_core.KDLossConfig().build(backend="jax:pallas")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (loss_core.MaskedCrossEntropyConfig(False, 7, "mean", "tp"), MaskedCrossEntropy(False, 7, "mean", "tp")),
        (
            loss_core.FusedLinearCEConfig(7, 3.0, "none", "tp", True),
            FusedLinearCrossEntropy(7, 3.0, "none", "tp", True),
        ),
        (loss_core.TEParallelCEConfig(7, "mean", "tp"), TEParallelCrossEntropy(7, "mean", "tp")),
        (loss_core.KDLossConfig(7, 2.0, False, ("a", "b"), 5), KDLoss(7, 2.0, False, ("a", "b"), 5)),
    ],
)
def test_every_field_reaches_the_loss(config: Any, expected: Any) -> None:
    named, chosen = config.build(backend="jax:xla"), config.build(backend="jax")
    assert named.kernel_choice.flag == chosen.kernel_choice.flag == "jax:xla"
    assert named.kernel_choice.reason == "named by the flag" != chosen.kernel_choice.reason
    assert expected == named == chosen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_evaluate(dtype: str) -> None:
    loss = loss_core.MaskedCrossEntropyConfig(reduction="none").build(backend="jax")
    logits = np.asarray(LOGITS).astype(jnp.dtype(dtype)).astype("float64")
    upstream = RNG.normal(size=(B, S))
    result = load_backend("jax").evaluate(
        loss, {"logits": logits, "labels": LABELS}, dtype=dtype, upstream=upstream, grad_of=("logits",)
    )
    assert result.kernel == "jax:xla"
    assert result.mutated == ()
    assert result.dtypes == {"loss": "float64" if dtype == "float64" else "float32", "logits": dtype}
    assert result.loss.dtype == result.grads["logits"].dtype == np.float64
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    p = shifted / shifted.sum(-1, keepdims=True)
    counted = LABELS >= 0
    expected = (p - np.eye(V)[np.maximum(LABELS, 0)]) * (upstream * counted)[..., None]
    np.testing.assert_allclose(result.grads["logits"], expected, rtol=0, atol=4 * float(jnp.finfo(dtype).eps))
    with pytest.raises(ValueError, match="outside"):
        load_backend("jax").evaluate(
            loss, {"logits": logits, "labels": LABELS * 0 + V}, dtype=dtype, upstream=None, grad_of=("logits",)
        )


def test_a_label_beyond_int32_is_no_class_in_64_bit_mode() -> None:
    # Truncated to 32 bits it would be class 1.
    with jax.enable_x64(True):
        logits, labels = jnp.zeros((2, V)), jnp.asarray([0, 2**32 + 1])
        assert labels.dtype == jnp.int64
        assert np.isnan(jax.jit(MaskedCrossEntropy())(logits, labels))
        with pytest.raises(ValueError, match="4294967297"):
            MaskedCrossEntropy()(logits, labels)
        with pytest.raises(ValueError, match="4294967297"):
            FusedLinearCrossEntropy()(jnp.zeros((2, H)), np.asarray(labels), jnp.zeros((V, H)))
