"""Distillation from K log-probabilities of a teacher as torch modules. No mathematics here."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, K = classes of the teacher

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loss_core import FusedLinearTopKDistillationConfig, TopKDistillationConfig
from loss_core.row_terms import TopK
from loss_core_torch import inputs, top_k_teacher
from loss_core_torch.inputs import Tokens
from loss_core_torch.modules.base import cast
from loss_core_torch.modules.linear import LinearModule
from loss_core_torch.modules.logits import LogitsModule
from loss_core_torch.modules.rows import RowCall, RowModule
from loss_core_torch.temperature import inverse_temperature
from loss_core_torch.tracing import compute_dtype


class _TopKDistillation(RowModule):
    """Distillation from a teacher's K log-probabilities, over logits or hidden states."""

    _labels_are_classes = False
    temperature: float
    tail: bool
    _token_arguments = ("teacher_indices", "teacher_logprobs", "loss_weights")

    def _tokens(
        self, of: str, like: Tensor, lead: torch.Size, labels: Any, args: Mapping[str, Any], vocab: int | None = None
    ) -> Tokens:
        count, weights = args["num_batch_labels"], args["loss_weights"]
        tokens = inputs.distillation_tokens(of, lead, like.device, self.ignore_index, labels, count, weights)
        teacher = top_k_teacher.checked(args["teacher_indices"], args["teacher_logprobs"], of, lead, like.device)
        return tokens._replace(teacher=teacher)

    def _validated(self, tokens: Tokens, vocab: int) -> Tokens:
        return top_k_teacher.in_order(inputs.resolve_keep(tokens), vocab)

    def _returns_tokens(self) -> bool:
        return False

    def _loss(self, call: RowCall) -> Tensor:
        teacher, result_dtype = call.tokens.teacher, call.dtype
        assert teacher is not None
        call = call.promoted(teacher.log_p_TK.dtype)
        tokens, dtype, temperature = call.tokens, compute_dtype(call.dtype), float(self.temperature)
        inverse_T = inverse_temperature(None, temperature, tokens.labels_T, tokens.shape, dtype)
        # Without a tail where the teacher has all classes.
        objective = TopK(teacher.log_p_TK.to(dtype), self.tail and teacher.index_TK.shape[1] < call.num_classes)
        reduction = "mean" if tokens.num_tokens is None else "sum"
        call = call.with_tokens(inverse_temperature_T=inverse_T)
        loss, _ = call.reduced(objective, reduction, factor=temperature**2)
        return cast(loss, self.fp32_upcast, result_dtype)


class TopKDistillation(_TopKDistillation, LogitsModule):
    """KL(teacher || student) from K log-probabilities of the teacher, times T^2.

    Config: `loss_core.TopKDistillationConfig`.
    """

    config_class = TopKDistillationConfig
    _logits = "student_logits"

    def forward(
        self,
        student_logits: Tensor,
        teacher_indices: Tensor,
        teacher_logprobs: Tensor,
        labels: Tensor,
        num_batch_labels: int | Tensor | None = None,
        loss_weights: Tensor | None = None,
    ) -> Tensor:
        """Divergence of the student from the teacher, over valid positions.

        Args:
            student_logits: [..., V] float, any strides; not changed. With tp_group, or as a DTensor: as logits in
                MaskedCrossEntropy.
            teacher_indices: [..., K] integers: classes in [0, V over all ranks), in any order, distinct within a token;
                not changed. As the arguments below, the same on every rank of the group.
            teacher_logprobs: [..., K] float: the teacher's log-probabilities of these classes at this temperature; -inf
                for a probability of 0. Gets a gradient when it requires one, through the tail's probability too.
            labels: [...] integers; not changed. Positions of ignore_index are ignored, any other value is valid.
            num_batch_labels: divides the sum; None: the mean over valid positions. 0 gives 0.
            loss_weights: [...] factor of each token's loss, differentiable; with num_batch_labels only.
        Returns:
            Scalar; float32 (float64 for float64), the student's dtype with fp32_upcast=False. +inf where the teacher
            has probability for a class, or for all others together, that the student rules out with -inf.
        Raises:
            ValueError: shapes that do not fit, no classes, a count that is negative or NaN (on a CPU), or weights
                without a count; a teacher that is no distribution (on a CPU; elsewhere that token's loss and gradient
                are NaN), see `top_k_teacher.in_order`; over a group on every rank.
            TypeError: labels or indices that are no integers, logits or log-probabilities that are no floats.
        """
        args = {
            "teacher_indices": teacher_indices, "teacher_logprobs": teacher_logprobs,
            "num_batch_labels": num_batch_labels, "loss_weights": loss_weights,
        }  # fmt: skip
        loss: Tensor = self._evaluate(student_logits, labels, args, teacher_logprobs)
        return loss


class FusedLinearTopKDistillation(_TopKDistillation, LinearModule):
    """TopKDistillation of hidden_states @ lm_weight.T without the [T, V] logits.

    Config: `loss_core.FusedLinearTopKDistillationConfig`. On a CPU, ignored tokens are excluded from the products.
    """

    config_class = FusedLinearTopKDistillationConfig

    def forward(
        self,
        hidden_states: Tensor,
        lm_weight: Tensor,
        teacher_indices: Tensor,
        teacher_logprobs: Tensor,
        labels: Tensor,
        num_batch_labels: int | Tensor | None = None,
        loss_weights: Tensor | None = None,
        lm_bias: Tensor | None = None,
    ) -> Tensor:
        """Divergence of the student from the teacher, over valid positions.

        Args:
            hidden_states: as in FusedLinearCrossEntropy.
            lm_weight: likewise.
            teacher_indices: as in TopKDistillation.
            teacher_logprobs: likewise; in the dtype of the arithmetic for the hidden states.
            labels: likewise.
            num_batch_labels: likewise.
            loss_weights: likewise.
            lm_bias: as in FusedLinearCrossEntropy.
        Returns:
            Scalar; float32 (float64 for float64 hidden states).
        Raises:
            ValueError, TypeError: as FusedLinearCrossEntropy and TopKDistillation.
        """
        args = {
            "teacher_indices": teacher_indices, "teacher_logprobs": teacher_logprobs,
            "num_batch_labels": num_batch_labels, "loss_weights": loss_weights,
        }  # fmt: skip
        loss: Tensor = self._evaluate(hidden_states, labels, lm_weight, lm_bias, args)
        return loss
