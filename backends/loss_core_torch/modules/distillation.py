"""The distillation loss as a torch module. No mathematics here."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, H = hidden

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loss_core import KDLossConfig
from loss_core.row_terms import beta_of
from loss_core_torch import compat, inputs
from loss_core_torch.autograd.distillation import Call, Distillation
from loss_core_torch.inputs import Tokens
from loss_core_torch.kernels import Pairs, WholeLosses
from loss_core_torch.modules.base import Kernels, LossModule, cast, check_shards, has_known_coefficients, is_unsharded
from loss_core_torch.reduction import coefficients, reduce_tokens


class KDLoss(LossModule):
    """Divergence of a student from a teacher at temperature T, times T^2. Config: `loss_core.KDLossConfig`."""

    config_class = KDLossConfig
    _labels_are_classes = False
    ignore_index: int
    temperature: float
    fp32_upcast: bool
    chunk_size: int
    divergence: str
    beta: float

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        num_batch_labels: int | Tensor | None = None,
        loss_weights: Tensor | None = None,
    ) -> Tensor:
        """Divergence of the student from the teacher, over valid positions.

        Args:
            student_logits: [..., V] float, any strides; not changed. With tp_group, or as a DTensor: as logits in
                MaskedCrossEntropy.
            teacher_logits: [..., V] float on the same device, whose dtype may differ; gets a gradient when it requires
                one. Sharded as the student's.
            labels: [...] integers; not changed. Positions of ignore_index are ignored, any other value is valid.
            num_batch_labels: divides the sum; None: the mean over valid positions. 0 gives 0.
            loss_weights: [...] factor of each token's loss, differentiable; with num_batch_labels only.
        Returns:
            Scalar; float32 (float64 for float64), the student's dtype with fp32_upcast=False.
        Raises:
            ValueError: shapes that do not fit, no classes, a count that is negative or NaN (on a CPU), or weights
                without a count; over a group on every rank.
            TypeError: labels that are no integers.
        Sources: Hinton et al. 2015 (arXiv:1503.02531), section 2; Agarwal et al. 2024 (arXiv:2306.13649), equation 1.
        """
        kernels = self._kernels_for(student_logits, None, teacher_logits)
        if not is_unsharded(self.tp_group, student_logits, teacher_logits):
            return self._sharded(kernels, student_logits, teacher_logits, labels, num_batch_labels, loss_weights)
        tokens = self._tokens(student_logits, teacher_logits, labels, num_batch_labels, loss_weights)
        inputs.not_empty("student_logits", "vocabulary (last dimension)", student_logits)
        return self._loss(kernels, student_logits, teacher_logits, inputs.resolve_keep(tokens))

    # Not traceable: hosts exchange messages.
    @compat.outside_of_graphs
    def _sharded(
        self, kernels: Kernels, student: Any, teacher: Any, labels: Any, count: Any, loss_weights: Any
    ) -> Tensor:
        from loss_core_torch.parallel import placement

        layout = placement.of_both(student, teacher, self.tp_group)
        student, teacher = layout.local(student), layout.local(teacher)

        def check() -> Tokens:
            lead = inputs.floats("student_logits", student).shape[:-1]
            local_labels = layout.token_values("labels", labels, lead)
            local_weights = layout.token_values("loss_weights", loss_weights, lead)
            return self._tokens(student, teacher, local_labels, count, local_weights)

        tokens, shards = self._agree(layout.ranks, student, check)
        if shards is None:
            inputs.not_empty("student_logits", "vocabulary (last dimension)", student)
        return self._loss(kernels, student, teacher, inputs.resolve_keep(tokens), shards, layout.ranks.tokens)

    def _tokens(self, student: Any, teacher: Any, labels: Any, count: Any, loss_weights: Any) -> Tokens:
        inputs.floats("student_logits", student)
        inputs.floats("teacher_logits", teacher)
        if student.shape != teacher.shape:
            raise ValueError(
                f"student_logits has shape {tuple(student.shape)} but teacher_logits has shape "
                f"{tuple(teacher.shape)}; they must match."
            )
        return inputs.distillation_tokens(
            "student_logits", student.shape[:-1], student.device, self.ignore_index, labels, count, loss_weights
        )

    def _loss(
        self,
        kernels: Kernels,
        student: Tensor,
        teacher: Tensor,
        tokens: Tokens,
        shards: Any = None,
        token_groups: tuple[Any, ...] = (),
    ) -> Tensor:
        result_dtype, keep_T = student.dtype, tokens.keep_T
        student, teacher = inputs.floats("student_logits", student), inputs.floats("teacher_logits", teacher)
        if torch.float64 in (student.dtype, teacher.dtype):
            student, teacher = student.double(), teacher.double()
        temperature, reduction = float(self.temperature), "mean" if tokens.num_tokens is None else "sum"
        beta = beta_of(self)
        if beta == 1:
            # KL(student || teacher) is KL(teacher || student) with the roles exchanged.
            student, teacher, beta = teacher, student, 0.0
        coef_T = None
        if isinstance(kernels, WholeLosses):
            check_shards(kernels, shards)
            loss = kernels.divergence(Pairs(student, teacher, keep_T, 1.0 / temperature), beta)
        else:
            group = None if shards is None else shards.group
            if has_known_coefficients(tokens, group, token_groups, student, teacher):
                coef_T = coefficients(tokens, reduction, student.dtype) * temperature**2
            in_forward = coef_T is not None and not beta and kernels.grad_in_forward(student.device)
            call = Call(kernels, temperature, self.chunk_size, group, in_forward, beta)
            loss = Distillation.apply(student, teacher, keep_T, coef_T, call)[0]
        loss = loss if coef_T is not None else reduce_tokens(loss * temperature**2, tokens, reduction, token_groups)
        return cast(loss, self.fp32_upcast, result_dtype)
