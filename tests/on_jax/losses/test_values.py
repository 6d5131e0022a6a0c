"""Values and gradients of the JAX losses against plain float64 NumPy, with small chunks and tiles in every loop."""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loss_core_jax import FusedLinearCrossEntropy, KDLoss, MaskedCrossEntropy, TEParallelCrossEntropy
from loss_core_jax.kernels.xla import CPU, XlaKernels

# T = 37 and V = 507: no multiples of a chunk or a tile.
T, V, H = 37, 507, 16
IGNORE = -100


# Chunks of 16 tokens and tiles of 128 classes, so that small inputs go through every loop.
SIZES = CPU._replace(logits_bytes=0, row_bytes=0, pair_bytes=0, chunk=(16, 16), tile=128)
SMALL = XlaKernels(cpu=SIZES, accelerator=SIZES._replace(is_cpu=False))


class Case(NamedTuple):
    logits: np.ndarray
    labels: np.ndarray
    mask: np.ndarray | None = None
    ignore_index: int = IGNORE


def case(name: str) -> Case:
    rng = np.random.default_rng(7)
    logits = rng.normal(size=(T, V)) * 2
    labels = rng.integers(0, V, T)
    labels[::5] = IGNORE
    match name:
        case "ragged":  # small logits: bad padding of V shows only there
            return Case(logits * 1e-3, labels)
        case "one_class":
            return Case(logits[:, :1], np.where(labels == IGNORE, IGNORE, 0))
        case "huge":
            return Case(logits + rng.choice([-1e4, 1e4], (T, 1)), labels)
        case "spread":
            return Case(rng.choice([-1e4, 0.0, 1e4], (T, V)), labels)
        case "minus_inf":
            logits[:, 100:300] = -np.inf
            return Case(logits, np.where((labels >= 100) & (labels < 300), 5, labels))
        case "all_ignored":
            return Case(logits, np.full(T, IGNORE))
        case "ignore_zero":
            return Case(logits, np.where(labels == IGNORE, 0, labels), ignore_index=0)
        case "masked":
            return Case(logits, np.where(np.arange(T) % 3 == 0, 3, labels), np.arange(T) % 3)
        case "tile_edges":  # tiles of 128 classes; the last one starts at 379, and its new columns are 384 to 506
            return Case(logits, np.resize([0, 127, 128, 255, 256, 378, 379, 383, 384, 506, IGNORE], T))
        case "poisoned":  # what ignored rows hold must not leak
            logits[::5] = np.nan
            logits[5] = np.inf
            return Case(logits, labels)
    raise AssertionError(name)


CASES = ("ragged", "one_class", "huge", "spread", "minus_inf", "all_ignored", "ignore_zero", "masked", "poisoned")
UPSTREAM = np.linspace(-1.0, 2.0, T)  # not uniform: a backward that uses one element for all shows


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    return np.asarray(x).astype(jnp.dtype(dtype)).astype(np.float64)


def ignored_rows(c: Case) -> np.ndarray:
    return (c.labels == c.ignore_index) | (np.zeros(T, bool) if c.mask is None else c.mask == 0)


def ce_reference(z: np.ndarray, labels: np.ndarray, ignored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Losses [T], and gradient [T, V] of each row's own loss."""
    z = np.where(ignored[:, None], 0, z)
    target = np.where(ignored, 0, labels)
    shifted = z - z.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    grad = np.exp(log_p)
    grad[np.arange(len(z)), target] -= 1
    loss = -log_p[np.arange(len(z)), target]
    return np.where(ignored, 0, loss), np.where(ignored[:, None], 0, grad)


def kd_reference(zs: np.ndarray, zt: np.ndarray, ignored: np.ndarray, tau: float) -> tuple[np.ndarray, ...]:
    """Losses [T], and gradients [T, V] of each row's own loss by student and teacher."""

    def log_softmax(z: np.ndarray) -> np.ndarray:
        z = (z - z.max(1, keepdims=True)) / tau
        return z - np.log(np.exp(z).sum(1, keepdims=True))

    zs, zt = (np.where(ignored[:, None], 0, z) for z in (zs, zt))
    log_s, log_t = log_softmax(zs), log_softmax(zt)
    p_s, p_t = np.exp(log_s), np.exp(log_t)
    with np.errstate(invalid="ignore"):
        difference = np.where(p_t == 0, 0, log_t - log_s)
    kl = (p_t * difference).sum(1)
    by_student = tau * (p_s - p_t)
    by_teacher = tau * p_t * (difference - kl[:, None])
    hide = ignored[:, None]
    return np.where(ignored, 0, tau**2 * kl), np.where(hide, 0, by_student), np.where(hide, 0, by_teacher)


def factors(reduction: str, ignored: np.ndarray) -> np.ndarray:
    """Derivative of the total by each row's loss; for none, with the upstream gradients."""
    match reduction:
        case "sum":
            return np.ones(T)
        case "mean":
            return np.full(T, 1 / max((~ignored).sum(), 1))
    return UPSTREAM


def total(losses: np.ndarray, reduction: str, ignored: np.ndarray) -> np.ndarray:
    return losses if reduction == "none" else (losses * factors(reduction, ignored)).sum()


@functools.partial(jax.jit, static_argnames="loss")
def value_and_grads(loss: Any, varied: Any, fixed: Any, upstream: Any) -> Any:
    value, pull_back = jax.vjp(lambda v: loss(**v, **fixed), varied)
    return value, pull_back(upstream)[0]


def run(loss: Any, varied: dict[str, np.ndarray], fixed: dict[str, Any], dtype: str, reduction: str) -> Any:
    with jax.enable_x64(dtype == "float64"):
        arrays = {name: jnp.asarray(x, dtype) for name, x in varied.items()}
        accumulator = "float64" if dtype == "float64" else "float32"
        upstream = jnp.asarray(UPSTREAM if reduction == "none" else 1.0, accumulator)
        value, grads = value_and_grads(loss, arrays, {k: v for k, v in fixed.items() if v is not None}, upstream)
        assert value.dtype == accumulator
        assert all(grad.dtype == dtype for grad in grads.values())
        return np.asarray(value), {name: np.asarray(grad).astype(np.float64) for name, grad in grads.items()}


def assert_close(actual: np.ndarray, expected: np.ndarray, dtype: str, *, absolute: float, rounds: bool = True) -> None:
    """Within the arithmetic's error (`absolute`, for float32), plus one rounding to the dtype of the result."""
    absolute = absolute * 1e-8 if dtype == "float64" else absolute
    relative = float(jnp.finfo(dtype if rounds else "float32").eps) if dtype != "float64" else 1e-13
    tiny = float(jnp.finfo("float16").smallest_subnormal) if dtype == "float16" else 0.0
    np.testing.assert_allclose(actual, expected, rtol=relative, atol=absolute + tiny)


# Not the full product: compiling is what costs.
@pytest.mark.parametrize(
    ("dtype", "reduction"),
    [
        ("float32", "sum"),
        ("float32", "mean"),
        ("float32", "none"),
        ("bfloat16", "none"),
        ("float16", "sum"),
        ("float64", "mean"),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_cross_entropy(name: str, dtype: str, reduction: str) -> None:
    c = case(name)
    ignored = ignored_rows(c)
    losses, grads = ce_reference(rounded(c.logits, dtype), c.labels, ignored)
    loss = MaskedCrossEntropy(ignore_index=c.ignore_index, reduction=reduction, kernels=SMALL)
    value, actual = run(loss, {"logits": c.logits}, {"labels": c.labels, "mask": c.mask}, dtype, reduction)
    scale = max(losses.max(), 1.0) * (T if reduction == "sum" else 1)
    assert_close(value, total(losses, reduction, ignored), dtype, absolute=4e-7 * scale, rounds=False)
    expected = grads * factors(reduction, ignored)[:, None]
    assert_close(actual["logits"], expected, dtype, absolute=1e-6)
    assert (actual["logits"][ignored] == 0).all()


@pytest.mark.parametrize("name", ["ragged", "all_ignored", "tile_edges", "poisoned"])
@pytest.mark.parametrize(
    ("dtype", "reduction", "softcap"),
    [
        ("float32", "sum", 0.0),
        ("float32", "mean", 3.0),
        ("float32", "none", 3.0),
        ("bfloat16", "sum", 3.0),
        ("bfloat16", "none", 0.0),
        ("float16", "mean", 0.0),
        ("float64", "sum", 3.0),
        ("float64", "none", 0.0),
    ],
)
def test_fused_linear(dtype: str, reduction: str, softcap: float, name: str) -> None:
    rng = np.random.default_rng(3)
    hidden, weight = rng.normal(size=(T, H)), rng.normal(size=(V, H)) * 0.5
    c = case(name)
    ignored = ignored_rows(c)
    if name == "poisoned":
        hidden[ignored] = np.inf
        hidden[np.flatnonzero(ignored)[0]] = np.nan
    h, w = np.where(ignored[:, None], 0, rounded(hidden, dtype)), rounded(weight, dtype)
    z = h @ w.T
    capped = softcap * np.tanh(z / softcap) if softcap else z
    losses, grads = ce_reference(capped, c.labels, ignored)
    dz = grads * factors(reduction, ignored)[:, None] * (1 - (capped / softcap) ** 2 if softcap else 1)

    loss = FusedLinearCrossEntropy(c.ignore_index, softcap, reduction, kernels=SMALL)
    varied = {"hidden_states": hidden, "lm_weight": weight}
    value, actual = run(loss, varied, {"labels": c.labels}, dtype, reduction)
    scale = 10 * (T if reduction == "sum" else 1)
    assert_close(value, total(losses, reduction, ignored), dtype, absolute=1e-6 * scale, rounds=False)
    assert_close(actual["hidden_states"], dz @ w, dtype, absolute=2e-5)
    assert_close(actual["lm_weight"], dz.T @ h, dtype, absolute=2e-5)
    assert (actual["hidden_states"][ignored] == 0).all()


@pytest.mark.parametrize(
    ("dtype", "tau"), [("float32", 1.0), ("float32", 2.5), ("bfloat16", 2.5), ("float16", 1.0), ("float64", 2.5)]
)
@pytest.mark.parametrize("name", CASES)
def test_distillation(name: str, dtype: str, tau: float) -> None:
    c = case(name)
    ignored = ignored_rows(c._replace(mask=None))
    # A student's probability of 0 where the teacher's is not gives loss inf: the student gets finite logits.
    student = np.nan_to_num(c.logits, neginf=-30.0)[:, ::-1] if name == "minus_inf" else c.logits[::-1]
    if name == "poisoned":
        student = c.logits
    if name == "spread":  # KL of 1e4: the float32 gradient of the teacher has an error in proportion
        student = student * 1e-3
    losses, by_student, by_teacher = kd_reference(rounded(student, dtype), rounded(c.logits, dtype), ignored, tau)
    loss = KDLoss(c.ignore_index, tau, chunk_size=16, kernels=SMALL)
    varied = {"student_logits": student, "teacher_logits": c.logits}
    value, actual = run(loss, varied, {"labels": c.labels}, dtype, "mean")
    count = max((~ignored).sum(), 1)
    # Logits of 1e4 differ by up to that: their difference has the rounding errors of float32 at that size.
    size = max(np.abs(np.nan_to_num(losses)).max(), 1.0)
    assert_close(value, losses.sum() / count, dtype, absolute=2e-6 * size, rounds=False)
    assert_close(actual["student_logits"], by_student / count, dtype, absolute=1e-6)
    assert_close(actual["teacher_logits"], by_teacher / count, dtype, absolute=1e-6 * size)
    assert (actual["student_logits"][ignored] == 0).all()
    assert (actual["teacher_logits"][ignored] == 0).all()


def test_te_parallel_without_a_group_is_plain() -> None:
    c = case("masked")
    plain, te = MaskedCrossEntropy(reduction="mean"), TEParallelCrossEntropy(reduction="mean")
    logits = jnp.asarray(c.logits, "bfloat16")
    assert te(logits, c.labels, c.mask) == plain(logits, c.labels, c.mask)
    assert te(logits, c.labels, c.mask).dtype == jnp.float32


@pytest.mark.parametrize("fused", [False, True])
def test_loss_weights_and_count(fused: bool) -> None:
    rng = np.random.default_rng(5)
    hidden, weight, factor = rng.normal(size=(T, H)), rng.normal(size=(V, H)), rng.normal(size=T)
    labels = case("ragged").labels
    ignored = labels == IGNORE
    z = rounded(hidden, "float32") @ rounded(weight, "float32").T
    losses, grads = ce_reference(z, labels, ignored)
    factor[ignored] = np.inf  # must have no effect
    scale = np.where(ignored, 0, factor) / 11
    varied = {"hidden_states": hidden, "lm_weight": weight} if fused else {"logits": z}
    fixed = {"labels": labels, "num_label_tokens": np.int32(11)}
    loss = FusedLinearCrossEntropy(kernels=SMALL) if fused else MaskedCrossEntropy(kernels=SMALL)
    value, actual = run(loss, {**varied, "loss_weights": factor}, fixed, "float32", "sum")
    np.testing.assert_allclose(value, (scale * losses).sum(), rtol=1e-5)
    np.testing.assert_allclose(actual["loss_weights"], losses / 11, rtol=1e-5)
    assert (actual["loss_weights"][ignored] == 0).all()
    if not fused:
        np.testing.assert_allclose(actual["logits"], grads * scale[:, None], atol=1e-6)


def test_float32_weight_gradient_over_many_chunks() -> None:
    # Equal small addends, one per chunk: a sum kept in bfloat16 stops growing.
    hidden = jnp.full((16 * 60, 1), 1.0, "bfloat16")
    weight = jnp.zeros((2, 1), "bfloat16")
    labels = np.zeros(16 * 60, np.int32)
    loss = FusedLinearCrossEntropy(kernels=SMALL)
    grad = jax.grad(lambda w: loss(hidden, labels, w))(weight)
    np.testing.assert_allclose(np.asarray(grad, np.float64), [[-480], [480]], rtol=2**-8)


@pytest.mark.parametrize("largest", [0.0, 25.0, 60.0, 1e4])
@pytest.mark.parametrize("ignored", [np.nan, np.inf, -np.inf, 0.0])
def test_a_row_whose_largest_logit_is_far_above_the_others(largest: float, ignored: float) -> None:
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(8, 1000)).astype(np.float32)
    labels = rng.integers(0, 400, 8)
    logits[3, 900] = largest  # not the label, and after the first columns
    logits[5], labels[5] = ignored, IGNORE
    loss, grad = jax.jit(jax.value_and_grad(MaskedCrossEntropy(reduction="sum")))(jnp.asarray(logits), labels)
    z = np.delete(logits, 5, axis=0).astype(np.float64)
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    kept = np.delete(labels, 5)
    lse = z.max(-1) + np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1))
    np.testing.assert_allclose(loss, np.sum(lse - z[range(7), kept]), rtol=1e-6)
    p[range(7), kept] -= 1
    # exp(z - m) is off by 2.25 r u for r up to 64.
    np.testing.assert_allclose(np.delete(grad, 5, axis=0), p, rtol=(2.25 * 64 + 50) * 2.0**-24, atol=1e-30)
    assert not grad[5].any()
