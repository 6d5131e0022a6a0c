"""What the losses of one distribution per token share, over logits and over hidden states: from checked tokens on."""

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
    """A loss that is an `Objective` of each token's distribution. A subclass has `_tokens` and `_loss`."""

    ignore_index: int
    logit_softcapping: float = 0.0
    fp32_upcast: bool = True
    # Arguments with one value per token, beside labels.
    _values: tuple[str, ...] = ()

    def _tokens(
        self, of: str, like: Tensor, lead: torch.Size, labels: Any, given: Mapping[str, Any], vocab: int | None = None
    ) -> Tokens:
        """What a call says of its tokens, checked.

        Args:
            of: name of the tensor `like`, from which the leading shape `lead` comes.
            given: the other arguments by name.
            vocab: number of classes, where it is known yet.
        """
        raise NotImplementedError

    def _settled(self, tokens: Tokens, vocab: int) -> Tokens:
        """The tokens, once what does not fit a vocabulary of this size has been refused."""
        return inputs.settled(inputs.in_range(tokens, vocab, self.ignore_index))

    def _loss(self, call: RowCall) -> Any:
        """What the module returns, of this rank's tokens."""
        raise NotImplementedError

    def _of_tokens(self) -> bool:
        """Whether it returns one number per token."""
        raise NotImplementedError


@dataclass(frozen=True)
class RowCall:
    """A call whose arguments have been checked. A subclass says where the logits come from.

    Attributes:
        num_classes: of all ranks.
        shards: of the vocabulary, as `parallel.agreement` has them, or None.
        token_groups: process groups over which the tokens are sharded.
    """

    kernels: Kernels
    tokens: Tokens
    num_classes: int
    shards: Any
    token_groups: tuple[Any, ...]

    @property
    def group(self) -> Any:
        """Over which the vocabulary is sharded, or None."""
        return None if self.shards is None else self.shards.group

    @property
    def targets(self) -> Tensor:
        """The targets of each row: [T], or [T, K] where a teacher names K classes."""
        return self.tokens.labels_T if self.tokens.teacher is None else self.tokens.teacher.index_TK

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits, or of the hidden states."""
        raise NotImplementedError

    def with_tokens(self, **changes: Any) -> Self:
        """The call with other attributes of its tokens."""
        return replace(self, tokens=self.tokens._replace(**changes))

    def wide(self, other: torch.dtype) -> Self:
        """The call in float64 where its dtype or another one is."""
        raise NotImplementedError

    def whole(self) -> Rows | Linear:
        """The operands for kernels that make a loss whole."""
        raise NotImplementedError

    def knows_factors(self) -> bool:
        """Whether kernels can be given the factor of each token in a sum or mean, to make gradients with it."""
        raise NotImplementedError

    def apply(
        self, objective: Objective, log_p_TK: Tensor | None, coef_T: Tensor | None, names: tuple[str, ...]
    ) -> tuple[Tensor, ...]:
        """Results of the autograd function: values of tokens, or the sum with factors; and at the end the metrics.

        Args:
            objective: without the arrays of a `TopK`; log_p_TK: these, or None.
            names: of metrics of tokens.
        """
        raise NotImplementedError

    def values(self, objective: Objective, names: tuple[str, ...] = ()) -> tuple[list[Tensor], list[Tensor]]:
        """Values of the objective, and metrics, [T] each; 0 for ignored tokens."""
        if not isinstance(self.kernels, WholeLosses):
            return self._applied(objective, None, names)
        check_shards(self.kernels, self.shards)
        rows, keep_T = self.whole(), self.tokens.keep_T
        values = self.kernels.values(rows, objective, self.group)
        metrics: list[Tensor] = []
        if names:
            metrics = token_metrics(torch, self.kernels.terms(rows, objective.sums), objective, names)
        return [zero_where_ignored(x, keep_T) for x in values], [zero_where_ignored(x, keep_T) for x in metrics]

    def reduced(
        self, objective: Objective, reduction: str, names: tuple[str, ...] = (), factor: float = 1.0
    ) -> tuple[Tensor, list[Tensor]]:
        """The one value of the objective times a factor, reduced; and metrics of tokens as of `values`."""
        tokens, groups = self.tokens, self.token_groups
        if reduction != "none" and isinstance(self.kernels, WholeLosses):
            if not names and not groups and inputs.all_alike(tokens):
                check_shards(self.kernels, self.shards)
                (loss,) = self.kernels.values(self.whole(), objective, self.group, reduction)
                return loss if factor == 1 else loss * factor, []
        elif reduction != "none" and self.knows_factors():
            coef_T = coefficients(tokens, reduction, self.dtype)
            (loss,), metrics = self._applied(objective, coef_T if factor == 1 else coef_T * factor, names)
            return loss, metrics
        (loss_T,), metrics = self.values(objective, names)
        return reduce_tokens(loss_T if factor == 1 else loss_T * factor, tokens, reduction, groups), metrics

    def _applied(
        self, objective: Objective, coef_T: Tensor | None, names: tuple[str, ...]
    ) -> tuple[list[Tensor], list[Tensor]]:
        log_p_TK = None
        if isinstance(objective, TopK):
            # An input of the function, so that it has a gradient, and is saved as one.
            log_p_TK, objective = objective.log_p, objective._replace(log_p=None)
        found = self.apply(objective, log_p_TK, coef_T, names)
        return list(found[: objective.num_values]), list(found[len(found) - len(names) :])
