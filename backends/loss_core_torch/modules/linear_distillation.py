"""The fused linear distillation as a torch module. No mathematics here."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, H = hidden

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from loss_core import FusedLinearKDConfig
from loss_core.row_terms import beta_of
from loss_core_torch import compat, inputs
from loss_core_torch.autograd.linear_distillation import Call, LinearDistillation, both_inputs, linear_pairs
from loss_core_torch.autograd.linear_source import Source
from loss_core_torch.inputs import Tokens
from loss_core_torch.kernels import BothWanted, Wanted, WholeLosses
from loss_core_torch.modules.base import Kernels, check_shards, is_unsharded
from loss_core_torch.modules.linear import HeadModule, check_operands, product_dtype
from loss_core_torch.reduction import coefficients, reduce_tokens
from loss_core_torch.tracing import compute_dtype, is_differentiated


class Head(NamedTuple):
    """Hidden states [..., H] and weight [V, H] of student or teacher, of this rank.

    Attributes:
        name: prefix of the names of its arguments.
        sequence_dim: as in `Source`.
    """

    name: str
    hidden: Any
    weight: Any
    sequence_dim: int | None = None

    def source(self, shards: Any) -> Source:
        """How its logits are computed, with shards of the vocabulary or None."""
        group, start = (None, 0) if shards is None else (shards.group, shards.start)
        return Source(0.0, product_dtype(self.hidden, self.weight, self.name), start, group, self.sequence_dim)

    def wanted(self) -> Wanted:
        return Wanted(is_differentiated(self.hidden), is_differentiated(self.weight))


class FusedLinearKDLoss(HeadModule):
    """Divergence of hidden_states @ lm_weight.T of a student from those of a teacher, without the [T, V] logits.

    Config: `loss_core.FusedLinearKDConfig`. On a CPU, ignored tokens are excluded from the products.
    """

    config_class = FusedLinearKDConfig
    _labels_are_classes = False
    temperature: float
    divergence: str
    beta: float

    def operand_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """As for the other fused losses; float32 for float16, in which gradients of logits may be out of range."""
        return compute_dtype(dtype) if dtype == torch.float16 else super().operand_dtype(dtype, device)

    def forward(
        self,
        student_hidden_states: Tensor,
        student_lm_weight: Tensor,
        teacher_hidden_states: Tensor,
        teacher_lm_weight: Tensor,
        labels: Tensor,
        num_batch_labels: int | Tensor | None = None,
        loss_weights: Tensor | None = None,
    ) -> Tensor:
        """Divergence of the student from the teacher, over valid positions.

        Args:
            student_hidden_states: [..., H] float; as hidden_states in FusedLinearCrossEntropy.
            student_lm_weight: [V, H]; as lm_weight there.
            teacher_hidden_states: [..., H_t] float, whose hidden size and dtype may differ; gets a gradient when it
                requires one, for one more product. Sharded as the student's.
            teacher_lm_weight: [V, H_t]; likewise.
            labels: [...] integers; not changed. Positions of ignore_index are ignored, any other value is valid.
            num_batch_labels: divides the sum; None: the mean over valid positions. 0 gives 0.
            loss_weights: [...] factor of each token's loss, differentiable; with num_batch_labels only.
        Returns:
            Scalar; float32 (float64 for float64). Under autocast all operands are rounded to its dtype first.
        Raises:
            ValueError: shapes or devices that do not fit, no classes, a count that is negative or NaN (on a CPU),
                weights without a count, placements that can't be served; over a group on every rank.
            TypeError: labels that are no integers; other dtypes of hidden states and weight that differ.
        Sources: as KDLoss.
        """
        student = Head("student_", student_hidden_states, student_lm_weight)
        teacher = Head("teacher_", teacher_hidden_states, teacher_lm_weight)
        operands = (*student[1:3], *teacher[1:3])
        kernels = self._kernels_for(*operands)
        if self.sequence_parallel or not is_unsharded(self.tp_group, *operands):
            return self._sharded(kernels, student, teacher, labels, num_batch_labels, loss_weights)
        _check(student, teacher)
        inputs.not_empty("student_lm_weight", "vocabulary (first dimension)", student_lm_weight, 0)
        lead = _lead(student, teacher, student_hidden_states.shape[:-1], teacher_hidden_states.shape[:-1])
        tokens = self._tokens(student_hidden_states, lead, labels, num_batch_labels, loss_weights)
        return self._loss(kernels, student, teacher, inputs.resolve_keep(tokens))

    # Not traceable: hosts exchange messages.
    @compat.outside_of_graphs
    def _sharded(
        self, kernels: Kernels, student: Head, teacher: Head, labels: Any, count: Any, loss_weights: Any
    ) -> Tensor:
        from loss_core_torch.parallel import placement_linear

        layouts = placement_linear.of_heads(student[1:3], teacher[1:3], self.tp_group, self.sequence_parallel)
        layout = layouts[0].tokens
        student, teacher = (
            head._replace(
                hidden=linear.tokens.local(head.hidden),
                weight=placement_linear.local_weight(linear, head.weight)
                if linear.redistribute
                else self.materialize_lm_weight(head.weight),
                sequence_dim=linear.sequence_dim,
            )
            for head, linear in zip((student, teacher), layouts, strict=True)
        )

        def check() -> Tokens:
            _check(student, teacher)
            leads = (
                placement_linear.full_lead(linear, head.hidden)
                for head, linear in zip((student, teacher), layouts, strict=True)
            )
            lead = _lead(student, teacher, *leads)
            local_labels = layout.token_values("labels", labels, lead)
            local_weights = layout.token_values("loss_weights", loss_weights, lead)
            return self._tokens(student.hidden, lead, local_labels, count, local_weights)

        # The backward has one collective for each that requires a gradient.
        trains = [
            torch.is_grad_enabled() and isinstance(head.hidden, Tensor) and head.hidden.requires_grad
            for head in (student, teacher)
        ]
        tokens, shards = self._agree(layout.ranks, student.weight, check, hidden_states_require_grad=trains)
        if shards is None:
            inputs.not_empty("student_lm_weight", "vocabulary (first dimension)", student.weight, 0)
        return self._loss(kernels, student, teacher, inputs.resolve_keep(tokens), shards, layout.ranks.tokens)

    def _tokens(self, hidden: Tensor, lead: torch.Size, labels: Any, count: Any, loss_weights: Any) -> Tokens:
        return inputs.distillation_tokens(
            "student_hidden_states", lead, hidden.device, self.ignore_index, labels, count, loss_weights
        )

    def _loss(
        self,
        kernels: Kernels,
        student: Head,
        teacher: Head,
        tokens: Tokens,
        shards: Any = None,
        token_groups: tuple[Any, ...] = (),
    ) -> Tensor:
        heads = _promoted(student, teacher)
        temperature, reduction = float(self.temperature), "mean" if tokens.num_tokens is None else "sum"
        beta = beta_of(self)
        if beta == 1:
            # KL(student || teacher) is KL(teacher || student) with the roles exchanged.
            heads, beta = heads[::-1], 0.0
        sources = [head.source(shards) for head in heads]
        tensors, coef_T = (*heads[0][1:3], *heads[1][1:3], tokens.keep_T), None
        if isinstance(kernels, WholeLosses):
            check_shards(kernels, shards)
            loss = kernels.divergence(linear_pairs(both_inputs(*tensors, None), sources, temperature), beta)
        else:
            if shards is None and not token_groups:
                # The coefficient of each token is known before its divergence: the forward may compute gradients.
                coef_T = coefficients(tokens, reduction, heads[0].hidden.dtype) * temperature**2
            call = Call(kernels, temperature, beta, BothWanted(*(head.wanted() for head in heads)), sources)
            loss = LinearDistillation.apply(*tensors, self._product_indices(tokens), coef_T, call)[0]
        return loss if coef_T is not None else reduce_tokens(loss * temperature**2, tokens, reduction, token_groups)


def _check(student: Head, teacher: Head) -> None:
    """Refuse heads that do not fit each other, on this rank."""
    for of, hidden, weight, _ in (student, teacher):
        check_operands(inputs.floats(f"{of}hidden_states", hidden), inputs.floats(f"{of}lm_weight", weight), None, of)
    if len(student.weight) != len(teacher.weight):
        raise ValueError(
            f"student_lm_weight has shape {tuple(student.weight.shape)} but teacher_lm_weight has shape "
            f"{tuple(teacher.weight.shape)}; both must have a row for each class, as many as the other."
        )
    if student.hidden.device != teacher.hidden.device:
        raise ValueError(
            f"student_hidden_states is on {student.hidden.device} but teacher_hidden_states is on "
            f"{teacher.hidden.device}; they must match."
        )


def _lead(student: Head, teacher: Head, of_student: torch.Size, of_teacher: torch.Size) -> torch.Size:
    """The common leading shape of both hidden states, over all ranks."""
    if of_student != of_teacher:
        raise ValueError(
            f"student_hidden_states has shape {tuple(student.hidden.shape)} but teacher_hidden_states has shape "
            f"{tuple(teacher.hidden.shape)}; all but the last dimension must match."
        )
    return of_student


def _promoted(student: Head, teacher: Head) -> tuple[Head, Head]:
    """Both heads, in float64 where one of them is."""
    heads = tuple(
        head._replace(
            hidden=inputs.floats(f"{head.name}hidden_states", head.hidden),
            weight=inputs.floats(f"{head.name}lm_weight", head.weight),
        )
        for head in (student, teacher)
    )
    if any(head.hidden.dtype == torch.float64 for head in heads):
        heads = tuple(head._replace(hidden=head.hidden.double(), weight=head.weight.double()) for head in heads)
    return heads[0], heads[1]
