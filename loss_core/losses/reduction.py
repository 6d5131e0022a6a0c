"""The oracle's reduction of the losses of all tokens to the result, and its gradient."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.losses.definition import Arrays, Floats, OracleResult, Upstream


def valid_tokens(arrays: Arrays, ignore_index: int) -> NDArray[np.bool_]:
    """Which tokens are valid [T]: the label is not ignore_index, and the mask, if any, is not 0."""
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
        count: divisor of a sum; None for 1. With 0 ("no tokens") the result is 0.
        weights: weight of each token, shape of labels; None for ones.
    """

    kind: str
    shape: tuple[int, ...]
    keep_T: NDArray[np.bool_]
    count: NDArray[Any] | None = None
    weights: NDArray[Any] | None = None

    @property
    def scale(self) -> float:
        """Factor of the weighted sum over tokens."""
        kept = int(self.keep_T.sum())
        if self.kind == "mean":
            return 1.0 / kept if kept else 0.0
        if self.kind == "none" or self.count is None:
            return 1.0
        return 1.0 / float(self.count) if float(self.count) != 0 else 0.0

    def loss(self, loss_T: Floats) -> Floats:
        """The result, from the loss of each token."""
        if self.kind == "none":
            return loss_T.reshape(self.shape)
        scale = self.scale
        # A scale of 0 means "no tokens": the loss is 0 even if the losses of tokens are NaN.
        return np.asarray(np.sum(np.where(self.keep_T, self._token_weights() * loss_T, 0.0)) * scale if scale else 0.0)

    def coefficients(self, upstream: Upstream, *, weighted: bool = True) -> Floats:
        """Derivative of the objective by each token's loss [T].

        Args:
            upstream: derivative of the objective by the result; None for ones.
            weighted: whether to include the token weights.
        """
        up = np.ones(()) if upstream is None else np.asarray(upstream, np.float64)
        if self.kind == "none":
            return np.where(self.keep_T, up.reshape(-1), 0.0)
        weights_T = self._token_weights() if weighted else np.ones(self.keep_T.shape)
        return np.where(self.keep_T, weights_T * self.scale * up, 0.0)

    def weights_grad(self, loss_T: Floats, upstream: Upstream) -> dict[str, Floats]:
        """The gradient of loss_weights as a dict; empty without weights."""
        if self.weights is None or self.kind == "none":
            return {}
        up = 1.0 if upstream is None else np.asarray(upstream, np.float64)
        return {"loss_weights": np.asarray(loss_T * self.scale * up).reshape(np.shape(self.weights))}

    def _token_weights(self) -> Floats:
        return np.ones(self.keep_T.shape) if self.weights is None else np.asarray(self.weights, np.float64).reshape(-1)


@dataclass(frozen=True)
class TokenResult(OracleResult):
    """An oracle's result, with the intermediate values that the error bounds need.

    Attributes:
        token_loss_T: loss of each token before reduction, 0 where ignored.
        coef_T: derivative of the objective by each token's loss.
        reduction: the reduction of the call.
    """

    token_loss_T: Floats
    coef_T: Floats
    reduction: Reduction

    def size(self, upstream: Upstream) -> float:
        """Sum over tokens of |upstream * loss|; metrics have no gradient and are excluded."""
        return float(np.sum(np.abs(self.coef_T * self.token_loss_T)))


def times_rows(coef_T: Floats, grad_TV: Floats) -> Floats:
    """coef * grad for each row; exactly 0 where the coefficient is 0."""
    return np.where(coef_T[:, None] == 0, 0.0, coef_T[:, None] * grad_TV)


def masked_rows(values: NDArray[Any], keep_T: NDArray[np.bool_]) -> Floats:
    """[..., n] as float64 rows [T, n], with zeros in ignored rows, whose values (even NaN) must not matter."""
    return np.where(keep_T[:, None], np.asarray(values, np.float64).reshape(-1, np.shape(values)[-1]), 0.0)
