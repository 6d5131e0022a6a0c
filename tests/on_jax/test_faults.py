"""Regression tests of every loss for the kinds of faults in public bug reports about losses."""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loss_core import FusedLinearCEConfig, KDLossConfig, MaskedCrossEntropyConfig, TEParallelCEConfig
from loss_core.dispatch.flags import load_backend
from loss_core_jax import FusedLinearCrossEntropy, KDLoss, MaskedCrossEntropy

T, V, H = 6, 11, 4
RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(T, H)), "float32")
WEIGHT = jnp.asarray(RNG.normal(size=(V, H)), "float32")
LOGITS = HIDDEN @ WEIGHT.T
LABELS = RNG.integers(0, V, T)
LABELS[:2] = -100
REDUCTIONS = ("sum", "mean", "none")
CONFIGS = (
    *(MaskedCrossEntropyConfig(reduction=r) for r in REDUCTIONS),
    TEParallelCEConfig(),
    *(FusedLinearCEConfig(reduction=r) for r in REDUCTIONS),
    FusedLinearCEConfig(skip_ignored=True),
    KDLossConfig(temperature=2.0),
)
each_config = pytest.mark.parametrize(
    "config",
    CONFIGS,
    ids=lambda c: "-".join([type(c).__name__, getattr(c, "reduction", "mean")]),
)


def as_function(loss: Any, labels: Any = LABELS, **more: Any) -> tuple[Any, tuple[jax.Array, ...]]:
    """A loss as a function of its floating arguments, and these; the first has a row per token."""
    if isinstance(loss, FusedLinearCrossEntropy):
        return (lambda h, w: loss(h, labels, w, **more)), (HIDDEN, WEIGHT)
    if isinstance(loss, KDLoss):
        more = {"num_batch_labels": more.get("num_label_tokens")}
        return (lambda s, t: loss(s, t, labels, **more)), (LOGITS, LOGITS[:, ::-1])
    return (lambda z: loss(z, labels, **more)), (LOGITS,)


# --- upstream gradients that are not finite


@each_config
def test_an_infinite_upstream_leaves_ignored_rows_at_zero(config: Any) -> None:
    fn, floats = as_function(config.build(backend="jax"))
    # Labels are counted on the host with skip_ignored, which is not for jit.
    for called in (fn,) if getattr(config, "skip_ignored", None) else (fn, jax.jit(fn)):
        value, pull_back = jax.vjp(called, *floats)
        for upstream in (np.inf, np.nan):
            grads = pull_back(jnp.full_like(value, upstream))
            for grad in grads if isinstance(config, KDLossConfig) else grads[:1]:
                assert (grad[:2] == 0).all()
                assert not jnp.isfinite(grad[2:]).all()


@each_config
def test_an_infinite_upstream_without_valid_tokens_gives_zero_gradients(config: Any) -> None:
    loss = config.build(backend="jax")
    calls = [as_function(loss, np.full(T, -100))]
    if getattr(config, "reduction", "mean") == "sum" or isinstance(config, KDLossConfig):
        calls += [as_function(loss, num_label_tokens=0), as_function(loss, num_label_tokens=jnp.asarray(0.0))]
    for fn, floats in calls:
        value, pull_back = jax.vjp(fn, *floats)
        for upstream in (np.inf, np.nan):
            for grad in pull_back(jnp.full_like(value, upstream)):
                assert (grad == 0).all()


# --- labels of a divergence


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
def test_kd_ignores_no_label_but_ignore_index(as_array: Any) -> None:
    labels = np.array([-100, V, -1, 2**30, 3, -5])
    plain = np.where(labels == -100, -100, 0)
    loss = KDLoss()
    assert loss(LOGITS, LOGITS[:, ::-1], as_array(labels)) == loss(LOGITS, LOGITS[:, ::-1], plain)
    assert jnp.isfinite(jax.jit(loss)(LOGITS, LOGITS[:, ::-1], jnp.asarray(labels)))
    loss.check_values({"labels": labels, "student_logits": LOGITS})


def test_kd_does_not_truncate_labels_to_32_bits() -> None:
    labels = np.array([-100, 2**32 - 100, 0, 0, 0, 0])
    assert KDLoss()(LOGITS, LOGITS[:, ::-1], labels) == KDLoss()(
        LOGITS, LOGITS[:, ::-1], np.array([-100, 0, 0, 0, 0, 0])
    )


# --- masks of the smallest number


def test_a_mask_of_finfo_min_agrees_with_plain_float32() -> None:
    smallest = float(jnp.finfo("float32").min)
    student = LOGITS.at[:, 3].set(smallest)
    labels = np.array([-100, 3, 1, 0, 0, 2])

    def plain_kd(s: jax.Array, t: jax.Array) -> jax.Array:
        log_s, log_t = jax.nn.log_softmax(s), jax.nn.log_softmax(t)
        return jnp.mean((jnp.exp(log_t) * (log_t - log_s)).sum(-1)[1:])

    def plain_ce(z: jax.Array) -> jax.Array:
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z), jnp.maximum(labels, 0)[:, None], -1)[1:])

    teacher = LOGITS[:, ::-1]
    for ours, theirs, args in (
        (lambda s, t: KDLoss()(s, t, labels), plain_kd, (student, teacher)),
        (lambda z: MaskedCrossEntropy(reduction="mean")(z, labels), plain_ce, (student,)),
    ):
        number = tuple(range(len(args)))
        value, grads = jax.value_and_grad(ours, number)(*args)
        expected, expected_grads = jax.value_and_grad(theirs, number)(*args)
        assert 1e36 < value < np.inf
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        for grad, want in zip(grads, expected_grads, strict=True):
            assert jnp.isfinite(grad).all()
            np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-4 * float(jnp.abs(want).max()))


# --- dtype of the result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@each_config
def test_the_dtype_of_the_result_depends_on_the_logits_alone(config: Any, dtype: str) -> None:
    with jax.enable_x64(True):
        loss = config.build(backend="jax")
        counts = [None]
        if getattr(config, "reduction", "mean") == "sum" or isinstance(config, KDLossConfig):
            counts = [jnp.asarray(7.0, "float64"), jnp.asarray(7, "int64"), np.float64(7), 7]
        for count in counts:
            fn, floats = as_function(loss, **({} if count is None else {"num_label_tokens": count}))
            floats = tuple(x.astype(dtype) for x in floats)
            expected = "float64" if dtype == "float64" else "float32"
            # Dtypes are known without computing.
            assert jax.eval_shape(fn, *floats).dtype == expected
            both = jax.value_and_grad(lambda *x, fn=fn: fn(*x).sum(), tuple(range(len(floats))))
            value, grads = jax.eval_shape(both, *floats)
            assert value.dtype == expected
            assert all(grad.dtype == dtype for grad in grads)


# --- counts


@pytest.mark.parametrize("count", [-1, -0.5, np.nan])
@pytest.mark.parametrize("name", ["MaskedCrossEntropy", "FusedLinearCrossEntropy", "KDLoss"])
def test_a_negative_or_nan_count_is_refused_or_nan(name: str, count: float) -> None:
    loss = {"MaskedCrossEntropy": MaskedCrossEntropy(), "FusedLinearCrossEntropy": FusedLinearCrossEntropy()}.get(
        name, KDLoss()
    )
    for given in (count, np.asarray(count), jnp.asarray(count)):
        fn, floats = as_function(loss, num_label_tokens=given)
        with pytest.raises(ValueError, match=rf"num_\w+ must be >= 0, got {count:g}"):
            fn(*floats)

    def traced(n: jax.Array) -> Any:
        fn, floats = as_function(loss, num_label_tokens=n)
        return jax.value_and_grad(fn)(*floats)

    value, grad = jax.jit(traced)(jnp.asarray(count))
    assert jnp.isnan(value)
    assert (grad[:2] == 0).all()
    assert jnp.isnan(grad[2:]).all()


# --- empty dimensions


def test_an_empty_vocabulary_or_hidden_dimension_is_one_clear_error() -> None:
    y = np.zeros(4, int)
    text = r"_?logits has shape \(4, 0\): the vocabulary \(last dimension\) must not be empty\.$"
    with pytest.raises(ValueError, match=f"^{text}"):
        MaskedCrossEntropy()(jnp.zeros((4, 0)), y)
    with pytest.raises(ValueError, match=f"^student{text}"):
        KDLoss()(jnp.zeros((4, 0)), jnp.zeros((4, 0)), y)
    with pytest.raises(
        ValueError, match=r"^hidden_states has shape \(4, 0\): the hidden dimension must not be empty\.$"
    ):
        FusedLinearCrossEntropy()(jnp.zeros((4, 0)), y, jnp.zeros((5, 0)))
    with pytest.raises(ValueError, match=r"lm_weight has shape \(0, 3\): the vocabulary \(first dimension\)"):
        FusedLinearCrossEntropy()(jnp.zeros((4, 3)), y, jnp.zeros((0, 3)))


# --- 16-bit hidden states beside a float32 head


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_float32_head_gets_a_float32_gradient(half: str, reduction: str) -> None:
    num, hidden_size = 600, 32
    hidden = jnp.asarray(RNG.normal(size=(num, hidden_size)), half)
    weight = jnp.asarray(RNG.normal(size=(V, hidden_size)), "float32")
    labels = RNG.integers(0, V, num)
    loss = FusedLinearCrossEntropy(reduction=reduction)
    by_hidden, by_weight = jax.grad(lambda h, w: loss(h, labels, w).sum(), (0, 1))(hidden, weight)
    assert (by_hidden.dtype, by_weight.dtype) == (half, "float32")
    # Products take the weight in the dtype of the hidden states.
    h, w = (np.asarray(x, "float64") for x in (hidden, weight.astype(half)))
    p = np.exp(h @ w.T)
    p /= p.sum(-1, keepdims=True)
    p[np.arange(num), labels] -= 1
    np.testing.assert_allclose(by_weight, p.T @ h, atol=2e-6 * num)
    np.testing.assert_allclose(by_hidden.astype("float32"), p @ w, atol=4 * float(jnp.finfo(half).eps))


# --- equality of builds


@pytest.mark.parametrize("cls", [MaskedCrossEntropyConfig, FusedLinearCEConfig, TEParallelCEConfig, KDLossConfig])
def test_builds_that_compute_the_same_are_equal_and_compile_once(cls: Any) -> None:
    traces = []

    @jax.jit
    def step(loss: Any, x: jax.Array) -> jax.Array:
        traces.append(loss)
        return x

    flags = ("jax", "jax:auto", "jax:xla")
    losses = [cls(**group).build(backend=flag) for flag in flags for group in ({}, {"tp_group": "a"})]
    losses.append(cls(tp_group=("a",)).build(backend="jax"))
    for loss in losses:
        step(loss, LOGITS)
    assert len(traces) == len(set(losses)) == 2
    assert all(loss.kernel_choice.flag == "jax:xla" for loss in losses)


# --- which kernel ran, and whether the caller's arrays changed


def test_the_kernel_is_read_from_the_program() -> None:
    evaluate = load_backend("jax").evaluate
    logits, labels = np.asarray(LOGITS, "float64"), np.maximum(LABELS, 0)

    def run(loss: Any) -> Any:
        arrays = {"logits": logits, "labels": labels}
        return evaluate(loss, arrays, dtype="float32", upstream=None, grad_of=("logits",))

    assert run(MaskedCrossEntropyConfig().build(backend="jax")).kernel == "jax:xla"
    assert run(MaskedCrossEntropyConfig().build(backend="jax")).kernel == "jax:xla"  # compiled already

    def theirs(logits: jax.Array, labels: Any) -> jax.Array:
        return -jax.nn.log_softmax(logits)[np.arange(T), labels].sum()

    assert run(theirs).kernel == ""


def test_a_change_of_the_callers_arrays_is_detected_bit_for_bit() -> None:
    def changes(logits: jax.Array, labels: Any, factor: Any) -> jax.Array:
        if isinstance(factor, np.ndarray):
            factor[0] = 0.0 if np.isnan(factor[0]) else 1.0
        return logits.sum()

    factor = np.array([np.nan, 1.0], "float32")
    result = load_backend("jax").evaluate(
        changes,
        {"logits": np.ones((2, 3)), "labels": np.zeros(2, int), "factor": factor.view("int32")},
        dtype="float32",
        upstream=None,
        grad_of=("logits",),
    )
    assert result.mutated == ("factor",)


# --- a mesh that is not set


def test_under_jit_the_error_says_to_set_a_mesh() -> None:
    loss = MaskedCrossEntropy(tp_group="tp")
    with pytest.raises(ValueError, match="no mesh is set, and no argument lies on one"):
        loss(LOGITS, LABELS)
    with pytest.raises(ValueError, match=r"a traced argument .* does not tell .*`with jax\.set_mesh\(mesh\)`") as error:
        jax.jit(loss)(LOGITS, LABELS)
    assert "NamedSharding" not in str(error.value)
