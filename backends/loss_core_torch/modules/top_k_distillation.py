"""Distillation from K log-probabilities of a teacher as torch modules. No mathematics here."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, K = classes of the teacher

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loss_core import BackendUnavailable, FusedLinearTopKDistillationConfig, TopKDistillationConfig
from loss_core.row_terms import TopK
from loss_core_torch import compat, inputs, top_k_teacher
from loss_core_torch.autograd import top_k_distillation as autograd
from loss_core_torch.inputs import Tokens
from loss_core_torch.kernels import Rows, WholeLosses
from loss_core_torch.modules.base import Kernels, LossModule, cast, has_known_factors, is_whole
from loss_core_torch.modules.linear import LinearCall, LinearModule
from loss_core_torch.reduction import coefficients, reduce_tokens
from loss_core_torch.temperature import inverse_temperature
from loss_core_torch.tracing import compute_dtype


class TopKDistillation(LossModule):
    """KL(teacher || student) from K log-probabilities of the teacher, times T^2.

    Config: `loss_core.TopKDistillationConfig`.
    """

    config_class = TopKDistillationConfig
    _labels_are_classes = False
    ignore_index: int
    temperature: float
    fp32_upcast: bool
    logit_softcapping: float
    tail: bool

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
            teacher_indices: [..., K] integers: classes in [0, V over all ranks), in any order, that differ in each
                token; not changed. The same on every rank of the group, as all that follow.
            teacher_logprobs: [..., K] float: the teacher's log-probabilities of these classes at this temperature; -inf
                for a probability of 0. Gets a gradient when it requires one, through the tail's probability too.
            labels: [...] integers; not changed. Positions of ignore_index are ignored, any other number counts.
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
        kernels = self._kernels_for(student_logits, None, teacher_logprobs)
        given = (teacher_indices, teacher_logprobs, labels, num_batch_labels, loss_weights)
        if not is_whole(self.tp_group, student_logits, teacher_logprobs):
            return self._sharded(kernels, student_logits, *given)
        tokens = self._tokens(student_logits, *given)
        inputs.not_empty("student_logits", "vocabulary (last dimension)", student_logits)
        return self._loss(kernels, student_logits, tokens, student_logits.shape[-1])

    # Hosts exchange messages there, which no graph can hold.
    @compat.outside_of_graphs
    def _sharded(
        self, kernels: Kernels, student: Any, indices: Any, logprobs: Any, labels: Any, count: Any, loss_weights: Any
    ) -> Tensor:
        from loss_core_torch.parallel import placement

        layout = placement.of_logits("student_logits", student, self.tp_group)
        student = layout.local(student)

        def check() -> Tokens:
            lead = inputs.floats("student_logits", student).shape[:-1]
            of_tokens = {
                "teacher_indices": indices, "teacher_logprobs": logprobs, "labels": labels, "loss_weights": loss_weights
            }  # fmt: skip
            own = {name: layout.token_values(name, value, lead) for name, value in of_tokens.items()}
            teacher = own["teacher_indices"], own["teacher_logprobs"]
            return self._tokens(student, *teacher, own["labels"], count, own["loss_weights"])

        tokens, shards = self._agree(layout.ranks, student, check)
        if shards is None:
            inputs.not_empty("student_logits", "vocabulary (last dimension)", student)
        vocab = student.shape[-1] if shards is None else shards.total
        return self._loss(kernels, student, tokens, vocab, shards, layout.ranks.tokens)

    def _tokens(self, student: Any, indices: Any, logprobs: Any, labels: Any, count: Any, loss_weights: Any) -> Tokens:
        lead = inputs.floats("student_logits", student).shape[:-1]
        return with_teacher(self.ignore_index, "student_logits", lead, student.device, indices, logprobs, labels, count,
                            loss_weights)  # fmt: skip

    def _loss(
        self,
        kernels: Kernels,
        given: Tensor,
        tokens: Tokens,
        vocab: int,
        shards: Any = None,
        token_groups: tuple[Any, ...] = (),
    ) -> Tensor:
        student = inputs.floats("student_logits", given)
        assert tokens.teacher is not None
        dtype = torch.promote_types(compute_dtype(student.dtype), compute_dtype(tokens.teacher.log_p_TK.dtype))
        student = student.to(dtype) if dtype == torch.float64 else student
        tokens = top_k_teacher.in_order(inputs.settled(tokens), vocab)
        assert tokens.teacher is not None
        labels_TK, log_p_TK = tokens.teacher.index_TK, tokens.teacher.log_p_TK.to(dtype)
        temperature, reduction = float(self.temperature), "mean" if tokens.num_tokens is None else "sum"
        # Where all classes are the teacher's, there are no others.
        tail, softcap = self.tail and labels_TK.shape[1] < vocab, float(self.logit_softcapping)
        inverse_T = inverse_temperature(None, temperature, tokens.labels_T, tokens.shape, dtype)
        if isinstance(kernels, WholeLosses):
            if shards is not None:
                raise BackendUnavailable(
                    f"{kernels.flag!r} needs the whole vocabulary: use 'torch:eager' with a tp_group."
                )
            rows = Rows(student, labels_TK, tokens.keep_T, 0, softcap, inverse_T)
            loss_T = kernels.top_k_distillation(rows, TopK(log_p_TK, tail))
            return cast(
                reduce_tokens(loss_T * temperature**2, tokens, reduction, token_groups), self.fp32_upcast, given
            )
        start, group = (0, None) if shards is None else (shards.start, shards.group)
        call = autograd.Call(kernels, tail, softcap, start, group)
        args = (student, labels_TK, log_p_TK, tokens.keep_T, inverse_T)
        if has_known_factors(tokens, group, token_groups, student, log_p_TK):
            coef_T = coefficients(tokens, reduction, student.dtype) * temperature**2
            call = call._replace(grad_in_forward=kernels.grad_in_forward(student.device))
            loss = autograd.TopKDistillation.apply(*args, coef_T, call)[0]
        else:
            loss_T = autograd.TopKDistillation.apply(*args, None, call)[0]
            loss = reduce_tokens(loss_T * temperature**2, tokens, reduction, token_groups)
        return cast(loss, self.fp32_upcast, given)


class FusedLinearTopKDistillation(LinearModule):
    """TopKDistillation of hidden_states @ lm_weight.T without the [T, V] logits.

    Config: `loss_core.FusedLinearTopKDistillationConfig`. On a CPU, ignored tokens take part in no product.
    """

    config_class = FusedLinearTopKDistillationConfig
    _labels_are_classes = False
    temperature: float
    tail: bool
    _values = ("teacher_indices", "teacher_logprobs", "loss_weights")

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
        given = {
            "teacher_indices": teacher_indices, "teacher_logprobs": teacher_logprobs,
            "num_batch_labels": num_batch_labels, "loss_weights": loss_weights,
        }  # fmt: skip
        loss: Tensor = self._evaluate(hidden_states, labels, lm_weight, lm_bias, given)
        return loss

    def _tokens(
        self, lead: torch.Size, hidden: Tensor, labels: Any, given: Mapping[str, Any], num_valid: Any
    ) -> Tokens:
        return with_teacher(
            self.ignore_index, "hidden_states", lead, hidden.device, given["teacher_indices"],
            given["teacher_logprobs"], labels, given["num_batch_labels"], given["loss_weights"],
        )  # fmt: skip

    def _settled(self, tokens: Tokens, vocab: int) -> Tokens:
        return top_k_teacher.in_order(inputs.settled(tokens), vocab)

    def _of_tokens(self) -> bool:
        return False

    def _loss(self, call: LinearCall) -> Tensor:
        kernels, tokens = call.kernels, call.tokens
        assert tokens.teacher is not None
        dtype, temperature = compute_dtype(call.hidden.dtype), float(self.temperature)
        labels_TK, log_p_TK = tokens.teacher.index_TK, tokens.teacher.log_p_TK.to(dtype)
        tail = self.tail and labels_TK.shape[1] < call.num_classes
        inverse_T = inverse_temperature(None, temperature, tokens.labels_T, tokens.shape, dtype)
        if isinstance(kernels, WholeLosses):
            whole = call.whole()._replace(inverse_temperature_T=inverse_T)
            loss_T = kernels.linear_top_k_distillation(whole, labels_TK, TopK(log_p_TK, tail))
        else:
            how = autograd.LinearCall(kernels, tail, call.source, call.wanted())
            loss_T = autograd.LinearTopKDistillation.apply(
                call.hidden, call.weight, call.bias, labels_TK, log_p_TK, tokens.keep_T, call.places_N, inverse_T, how,
            )[0]  # fmt: skip
        reduction = "mean" if tokens.num_tokens is None else "sum"
        return reduce_tokens(loss_T * temperature**2, tokens, reduction, call.token_groups)


def with_teacher(
    ignore_index: int,
    of: str,
    lead: torch.Size,
    device: torch.device,
    indices: Any,
    logprobs: Any,
    labels: Any,
    count: Any,
    loss_weights: Any,
) -> Tokens:
    """What a call says of its tokens and their teacher, checked against the leading shape of the tensor named `of`."""
    inputs.check_weights_have_count(loss_weights, count)
    tokens = inputs.tokens(
        of, lead, device, "sum", ignore_index, labels, count_name="num_batch_labels", num_tokens=count,
        loss_weights=loss_weights,
    )  # fmt: skip
    return tokens._replace(teacher=top_k_teacher.checked(indices, logprobs, of, lead, device))
