"""Log-probability of the labels, and the entropy of their distribution, over logits.

    z = softcap(raw) / temperature,  p = softmax(z)
    logprob = log p_y,               d/dz = 1(v = y) - p
    entropy = -sum_v p_v log p_v,    d/dz = -p (log p + entropy)

With the entropy, the two results are stacked as loss [2, ...] for the check, and so is the upstream gradient.
"""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, R = results, 1 or 2

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from loss_core.dtypes import FloatFormat, compute_format, float_format
from loss_core.losses.bounds.rounding import (
    COEF_ROUNDINGS,
    TANH_ULPS,
    distances,
    entropy_errors,
    finite,
    log_softmax,
    softmax_errors,
    stored,
    through_softcap,
    zero_where_ignored,
)
from loss_core.losses.cases.random_fields import RANDOM_FIELDS
from loss_core.losses.cross_entropy import softcap
from loss_core.losses.definition import LABELS, Argument, Arrays, Floats, LossDef, OracleResult, Recipe, Upstream
from loss_core.losses.reduction import masked_rows, valid_tokens


class TokenResults(NamedTuple):
    """The oracle's results per token, before they are reshaped.

    Attributes:
        result_RT: log-probabilities, then entropies if the config has them.
        grad_TV: gradient of the objective by the raw logits.
    """

    result_RT: Floats
    grad_TV: Floats


def token_results(config: Any, raw_TV: Floats, arrays: Arrays, upstream: Upstream) -> TokenResults:
    """Results of each token, and the gradient by raw logits; 0 where ignored, NaN for a label outside [0, V)."""
    keep_T, up_RT = valid_tokens(arrays, config.ignore_index), upstream_of(config, arrays, upstream)
    tau_T1 = temperature_of(config, arrays)[:, None]
    z_TV, slope_TV = softcap(raw_TV, config.logit_softcapping)
    labels_T, vocab = np.asarray(arrays["labels"]).reshape(-1).astype(np.int64), z_TV.shape[1]
    is_class_T = (labels_T >= 0) & (labels_T < vocab)
    log_p_TV = np.where((is_class_T | ~keep_T)[:, None], log_softmax(z_TV / tau_T1), np.nan)
    p_TV = np.exp(log_p_TV)
    rows = np.flatnonzero(keep_T)
    labels = np.where(is_class_T, labels_T, 0)[rows]
    result_RT = np.zeros(up_RT.shape)
    result_RT[0, rows] = log_p_TV[rows, labels]
    dz_TV = -p_TV * up_RT[0, :, None]
    dz_TV[rows, labels] += up_RT[0, rows]
    if config.entropy:
        weighted_TV = p_TV * np.where(p_TV == 0, 0.0, log_p_TV)
        entropy_T = -np.sum(weighted_TV, axis=-1)
        result_RT[1] = np.where(keep_T, entropy_T, 0.0)
        dz_TV -= up_RT[1, :, None] * (weighted_TV + p_TV * entropy_T[:, None])
    return TokenResults(result_RT, np.where(keep_T[:, None], dz_TV * slope_TV / tau_T1, 0.0))


def temperature_of(config: Any, arrays: Arrays) -> Floats:
    """Temperature of each token [T]: the argument of the call if given, else the config field."""
    given = arrays.get("temperature")
    value = np.asarray(config.temperature if given is None else given, np.float64)
    return np.broadcast_to(value, np.shape(arrays["labels"])).reshape(-1)


def upstream_of(config: Any, arrays: Arrays, upstream: Upstream) -> Floats:
    """Derivative of the objective by each result [R, T]; ones if upstream is None."""
    shape = (results_of(config), valid_tokens(arrays, config.ignore_index).size)
    return np.ones(shape) if upstream is None else np.asarray(upstream, np.float64).reshape(shape)


def results_of(config: Any) -> int:
    """Number of results per token."""
    return 2 if config.entropy else 1


def reshaped(config: Any, result_RT: Floats, arrays: Arrays) -> Floats:
    """Results in the shape of labels, with a first axis for the two results if there are two."""
    lead = np.shape(arrays["labels"])
    return result_RT.reshape((2, *lead) if config.entropy else lead)


def oracle(config: Any, arrays: Arrays, upstream: Upstream) -> OracleResult:
    """Log-probabilities, entropies and the gradient by the logits."""
    raw_TV = masked_rows(arrays["logits"], valid_tokens(arrays, config.ignore_index))
    found = token_results(config, raw_TV, arrays, upstream)
    grad = found.grad_TV.reshape(np.shape(arrays["logits"]))
    return OracleResult(reshaped(config, found.result_RT, arrays), {"logits": grad})


def token_errors(
    config: Any, raw_TV: Floats, err_raw_T: Floats, arrays: Arrays, upstream: Upstream, inner: FloatFormat
) -> tuple[Floats, Floats]:
    """Errors of the results [R, T], and of the gradient [T, V] by raw logits that are off by err_raw.

    z = softcap / temperature is rounded twice. A log-probability is the target's z minus lse. The entropy's gradient
    p (log p + H) is computed from d and H, each rounded before they cancel; d as in `entropy_errors`.
    """
    keep_T, up_RT, u = valid_tokens(arrays, config.ignore_index), np.abs(upstream_of(config, arrays, upstream)), inner.u
    cap, tau_T = config.logit_softcapping, temperature_of(config, arrays)
    z_TV, slope_TV = softcap(raw_TV, cap)
    err_z_T = (err_raw_T + (TANH_ULPS * u if cap else 0.0) * np.max(np.abs(finite(raw_TV)), axis=-1)) / tau_T
    z_TV = z_TV / tau_T[:, None]
    scaled_T = np.where(tau_T == 1, 0.0, 2 * u)
    sm = softmax_errors(z_TV, err_z_T + scaled_T * np.max(np.abs(finite(z_TV)), axis=-1), inner)
    rows = np.arange(keep_T.size)
    labels = np.clip(np.asarray(arrays["labels"]).reshape(-1), 0, z_TV.shape[-1] - 1).astype(np.int64)
    err_RT = np.zeros(up_RT.shape)
    err_RT[0] = (
        sm.err_lse_T
        + err_z_T
        + u * (3 * np.abs(finite(z_TV[rows, labels])) + 2 * np.abs(finite(sm.log_p_TV[rows, labels])))
    )
    hit_TV = np.zeros_like(z_TV)
    hit_TV[rows, labels] = 1.0
    dz_TV = up_RT[0, :, None] * np.abs(hit_TV - sm.p_TV)
    err_dz_TV = up_RT[0, :, None] * sm.err_p_TV + u * (1 + COEF_ROUNDINGS) * dz_TV
    if config.entropy:
        log_p_TV, d_TV = finite(sm.log_p_TV), distances(sm)
        err_d_T1 = (sm.err_lse_T + 2 * err_z_T)[:, None]
        spread_T = np.sum(sm.p_TV * d_TV, axis=-1)
        entropy_T = -np.sum(sm.p_TV * log_p_TV, axis=-1)
        err_RT[1] = entropy_errors(sm, err_z_T, u)
        centred_TV = np.abs(log_p_TV + entropy_T[:, None])
        err_centred_TV = err_d_T1 + err_RT[1, :, None] + u * (3 + COEF_ROUNDINGS) * (d_TV + spread_T[:, None])
        err_dz_TV += up_RT[1, :, None] * (sm.err_p_TV * centred_TV + sm.p_TV * err_centred_TV)
        dz_TV += up_RT[1, :, None] * sm.p_TV * centred_TV
    # A gradient below the normal range may be flushed to 0 before 1 / temperature brings it back into the range.
    flushed_T = inner.near_zero / np.minimum(tau_T, 1.0)
    err_dz_TV = (err_dz_TV + scaled_T[:, None] * dz_TV) / tau_T[:, None] + flushed_T[:, None]
    _, err_TV = through_softcap(dz_TV / tau_T[:, None], err_dz_TV, slope_TV, cap, err_raw_T, u)
    return np.where(keep_T, finite(err_RT), 0.0), np.where(keep_T[:, None], finite(err_TV), 0.0)


def error_bound(
    config: Any, arrays: Arrays, expected: OracleResult, dtype: str, upstream: Upstream, product_dtype: str | None
) -> dict[str, Floats]:
    """Rounding errors of each token's results, and of the stored gradient."""
    keep_T, inner = valid_tokens(arrays, config.ignore_index), compute_format(dtype)
    raw_TV = masked_rows(arrays["logits"], keep_T)
    err_RT, err_TV = token_errors(config, raw_TV, np.zeros(len(raw_TV)), arrays, upstream, inner)
    grad = expected.grads["logits"]
    allowed = stored(finite(grad), err_TV.reshape(grad.shape), float_format(dtype))
    loss = stored(finite(expected.loss), reshaped(config, err_RT, arrays), inner)
    return {"loss": loss, "logits": zero_where_ignored(allowed, keep_T)}


def _temperatures(drawn: Any) -> None:
    drawn.arrays["temperature"] = np.exp(drawn.rng.standard_normal(drawn.arrays["labels"].shape) / 2)


TEMPERATURE = Argument("temperature", ("T",), differentiated=False, optional=True)

RECIPES = (
    Recipe("entropy", "one of two upstream gradients used for both results", {"entropy": True}, extras=("upstream",)),
    Recipe("temperature", "a temperature before the softcap, or missing in the gradient",
           {"entropy": True, "temperature": 2.5, "logit_softcapping": 5.0}, extras=("upstream",)),
    Recipe("temperature-per-token", "the first token's temperature used for all", {"entropy": True},
           change=_temperatures, extras=("upstream",)),
    Recipe("entropy-minus-inf", "0 times -inf in the entropy", {"entropy": True}, scale=1e4, extras=("upstream",)),
)  # fmt: skip

DEFINITION = LossDef(
    "log_probs",
    (Argument("logits", ("T", "V")), LABELS, TEMPERATURE),
    oracle,
    error_bound,
    RECIPES,
    random_fields=RANDOM_FIELDS,
    reduction=lambda config: "none",
    results=results_of,
    row_numbers=4,
)
