"""Base classes of the losses of one distribution per token: from checked arguments to the result."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from loss_core.row_terms import Objective, TopK, token_metrics
from loss_core_torch import inputs
from loss_core_torch.inputs import Tokens
from loss_core_torch.kernels import Linear, Rows, WholeLosses
from loss_core_torch.modules.base import Kernels, LossModule, check_shards
from loss_core_torch.reduction import coefficients, reduce_tokens, zero_where_ignored


class RowModule(LossModule):
    """A loss that is an `Objective` of each token's distribution. A subclass defines `_tokens` and `_loss`."""

    ignore_index: int
    logit_softcapping: float = 0.0
    fp32_upcast: bool = True
    # Arguments with one value per token, other than labels.
    _token_arguments: tuple[str, ...] = ()

    def _tokens(
        self, of: str, like: Tensor, lead: torch.Size, labels: Any, args: Mapping[str, Any], vocab: int | None = None
    ) -> Tokens:
        """The per-token arguments of a call, checked.

        Args:
            of: name of the tensor `like`, whose leading shape is `lead`.
            args: the other arguments by name.
            vocab: number of classes, where it is known yet.
        """
        raise NotImplementedError

    def _validated(self, tokens: Tokens, vocab: int) -> Tokens:
        """The tokens after checks against the size of the vocabulary."""
        return inputs.resolve_keep(inputs.in_range(tokens, vocab, self.ignore_index))

    def _loss(self, call: RowCall) -> Any:
        """The result of the module for this rank's tokens."""
        raise NotImplementedError

    def _returns_tokens(self) -> bool:
        """Whether the result has one value per token."""
        raise NotImplementedError


@dataclass(frozen=True)
class RowCall:
    """A call with checked arguments. A subclass holds the tensors from which the logits come.

    Attributes:
        num_classes: of all ranks.
        shards: `parallel.agreement.Shards` of the vocabulary, or None.
        token_groups: process groups over which the tokens are sharded.
    """

    kernels: Kernels
    tokens: Tokens
    num_classes: int
    shards: Any
    token_groups: tuple[Any, ...]

    @property
    def group(self) -> Any:
        """Process group over which the vocabulary is sharded, or None."""
        return None if self.shards is None else self.shards.group

    @property
    def targets(self) -> Tensor:
        """The targets of each row: labels [T], or a teacher's classes [T, K]."""
        return self.tokens.labels_T if self.tokens.teacher is None else self.tokens.teacher.index_TK

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the logits, or of the hidden states."""
        raise NotImplementedError

    def with_tokens(self, **changes: Any) -> Self:
        """The call with other attributes of its tokens."""
        return replace(self, tokens=self.tokens._replace(**changes))

    def promoted(self, other: torch.dtype) -> Self:
        """The call with logits in float64 where these or `other` are float64."""
        raise NotImplementedError

    def operands(self) -> Rows | Linear:
        """The operands of the kernels; with a head, those of a `WholeLosses`."""
        raise NotImplementedError

    def has_known_coefficients(self) -> bool:
        """Whether the coefficient of each token in the result is known before its loss, for kernels to use it."""
        raise NotImplementedError

    def apply(
        self, objective: Objective, log_p_TK: Tensor | None, coef_T: Tensor | None, names: tuple[str, ...]
    ) -> tuple[Tensor, ...]:
        """Results of the autograd function: token values, or their weighted sum with coef_T; at the end the metrics.

        Args:
            objective: of a `TopK` without the log-probabilities.
            log_p_TK: these log-probabilities, or None.
            names: of token metrics.
        """
        raise NotImplementedError

    def values(self, objective: Objective, names: tuple[str, ...] = ()) -> tuple[list[Tensor], list[Tensor]]:
        """Values of the objective, and metrics, [T] each; 0 for ignored tokens."""
        if not isinstance(self.kernels, WholeLosses):
            return self._values_and_metrics(objective, None, names)
        check_shards(self.kernels, self.shards)
        rows, keep_T = self.operands(), self.tokens.keep_T
        values = self.kernels.values(rows, objective, self.group)
        metrics: list[Tensor] = []
        if names:
            metrics = token_metrics(torch, self.kernels.terms(rows, objective.sums), objective, names)
        return [zero_where_ignored(x, keep_T) for x in values], [zero_where_ignored(x, keep_T) for x in metrics]

    def reduced(
        self, objective: Objective, reduction: str, names: tuple[str, ...] = (), factor: float = 1.0
    ) -> tuple[Tensor, list[Tensor]]:
        """The reduced value of an objective with one value, times a factor; and token metrics as in `values`."""
        tokens, groups = self.tokens, self.token_groups
        if reduction != "none" and isinstance(self.kernels, WholeLosses):
            if not names and not groups and inputs.equally_weighted(tokens):
                check_shards(self.kernels, self.shards)
                (loss,) = self.kernels.values(self.operands(), objective, self.group, reduction)
                return loss if factor == 1 else loss * factor, []
        elif reduction != "none" and self.has_known_coefficients():
            coef_T = coefficients(tokens, reduction, self.dtype)
            (loss,), metrics = self._values_and_metrics(objective, coef_T if factor == 1 else coef_T * factor, names)
            return loss, metrics
        (loss_T,), metrics = self.values(objective, names)
        return reduce_tokens(loss_T if factor == 1 else loss_T * factor, tokens, reduction, groups), metrics

    def _values_and_metrics(
        self, objective: Objective, coef_T: Tensor | None, names: tuple[str, ...]
    ) -> tuple[list[Tensor], list[Tensor]]:
        log_p_TK = None
        if isinstance(objective, TopK):
            # An input of the autograd function: it may need a gradient, and is saved for the backward.
            log_p_TK, objective = objective.log_p, objective._replace(log_p=None)
        found = self.apply(objective, log_p_TK, coef_T, names)
        return list(found[: objective.num_values]), list(found[len(found) - len(names) :])
