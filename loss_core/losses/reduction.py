"""From the tokens' losses to the result, as the oracle does it."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.losses.definition import Arrays, Floats, OracleResult, Upstream


def kept_tokens(arrays: Arrays, ignore_index: int) -> NDArray[np.bool_]:
    """Valid tokens [T]: their label is not ignore_index, and their mask, if there is one, is not 0."""
    labels = np.asarray(arrays["labels"])
    keep = labels != ignore_index
    mask = arrays.get("mask")
    if mask is not None:
        keep = keep & np.broadcast_to(np.asarray(mask) != 0, labels.shape)
    return np.asarray(keep.reshape(-1))


@dataclass(frozen=True)
class Reduction:
    """How the tokens of one call are reduced.

    Attributes:
        kind: "sum", "mean" (over valid tokens) or "none".
        shape: of labels.
        keep_T: valid tokens.
        count: divisor of a sum, None for 1; 0 stands for "no tokens".
        weights: of the tokens, shape of labels; None for ones.
    """

    kind: str
    shape: tuple[int, ...]
    keep_T: NDArray[np.bool_]
    count: NDArray[Any] | None = None
    weights: NDArray[Any] | None = None

    @property
    def scale(self) -> float:
        """Factor of the weighted sum of the tokens' losses."""
        kept = int(self.keep_T.sum())
        if self.kind == "mean":
            return 1.0 / kept if kept else 0.0
        if self.kind == "none" or self.count is None:
            return 1.0
        return 1.0 / float(self.count) if float(self.count) != 0 else 0.0

    def loss(self, loss_T: Floats) -> Floats:
        """The result."""
        if self.kind == "none":
            return loss_T.reshape(self.shape)
        scale = self.scale
        # A scale of 0 stands for "no tokens": the loss is 0 whatever the tokens hold.
        return np.asarray(np.sum(np.where(self.keep_T, self._token_weights() * loss_T, 0.0)) * scale if scale else 0.0)

    def coefficients(self, upstream: Upstream, *, weighted: bool = True) -> Floats:
        """Derivative of the objective by each token's loss [T].

        Args:
            upstream: derivative of the objective by the result; None for ones.
            weighted: False leaves the weights out.
        """
        up = np.ones(()) if upstream is None else np.asarray(upstream, np.float64)
        if self.kind == "none":
            return np.where(self.keep_T, up.reshape(-1), 0.0)
        weights_T = self._token_weights() if weighted else np.ones(self.keep_T.shape)
        return np.where(self.keep_T, weights_T * self.scale * up, 0.0)

    def weights_grad(self, loss_T: Floats, upstream: Upstream) -> dict[str, Floats]:
        """The gradient of loss_weights, where they were given."""
        if self.weights is None or self.kind == "none":
            return {}
        up = 1.0 if upstream is None else np.asarray(upstream, np.float64)
        return {"loss_weights": np.asarray(loss_T * self.scale * up).reshape(np.shape(self.weights))}

    def _token_weights(self) -> Floats:
        return np.ones(self.keep_T.shape) if self.weights is None else np.asarray(self.weights, np.float64).reshape(-1)


@dataclass(frozen=True)
class TokenResult(OracleResult):
    """An oracle's result, with what the error bounds of this library need besides.

    Attributes:
        token_loss_T: loss of each token before reduction, 0 where ignored.
        coef_T: derivative of the objective by each token's loss.
        reduction: of the call.
    """

    token_loss_T: Floats
    coef_T: Floats
    reduction: Reduction

    def size(self, upstream: Upstream) -> float:
        """Sum over the tokens; metrics, of which there is no gradient, are none of it."""
        return float(np.sum(np.abs(self.coef_T * self.token_loss_T)))


def times_rows(coef_T: Floats, grad_TV: Floats) -> Floats:
    """coef * grad, with a coefficient of 0 giving exactly 0."""
    return np.where(coef_T[:, None] == 0, 0.0, coef_T[:, None] * grad_TV)


def kept_rows(values: NDArray[Any], keep_T: NDArray[np.bool_]) -> Floats:
    """[..., n] as float64 rows [T, n], with 0 where ignored: what is there must not matter, not even a NaN."""
    return np.where(keep_T[:, None], np.asarray(values, np.float64).reshape(-1, np.shape(values)[-1]), 0.0)
