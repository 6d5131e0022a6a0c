"""Metrics of cross entropy in the oracle: values and error bounds.

Per token, with z its logits after the softcap and lse their log-sum-exp,

    accuracy = 1(z_y = max_v z_v),  entropy = -sum_v p_v log p_v,  lse,  z_loss = l lse^2

each reduced as the loss is; and the number of valid tokens. For the check they are stacked after the loss in the order
of their names, and so is the upstream gradient, whose entries for metrics have no effect.
"""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, R = results

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.dtypes import compute_format, float_format
from loss_core.field_checks import NUM_VALID
from loss_core.losses.bounds.rounding import (
    SoftmaxErrors,
    entropy_errors,
    finite,
    log_softmax,
    result_dtype,
    result_errors,
    stored,
)
from loss_core.losses.definition import Floats, Upstream
from loss_core.losses.reduction import TokenResult


def names_of(config: Any) -> tuple[str, ...]:
    """The metrics of a config, sorted by name; () for a config without the field."""
    return tuple(sorted(getattr(config, "metrics", ())))


def results_of(config: Any) -> int:
    """Number of results: the loss and its metrics."""
    return 1 + len(names_of(config))


def upstream_of_loss(config: Any, upstream: Upstream) -> Upstream:
    """Upstream gradient of the loss, without those of the metrics."""
    return upstream if upstream is None or not names_of(config) else np.asarray(upstream)[0]


def with_metrics(config: Any, result: TokenResult, z_TV: Floats, labels_T: NDArray[Any]) -> TokenResult:
    """The oracle's result with its metrics stacked after the loss; unchanged without metrics."""
    names = names_of(config)
    if not names:
        return result
    return replace(result, loss=np.stack([result.loss, *(_reduced(config, x, result, z_TV, labels_T) for x in names)]))


def result_and_metric_errors(
    config: Any, sm: SoftmaxErrors, labels_T: NDArray[Any], expected: TokenResult, err_T: Floats, err_z_T: Floats,
    dtype: str, upstream: Upstream,
) -> dict[str, Floats]:  # fmt: skip
    """As `result_errors`, with the errors of the metrics stacked after those of the loss.

    Args:
        err_T: error of each token's loss; err_z_T: of its logits.
    """
    names = names_of(config)
    if not names:
        return result_errors(config, expected, err_T, dtype, upstream)
    alone = replace(expected, loss=expected.loss[0])
    result = result_errors(config, alone, err_T, dtype, upstream_of_loss(config, upstream))
    found = [result["loss"]]
    for name, reduced in zip(names, expected.loss[1:], strict=True):
        if name == NUM_VALID:
            found.append(stored(reduced, np.zeros_like(reduced), float_format(result_dtype(config, dtype))))
            continue
        metric_T = np.where(expected.reduction.keep_T, _token_metric(config, name, sm.z_TV, labels_T), 0.0)
        err_metric_T = _token_metric_errors(config, name, sm, labels_T, err_z_T, compute_format(dtype).u)
        err_metric_T = np.where(expected.reduction.keep_T, finite(err_metric_T), 0.0)
        of_metric = replace(alone, loss=reduced, token_loss_T=metric_T)
        found.append(result_errors(config, of_metric, err_metric_T, dtype, None)["loss"])
    return result | {"loss": np.stack(found)}


def _reduced(config: Any, name: str, result: TokenResult, z_TV: Floats, labels_T: NDArray[Any]) -> Floats:
    """One metric, reduced to the shape of the loss."""
    reduction = result.reduction
    if name == NUM_VALID:
        return np.full(np.shape(result.loss), float(reduction.keep_T.sum()))
    return reduction.loss(np.where(reduction.keep_T, _token_metric(config, name, z_TV, labels_T), 0.0))


def _token_metric(config: Any, name: str, z_TV: Floats, labels_T: NDArray[Any]) -> Floats:
    if name == "accuracy":
        return np.asarray(_gap(z_TV, labels_T) == 0, np.float64)
    log_p_TV = log_softmax(z_TV)
    if name == "entropy":
        p_TV = np.exp(log_p_TV)
        weighted_TV = p_TV * np.where(p_TV == 0, 0.0, log_p_TV)
        return np.asarray(-np.sum(weighted_TV, axis=-1))
    lse_T = np.asarray(np.max(z_TV, axis=-1) - np.max(log_p_TV, axis=-1))
    return lse_T if name == "lse" else float(config.z_loss) * lse_T**2


def _gap(z_TV: Floats, labels_T: NDArray[Any]) -> Floats:
    """The largest logit minus the label's."""
    inside_T = np.clip(labels_T.astype(np.int64), 0, z_TV.shape[-1] - 1)
    return np.asarray(np.max(z_TV, axis=-1) - z_TV[np.arange(labels_T.size), inside_T])


def _token_metric_errors(
    config: Any, name: str, sm: SoftmaxErrors, labels_T: NDArray[Any], err_z_T: Floats, u: float
) -> Floats:
    """Error of one metric of each token.

    Accuracy may be 0 or 1 where the two logits are closer than their errors and the 8 u |m| up to which they are equal.
    """
    if name == "accuracy":
        gap_T = _gap(sm.z_TV, labels_T)
        near_T = 2 * err_z_T + 10 * u * np.abs(finite(np.max(sm.z_TV, axis=-1)))
        return np.where((gap_T > 0) & (gap_T <= near_T), 1.0, 0.0)
    if name == "entropy":
        return entropy_errors(sm, err_z_T, u)
    if name == "lse":
        return sm.err_lse_T
    return float(config.z_loss) * np.abs(sm.lse_T) * (2 * sm.err_lse_T + 4 * u * np.abs(sm.lse_T))
