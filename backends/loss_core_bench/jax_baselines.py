"""The baselines on JAX, each as a function of the forward arguments of our losses. The runner adds jit."""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from loss_core.baselines import BASELINES
from loss_core.bench.measure.job import Job
from loss_core.dispatch.protocol import BackendUnavailable
from loss_core.loss_config import LossConfig
from loss_core_baselines import build

Loss = Callable[..., jax.Array]


def baseline_loss(name: str, config: LossConfig, job: Job) -> Loss:
    """The loss function of a baseline.

    Raises:
        BackendUnavailable: if the baseline does not support the config or the job.
    """
    BASELINES[name].check(config)
    return _ADAPTERS[name](config, job)


def _reduced(config: Any, loss_T: jax.Array, labels_T: jax.Array) -> jax.Array:
    """Masking and reduction of a loss per token, as its users write them."""
    keep_T = labels_T != config.ignore_index
    loss_T = jnp.where(keep_T, loss_T, 0)
    reduction = getattr(config, "reduction", "mean")
    if reduction == "none":
        return loss_T
    return loss_T.sum() / keep_T.sum() if reduction == "mean" else loss_T.sum()


def _over_logits(config: Any, job: Job, per_token: Callable[[jax.Array, jax.Array], jax.Array]) -> Loss:
    """A loss over logits or over hidden states, from a loss per token of float32 logits."""

    def logits_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        wide_TV = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        if cap := config.logit_softcapping:
            wide_TV = cap * jnp.tanh(wide_TV / cap)
        safe_labels_T = jnp.where(labels == config.ignore_index, 0, labels)
        return _reduced(config, per_token(wide_TV, safe_labels_T), labels)

    def fused_loss(hidden_states: jax.Array, lm_weight: jax.Array, labels: jax.Array) -> jax.Array:
        wide = jnp.promote_types(hidden_states.dtype, jnp.float32)
        return logits_loss(jnp.matmul(hidden_states, lm_weight.T, preferred_element_type=wide), labels)

    return fused_loss if job.definition.products else logits_loss


def _over_distributions(config: Any, per_token: Callable[[jax.Array, jax.Array], jax.Array]) -> Loss:
    """A distillation loss, from a divergence per token of student log-probabilities and teacher probabilities."""

    def loss(student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array) -> jax.Array:
        wide = jnp.promote_types(student_logits.dtype, jnp.float32)
        log_ps_TV = jax.nn.log_softmax(student_logits.astype(wide) / config.temperature)
        pt_TV = jax.nn.softmax(teacher_logits.astype(wide) / config.temperature)
        return config.temperature**2 * _reduced(config, per_token(log_ps_TV, pt_TV), labels)

    return loss


def _plain_jax(config: Any, job: Job) -> Loss:
    if job.definition.name == "distillation":
        return _over_distributions(
            config,
            lambda log_ps_TV, pt_TV: jnp.where(pt_TV > 0, pt_TV * (jnp.log(pt_TV) - log_ps_TV), 0).sum(-1),
        )
    return _over_logits(
        config,
        job,
        lambda logits_TV, labels_T: -jnp.take_along_axis(jax.nn.log_softmax(logits_TV), labels_T[:, None], -1)[:, 0],
    )


def _optax(config: Any, job: Job) -> Loss:
    losses = importlib.import_module("optax").losses
    if job.definition.name == "distillation":
        return _over_distributions(config, losses.kl_divergence)
    return _over_logits(config, job, losses.softmax_cross_entropy_with_integer_labels)


def _jax_cce(config: Any, job: Job) -> Loss:
    _refuse_ignored(job, "jax-cce")
    return build("jax-cce", config)


def _tokamax(config: Any, job: Job) -> Loss:
    _refuse_ignored(job, "tokamax")
    return build("tokamax", config)


def _refuse_ignored(job: Job, name: str) -> None:
    if job.num_valid_tokens < job.shape[0]:
        raise BackendUnavailable(f"{name} has no ignore_index: use --ignored 0.")


_ADAPTERS: dict[str, Callable[[Any, Job], Loss]] = {
    "plain-jax": _plain_jax,
    "optax": _optax,
    "jax-cce": _jax_cce,
    "tokamax": _tokamax,
}
