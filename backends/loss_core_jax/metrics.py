"""Metrics of a call, beside its loss: from those of rows to what the caller gets."""

# T = tokens (any leading dimensions)

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from loss_core.field_checks import NUM_VALID, TOKEN_METRICS
from loss_core.row_terms import RowTerms, token_metrics
from loss_core_jax.inputs import IGNORED
from loss_core_jax.reduction import valid_losses

# What a cross entropy returns: its loss, or with metrics a pair.
Result = jax.Array | tuple[jax.Array, dict[str, jax.Array]]


def of_rows(names: Sequence[str]) -> tuple[str, ...]:
    """Those that each row has: all but the number of tokens."""
    return tuple(name for name in names if name in TOKEN_METRICS)


def made(terms: RowTerms, target: jax.Array, objective: Any, names: Sequence[str]) -> tuple[jax.Array, ...]:
    """Each metric of the rows, shape of target; 0 where the row is ignored, NaN where its label is invalid.

    Args:
        objective: a `CrossEntropy`, if there are names.
    """
    return tuple(valid_losses(x, target) for x in token_metrics(jnp, terms, objective, names))


def with_metrics(
    names: Sequence[str],
    loss: jax.Array,
    found: Sequence[jax.Array],
    target: jax.Array,
    reduced: Callable[[jax.Array], jax.Array],
) -> Result:
    """The loss; with metrics, also a dict of them, not differentiated: reduced, and the number of valid tokens.

    Args:
        found: of `of_rows(names)`.
        target: of all rows, classes or IGNORED or INVALID.
        reduced: as the loss is.
    """
    if not names:
        return loss
    values: dict[str, Any] = dict(zip(of_rows(names), map(reduced, found), strict=True))
    values[NUM_VALID] = jnp.sum(target != IGNORED)
    return loss, {name: lax.stop_gradient(values[name]) for name in names}
