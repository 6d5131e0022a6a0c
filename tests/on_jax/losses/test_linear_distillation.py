"""FusedLinearKDLoss on JAX against KDLoss over the logits of both heads, with small chunks and tiles in every loop."""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loss_core_jax import FusedLinearKDLoss, KDLoss
from loss_core_jax.kernels.xla import CPU, XlaKernels

# Chunks of 16 tokens and tiles of 128 classes, neither a divisor.
T, V, H = 37, 507, 16
SIZES = CPU._replace(logits_bytes=0, row_bytes=0, pair_bytes=0, chunk=(16, 16), tile=128)
SMALL = XlaKernels(cpu=SIZES, accelerator=SIZES._replace(is_cpu=False))
FIELDS: dict[str, dict[str, Any]] = {
    "forward_kl": {"temperature": 2.0},
    "reverse_kl": {"divergence": "reverse_kl", "temperature": 0.5},
    "jsd": {"divergence": "jsd", "beta": 0.3},
}
LABELS = np.where(np.arange(T) % 5 == 0, -100, 3)
every_divergence = pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
# KL(student || teacher) is KL(teacher || student) with the roles exchanged.
one_kl_and_jsd = pytest.mark.parametrize(
    "fields",
    [pytest.param(FIELDS[name], id=name, marks=[pytest.mark.slow] * (name == "reverse_kl")) for name in FIELDS],
)


def heads_of(tokens: int = T, vocab: int = V, hidden: int = H) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = ((tokens, hidden), (vocab, hidden), (tokens, hidden + 3), (vocab, hidden + 3))
    return [rng.standard_normal(shape) / (shape[1] ** 0.5 if shape[0] == vocab else 1) for shape in shapes]


def fused_loss(fields: dict[str, Any], labels: np.ndarray = LABELS) -> Callable[..., jax.Array]:
    loss = FusedLinearKDLoss(**fields, kernels=SMALL)
    return lambda *heads: loss(*heads, labels)


def logits_loss(fields: dict[str, Any], labels: np.ndarray = LABELS) -> Callable[..., jax.Array]:
    loss = KDLoss(**fields)
    return lambda hs, ws, ht, wt: loss(hs @ ws.T, ht @ wt.T, labels)


def close(got: Any, expected: Any, tolerance: float = 1e-11) -> None:
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * np.abs(other).max())


@every_divergence
def test_agrees_with_kd_loss_over_the_logits(fields: dict[str, Any]) -> None:
    with jax.enable_x64(True):
        heads = [jnp.asarray(x) for x in heads_of()]
        both = [jax.value_and_grad(f(fields), argnums=(0, 1, 2, 3)) for f in (fused_loss, logits_loss)]
        got, expected = (jax.jit(f)(*heads) for f in both)
        close(got, expected)


@every_divergence
def test_ignored_rows_do_not_affect_results(fields: dict[str, Any]) -> None:
    heads = [jnp.asarray(x, "float32") for x in heads_of()]
    call = jax.jit(jax.value_and_grad(fused_loss(fields), argnums=(0, 1, 2, 3)))
    expected = call(*heads)
    for position in (0, 2):
        heads[position] = heads[position].at[::5].set(jnp.nan)
    value, grads = call(*heads)
    close((value, grads), expected, 0.0)
    assert not any(np.asarray(grads[position][::5]).any() for position in (0, 2))


def products(argnums: tuple[int, ...], fields: dict[str, Any]) -> int:
    """Number of products in the program of a gradient before XLA removes any; one in a loop counts once."""
    loss = FusedLinearKDLoss(**fields, kernels=XlaKernels(cpu=SIZES, accelerator=SIZES))
    heads = [jnp.asarray(x, "float32") for x in heads_of()]
    return str(jax.make_jaxpr(jax.grad(lambda *h: loss(*h, LABELS), argnums=argnums))(*heads)).count("dot_general[")


@every_divergence
def test_a_gradient_that_is_not_needed_costs_no_product(fields: dict[str, Any]) -> None:
    # One for the logits of each head, and one for each gradient.
    assert products((0, 1), fields) == 4
    assert products((0,), fields) == 3
    assert products((0, 1, 2, 3), fields) == 6


@one_kl_and_jsd
def test_second_derivatives(fields: dict[str, Any]) -> None:
    labels = LABELS[:6]
    with jax.enable_x64(True):
        heads = [jnp.asarray(x) for x in heads_of(6, 140, 4)]

        def squared(f: Any) -> Any:
            def norm(*heads: jax.Array) -> Any:
                return sum(jnp.sum(g**2) for g in jax.grad(f, argnums=(0, 1, 2, 3))(*heads))

            return jax.jit(jax.grad(norm, argnums=(0, 1, 2, 3)))(*heads)

        close(squared(fused_loss(fields, labels)), squared(logits_loss(fields, labels)), 1e-9)


@one_kl_and_jsd
def test_vmap(fields: dict[str, Any]) -> None:
    hs, ws, ht, wt = (jnp.asarray(x, "float32") for x in heads_of(8, 140, 4))
    call = jax.jit(jax.grad(fused_loss(fields, LABELS[:8]), argnums=(0, 1)))
    factors = jnp.asarray([0.5, 1.0, 2.0])
    got = jax.jit(jax.vmap(lambda factor: call(hs * factor, ws, ht, wt)))(factors)
    for index, factor in enumerate(factors):
        close([x[index] for x in got], call(hs * factor, ws, ht, wt), 1e-5)


def test_weights_and_a_count() -> None:
    with jax.enable_x64(True):
        heads, weights = [jnp.asarray(x) for x in heads_of()], jnp.linspace(-1.0, 2.0, T)

        def with_weights(loss: Any) -> Any:
            return lambda weights, *heads: loss(*heads, LABELS, 7, weights)

        def by_logits(hs: Any, ws: Any, ht: Any, wt: Any, *more: Any) -> jax.Array:
            return KDLoss()(hs @ ws.T, ht @ wt.T, *more)

        got, expected = (
            jax.value_and_grad(with_weights(loss), argnums=(0, 1, 2))(weights, *heads)
            for loss in (FusedLinearKDLoss(kernels=SMALL), by_logits)
        )
        close(got, expected)


# (position among the arguments, wrong argument, error, its message)
WRONG: dict[str, tuple[int, Any, type[Exception], str]] = {
    "classes": (3, np.zeros((12, 5), np.float32), ValueError, r"\(11, 4\) but teacher_lm_weight has shape \(12, 5\)"),
    "tokens": (
        2,
        np.zeros((7, 5), np.float32),
        ValueError,
        r"labels has shape \(6,\) but teacher_hidden_states has shape \(7, 5\)",
    ),
    "student's H": (1, np.zeros((11, 3)), ValueError, r"student_lm_weight has shape \(11, 3\)"),
    "integers": (0, np.zeros((6, 4), int), TypeError, "student_hidden_states must be a floating array"),
    "dtypes": (1, np.zeros((11, 4), np.float16), TypeError, "student_lm_weight has dtype float16"),
    "no array": (3, [[1.0]], TypeError, "teacher_lm_weight must be a jax or NumPy array"),
    "float labels": (4, np.zeros(6), TypeError, "labels must be integers"),
    "weights without a count": (6, np.ones(6), ValueError, "num_batch_labels"),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_errors_name_the_wrong_argument(wrong: tuple[int, Any, type[Exception], str]) -> None:
    position, value, error, message = wrong
    arguments: list[Any] = [*(x.astype(np.float32) for x in heads_of(6, 11, 4)), LABELS[:6], None, None]
    arguments[2], arguments[3] = arguments[2][:, :5], arguments[3][:, :5]
    arguments[position] = value
    with pytest.raises(error, match=message):
        FusedLinearKDLoss()(*arguments)
