"""The distillation loss as a torch module. No mathematics here."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, H = hidden

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loss_core import (
    KDLossConfig,
)
from loss_core_torch import (
    autograd,
    checks,
    kernels,
    ordinary,
    placement,
    reduction,
)
from loss_core_torch.checks import Tokens
from loss_core_torch.module_base import LossModule
from loss_core_torch.placement import Layout
from loss_core_torch.values import compute_dtype


class KDLoss(LossModule):
    """Forward KL(teacher || student) at temperature T, times T^2. Config: `loss_core.KDLossConfig`."""

    _fields = ("ignore_index", "temperature", "fp32_upcast", "chunk_size")

    def __init__(
        self,
        ignore_index: int = -100,
        temperature: float = 1.0,
        fp32_upcast: bool = True,
        tp_group: Any = None,
        chunk_size: int = 0,
    ) -> None:
        """Fields as in KDLossConfig, which validates them."""
        super().__init__()
        config = KDLossConfig(ignore_index, temperature, fp32_upcast, None, chunk_size)
        self.ignore_index, self.temperature, self.fp32_upcast = config.ignore_index, config.temperature, fp32_upcast
        self.tp_group, self.chunk_size = tp_group, config.chunk_size

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        num_batch_labels: int | Tensor | None = None,
    ) -> Tensor:
        """KL divergence of the student from the teacher, over the positions that count.

        Args:
            student_logits: [..., V] float, any strides; not changed. With tp_group, or as a DTensor: as logits in
                MaskedCrossEntropy.
            teacher_logits: [..., V] float on the same device, of a dtype of its own if need be; gets a
                gradient when it requires one. Sharded as the student's.
            labels: [...] integers: a class in [0, V over all ranks) or ignore_index; not changed. Their
                classes do not enter the loss.
            num_batch_labels: divides the sum; None: the mean over positions that count. 0 gives 0.
        Returns:
            Scalar; float32 (float64 for float64), the student's dtype with fp32_upcast=False.
        Raises:
            ValueError: shapes that do not fit, or a label that is no class (on a CPU; elsewhere NaN); over a group on
                every rank.
            TypeError: labels that are no integers.
        Source: Hinton et al. 2015 (arXiv:1503.02531), section 2.
        """
        self._take_kernel(student_logits)
        if num_batch_labels is None and self.tp_group is None and ordinary.same_kind(student_logits, teacher_logits):
            vocab, scale = student_logits.shape[-1] if student_logits.dim() else 0, float(self.temperature) ** 2
            labels_T = ordinary.labels_of(student_logits, labels, vocab, self.ignore_index, "mean")
            alike = student_logits.shape == teacher_logits.shape
            if labels_T is not None and alike and self._one_pass(student_logits):
                found = ordinary.tokens(labels_T, student_logits.dtype, "mean", scale)
                args = (*found[1:], float(self.temperature), self.chunk_size, self._kernel)
                loss = autograd.run(autograd.DistillationSum, student_logits, teacher_logits, *args)[0]
                return loss if self.fp32_upcast else loss.to(student_logits.dtype)
        layout = placement.of_both(student_logits, teacher_logits, self.tp_group)
        compute = self._compute if layout.ranks.alone() else self._compute_apart
        return compute(layout, student_logits, teacher_logits, labels, num_batch_labels)

    def _compute(self, layout: Layout, student: Any, teacher: Any, labels: Any, count: Any) -> Tensor:
        student, teacher = layout.local(student), layout.local(teacher)

        def check() -> Tokens:
            checks.floats("student_logits", student)
            checks.floats("teacher_logits", teacher)
            if student.shape != teacher.shape:
                raise ValueError(
                    f"student_logits has shape {tuple(student.shape)} but teacher_logits has shape "
                    f"{tuple(teacher.shape)}; they must match."
                )
            lead = student.shape[:-1]
            own = layout.token_values("labels", labels, lead)
            return checks.tokens(
                "student_logits", lead, student.device, "sum", self.ignore_index, own,
                count_name="num_batch_labels", num_tokens=count,
            )  # fmt: skip

        tokens, shards = self._agree(layout, student, check)
        shape, labels_T, keep_T, num_tokens, *_ = tokens
        vocab = student.shape[-1] if shards is None else shards.total
        bad_T = checks.out_of_range(labels_T, keep_T, shape, vocab, self.ignore_index)
        keep_T = reduction.keep_if_counted(keep_T, num_tokens)
        kind = student.dtype
        wide = torch.promote_types(compute_dtype(student.dtype), compute_dtype(teacher.dtype))
        if wide == torch.float64:
            student, teacher = student.to(wide), teacher.to(wide)
        how = "mean" if num_tokens is None else "sum"
        if shards is None and not layout.ranks.tokens and self._one_pass(student):
            coef_T = reduction.coefficients(student.dtype, keep_T, bad_T, how, num_tokens, None)
            factors = (coef_T * self.temperature**2, float(self.temperature), self.chunk_size, self._kernel)
            loss = autograd.DistillationSum.apply(student, teacher, keep_T, *factors)[0]
            return loss if self.fp32_upcast else loss.to(kind)
        group = None if shards is None else shards.group
        args = (float(self.temperature), self.chunk_size, group, self._kernel)
        kl_T = autograd.Distillation.apply(student, teacher, keep_T, *args)[0]
        # The factor is NaN where the label is no class, so that its gradient is NaN as well.
        loss_T = kl_T * reduction.nan_where(torch.full_like(kl_T, self.temperature**2), bad_T)
        loss = reduction.reduce_tokens(loss_T, keep_T, shape, how, num_tokens, groups=layout.ranks.tokens)
        return loss if self.fp32_upcast else loss.to(kind)

    _compute_apart = torch.compiler.disable(_compute)

    def _one_pass(self, student: Tensor) -> bool:
        """Whether loss and the student's gradient can be made together: the rows are whole."""
        return (
            kernels.has_one_pass(self._kernel, "distillation", student.device)
            and torch.is_grad_enabled()
            and student.requires_grad
            # A traced graph can neither hand a buffer over nor be told to recompute.
            and not torch.compiler.is_compiling()
        )
