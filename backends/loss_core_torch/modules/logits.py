"""Base class of the losses over the logits of one distribution: checks, on one rank or sharded, and their operands."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loss_core.row_terms import Objective
from loss_core_torch import compat, inplace, inputs
from loss_core_torch.autograd import rows as autograd
from loss_core_torch.inputs import Tokens
from loss_core_torch.kernels import Rows, WholeLosses
from loss_core_torch.modules.base import Kernels, has_known_coefficients, is_unsharded
from loss_core_torch.modules.rows import RowCall, RowModule
from loss_core_torch.tracing import compute_dtype


@dataclass(frozen=True)
class LogitsCall(RowCall):
    """A call over logits.

    Attributes:
        logits: [..., V] of this rank.
        softcap: of the logits; 0 is off.
        overwrite: the backward writes over the logits.
    """

    logits: Tensor
    softcap: float
    overwrite: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.logits.dtype

    def promoted(self, other: torch.dtype) -> LogitsCall:
        dtype = torch.promote_types(compute_dtype(self.dtype), compute_dtype(other))
        return replace(self, logits=self.logits.to(dtype)) if dtype == torch.float64 else self

    def operands(self) -> Rows:
        tokens, start = self.tokens, 0 if self.shards is None else self.shards.start
        return Rows(self.logits, self.targets, tokens.keep_T, start, self.softcap, tokens.inverse_temperature_T)

    def has_known_coefficients(self) -> bool:
        teacher = self.tokens.teacher
        others = () if teacher is None else (teacher.log_p_TK,)
        return has_known_coefficients(self.tokens, self.group, self.token_groups, self.logits, *others)

    def apply(
        self, objective: Objective, log_p_TK: Tensor | None, coef_T: Tensor | None, names: tuple[str, ...]
    ) -> tuple[Tensor, ...]:
        kernels = self.kernels
        assert not isinstance(kernels, WholeLosses)
        logits, labels_T, keep_T, start, softcap, inverse_T = self.operands()
        in_forward = coef_T is not None and not self.overwrite and kernels.grad_in_forward(logits.device)
        call = autograd.Call(kernels, objective, softcap, start, self.group, self.overwrite, in_forward, names)
        found: tuple[Tensor, ...] = autograd.RowLoss.apply(logits, labels_T, keep_T, inverse_T, log_p_TK, coef_T, call)
        return found


class LogitsModule(RowModule):
    """A loss of one distribution over logits [..., V]."""

    # Name of the argument.
    _logits = "logits"
    inplace_grad: bool = False

    def _evaluate(self, logits: Any, labels: Any, args: Mapping[str, Any], *others: Any) -> Any:
        """The result of a call.

        Args:
            args: the other arguments by name.
            others: those of them that are floating and may be DTensors.
        """
        kernels = self._kernels_for(logits, None, *others)
        if not is_unsharded(self.tp_group, logits, *others):
            return self._sharded(kernels, logits, labels, args)
        logits = inputs.floats(self._logits, logits)
        self._check(logits)
        self._not_empty(logits)
        vocab = logits.shape[-1]
        tokens = self._tokens(self._logits, logits, logits.shape[:-1], labels, args, vocab)
        return self._loss(self._call(kernels, logits, self._validated(tokens, vocab), vocab))

    # Not traceable: hosts exchange messages.
    @compat.outside_of_graphs
    def _sharded(self, kernels: Kernels, sharded_logits: Any, labels: Any, args: Mapping[str, Any]) -> Any:
        from loss_core_torch.parallel import placement

        layout = placement.of_logits(self._logits, sharded_logits, self.tp_group)
        logits = layout.local(sharded_logits)

        def check() -> Tokens:
            lead = inputs.floats(self._logits, logits).shape[:-1]
            self._check(sharded_logits)
            local = {name: layout.token_values(name, args[name], lead) for name in self._token_arguments}
            local_labels = layout.token_values("labels", labels, lead)
            return self._tokens(self._logits, logits, lead, local_labels, {**args, **local})

        tokens, shards = self._agree(layout.ranks, logits, check)
        if shards is None:
            self._not_empty(logits)
        logits = inputs.floats(self._logits, logits)
        vocab = logits.shape[-1] if shards is None else shards.total
        call = self._call(kernels, logits, self._validated(tokens, vocab), vocab, shards, layout.ranks.tokens)
        found = self._loss(call)
        return layout.token_results(found, labels) if self._returns_tokens() else found

    def _call(
        self,
        kernels: Kernels,
        logits: Tensor,
        tokens: Tokens,
        vocab: int,
        shards: Any = None,
        token_groups: tuple[Any, ...] = (),
    ) -> LogitsCall:
        overwrite = self.inplace_grad and inplace.applies(logits)
        softcap = float(self.logit_softcapping)
        return LogitsCall(kernels, tokens, vocab, shards, token_groups, logits, softcap, overwrite)

    def _check(self, logits: Any) -> None:
        """With inplace_grad, refuse the caller's logits where they can't be overwritten."""
        if self.inplace_grad and inplace.applies(logits):
            inplace.check(logits)

    def _not_empty(self, logits: Tensor) -> None:
        inputs.not_empty(self._logits, "vocabulary (last dimension)", logits)
