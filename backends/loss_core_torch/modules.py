"""The losses as torch modules. No mathematics here: checks, one autograd function, and the reduction over [T]."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, H = hidden

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from loss_core import (
    FusedLinearCEConfig,
    KDLossConfig,
    KernelChoice,
    MaskedCrossEntropyConfig,
    TEParallelCEConfig,
    parse_flag,
)
from loss_core_torch import autograd, checks, distributed, kernels, reduction, te
from loss_core_torch.values import compute_dtype


class _Loss(nn.Module):
    """What the four modules share.

    Attributes:
        kernel_choice: which kernel runs, and why.
    """

    _fields: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.with_kernel_choice(KernelChoice("torch:eager", "made directly"))

    def with_kernel_choice(self, choice: KernelChoice) -> _Loss:
        """Run the kernels that the choice names; returns the module."""
        self.kernel_choice = choice
        self._kernel = kernels.load(parse_flag(choice.flag).kernel)
        return self

    def extra_repr(self) -> str:
        values = [f"{name}={getattr(self, name)!r}" for name in self._fields]
        return ", ".join([*values, f"kernel={self.kernel_choice.flag!r}"])


class _LogitsCrossEntropy(_Loss):
    """Cross entropy over logits; the two public classes differ in their fields alone."""

    ignore_index: int
    reduction: str
    fp32_upcast: bool = True
    tp_group: Any = None

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        num_label_tokens: int | Tensor | None = None,
        loss_weights: Tensor | None = None,
    ) -> Tensor:
        """Cross entropy between logits and labels.

        Args:
            logits: [..., V] float32, bfloat16, float16 or float64, any strides; not changed. With
                tp_group: this rank's equal share of the vocabulary, in rank order.
            labels: [...] integers: a class in [0, V over all ranks) or ignore_index; not changed.
            mask: shape of labels, or broadcasting to it; bool, integer or float; 0 ignores the position.
            num_label_tokens: divides the sum; number or 0-d tensor. 0 gives a loss of 0 and zero gradients.
            loss_weights: [...] factor of each token's loss, differentiable; reduction="sum" only.
        Returns:
            Scalar, or the shape of labels for reduction="none"; float32 (float64 for float64 logits),
            the dtype of the logits with fp32_upcast=False.
        Raises:
            ValueError: shapes that do not fit, a label that is no class (on a CPU; elsewhere that
                token's loss and gradient are NaN), a count or weights without reduction="sum".
            TypeError: labels that are no integers, logits that are no floats.
        """
        logits = checks.floats("logits", logits)
        distributed.check_group(self.tp_group)
        shape = logits.shape[:-1]
        num_tokens = checks.count("num_label_tokens", num_label_tokens, self.reduction, logits.device)
        weights_T = checks.weights(loss_weights, shape, self.reduction, logits.device)
        labels_T = checks.labels_like(labels, shape, "logits", logits.device)
        keep_T = checks.kept(labels_T, shape, self.ignore_index, mask)
        vocab = distributed.total_vocab(logits.shape[-1], self.tp_group)
        bad_T = checks.out_of_range(labels_T, keep_T, shape, vocab, self.ignore_index)
        keep_T = reduction.keep_if_counted(keep_T, num_tokens)
        if self._one_pass(logits, weights_T):
            coef_T = reduction.coefficients(logits.dtype, keep_T, bad_T, self.reduction, num_tokens, weights_T)
            loss = autograd.CrossEntropySum.apply(logits, labels_T, keep_T, coef_T, self._kernel)[0]
            return loss if self.fp32_upcast else loss.to(logits.dtype)
        loss_T = self._per_token(logits, labels_T, keep_T, bad_T)
        loss = reduction.reduce_tokens(loss_T, keep_T, shape, self.reduction, num_tokens, weights_T)
        return loss if self.fp32_upcast else loss.to(logits.dtype)

    def _per_token(self, logits: Tensor, labels_T: Tensor, keep_T: Tensor, bad_T: Tensor | None) -> Tensor:
        if self._kernel == "te":
            return te.cross_entropy_per_token(logits, labels_T, keep_T, bad_T, self.tp_group)
        return autograd.CrossEntropy.apply(logits, labels_T, keep_T, bad_T, self.tp_group, self._kernel)[0]

    def _one_pass(self, logits: Tensor, weights_T: Tensor | None) -> bool:
        """Whether loss and gradient can be made together: the factor of each token is known, the row is whole."""
        return (
            kernels.has_one_pass(self._kernel, "cross_entropy", logits.device)
            and self.reduction != "none"
            and self.tp_group is None
            and torch.is_grad_enabled()
            and logits.requires_grad
            # Their gradient is the loss of each token, which may be differentiated again.
            and not (weights_T is not None and weights_T.requires_grad)
            # A traced graph can neither hand a buffer over nor be told to recompute.
            and not torch.compiler.is_compiling()
        )


class MaskedCrossEntropy(_LogitsCrossEntropy):
    """Cross entropy over logits, with a mask. Config: `loss_core.MaskedCrossEntropyConfig`."""

    _fields = ("fp32_upcast", "ignore_index", "reduction")

    def __init__(self, fp32_upcast: bool = True, ignore_index: int = -100, reduction: str = "sum") -> None:
        """Fields as in MaskedCrossEntropyConfig, which validates them."""
        super().__init__()
        config = MaskedCrossEntropyConfig(fp32_upcast, ignore_index, reduction)
        self.fp32_upcast, self.ignore_index, self.reduction = config.fp32_upcast, config.ignore_index, config.reduction


class TEParallelCrossEntropy(_LogitsCrossEntropy):
    """Cross entropy over logits whose vocabulary is sharded over tp_group, if there is one.

    Config: `loss_core.TEParallelCEConfig`. The name is NeMo AutoModel's; any kernel can run it.
    """

    _fields = ("ignore_index", "reduction")

    def __init__(self, ignore_index: int = -100, reduction: str = "sum", tp_group: Any = None) -> None:
        """Fields as in TEParallelCEConfig, which validates them."""
        super().__init__()
        config = TEParallelCEConfig(ignore_index, reduction)
        self.ignore_index, self.reduction, self.tp_group = config.ignore_index, config.reduction, tp_group


class KDLoss(_Loss):
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
            student_logits: [..., V] float, any strides; not changed.
            teacher_logits: [..., V] float on the same device, of a dtype of its own if need be; gets a
                gradient when it requires one.
            labels: [...] integers: a class in [0, V over all ranks) or ignore_index; not changed. Their
                classes do not enter the loss.
            num_batch_labels: divides the sum; None: the mean over positions that count. 0 gives 0.
        Returns:
            Scalar; float32 (float64 for float64), the student's dtype with fp32_upcast=False.
        Raises:
            ValueError: shapes that do not fit, or a label that is no class (on a CPU; elsewhere NaN).
            TypeError: labels that are no integers.
        Source: Hinton et al. 2015 (arXiv:1503.02531), section 2.
        """
        student_logits = checks.floats("student_logits", student_logits)
        teacher_logits = checks.floats("teacher_logits", teacher_logits)
        if student_logits.shape != teacher_logits.shape:
            raise ValueError(
                f"student_logits has shape {tuple(student_logits.shape)} but teacher_logits has shape "
                f"{tuple(teacher_logits.shape)}; they must match."
            )
        distributed.check_group(self.tp_group)
        shape = student_logits.shape[:-1]
        num_tokens = checks.count("num_batch_labels", num_batch_labels, "sum", student_logits.device)
        labels_T = checks.labels_like(labels, shape, "student_logits", student_logits.device)
        keep_T = checks.kept(labels_T, shape, self.ignore_index)
        vocab = distributed.total_vocab(student_logits.shape[-1], self.tp_group)
        bad_T = checks.out_of_range(labels_T, keep_T, shape, vocab, self.ignore_index)
        keep_T = reduction.keep_if_counted(keep_T, num_tokens)
        wide = torch.promote_types(compute_dtype(student_logits.dtype), compute_dtype(teacher_logits.dtype))
        if wide == torch.float64:
            student_logits, teacher_logits = student_logits.to(wide), teacher_logits.to(wide)
        kind = "mean" if num_tokens is None else "sum"
        if self._one_pass(student_logits):
            coef_T = reduction.coefficients(student_logits.dtype, keep_T, bad_T, kind, num_tokens, None)
            args = (coef_T * self.temperature**2, float(self.temperature), self.chunk_size, self._kernel)
            loss = autograd.DistillationSum.apply(student_logits, teacher_logits, keep_T, *args)[0]
            return loss if self.fp32_upcast else loss.to(student_logits.dtype)
        kl_T = autograd.Distillation.apply(
            student_logits,
            teacher_logits,
            keep_T,
            float(self.temperature),
            self.chunk_size,
            self.tp_group,
            self._kernel,
        )[0]
        # The factor is NaN where the label is no class, so that its gradient is NaN as well.
        loss_T = kl_T * reduction.nan_where(torch.full_like(kl_T, self.temperature**2), bad_T)
        loss = reduction.reduce_tokens(loss_T, keep_T, shape, kind, num_tokens)
        return loss if self.fp32_upcast else loss.to(student_logits.dtype)

    def _one_pass(self, student: Tensor) -> bool:
        """Whether loss and the student's gradient can be made together: the rows are whole."""
        return (
            kernels.has_one_pass(self._kernel, "distillation", student.device)
            and self.tp_group is None
            and torch.is_grad_enabled()
            and student.requires_grad
            # A traced graph can neither hand a buffer over nor be told to recompute.
            and not torch.compiler.is_compiling()
        )


class FusedLinearCrossEntropy(_Loss):
    """Cross entropy of hidden_states @ lm_weight.T without the [T, V] logits.

    Config: `loss_core.FusedLinearCEConfig`. On a CPU, ignored tokens take part in no product.
    """

    _fields = ("ignore_index", "logit_softcapping", "reduction")

    def __init__(self, ignore_index: int = -100, logit_softcapping: float = 0.0, reduction: str = "sum") -> None:
        """Fields as in FusedLinearCEConfig, which validates them."""
        super().__init__()
        config = FusedLinearCEConfig(ignore_index, logit_softcapping, reduction)
        self.ignore_index, self.reduction = config.ignore_index, config.reduction
        self.logit_softcapping = config.logit_softcapping

    @staticmethod
    def materialize_lm_weight(lm_weight: Any, *, grad_reduce_group: dist.ProcessGroup | None = None) -> Any:
        """The whole weight of a sharded head, with a backward that gives each shard its right gradient.

        Every rank has tokens of its own, so the shard's gradient is a sum over ranks, not a slice of
        this rank's. As FSDP does, the mean over the ranks is given: scale the loss by the group's size
        where a sum is meant.

        Args:
            lm_weight: [V, H]; a plain tensor is returned as it is, a DTensor is gathered.
            grad_reduce_group: process group over which the ranks' tokens differ; its size must be
                that of the weight's mesh.
        Returns:
            [V, H] plain tensor, not an alias of the shard.
        Raises:
            ValueError: a trainable sharded weight whose mesh does not match the group.
        """
        return distributed.materialize(lm_weight, grad_reduce_group)

    def forward(
        self,
        hidden_states: Tensor,
        labels: Tensor,
        lm_weight: Tensor,
        num_label_tokens: int | Tensor | None = None,
        grad_reduce_group: dist.ProcessGroup | None = None,
        loss_weights: Tensor | None = None,
    ) -> Tensor:
        """Cross entropy of the head's logits and labels.

        Args:
            hidden_states: [..., H] float; not changed.
            labels: [...] integers: a class in [0, V) or ignore_index; not changed.
            lm_weight: [V, H], dtype and device of hidden_states; plain, or a sharded DTensor.
            num_label_tokens: divides the sum; number or 0-d tensor. 0 gives a loss of 0 and zero gradients.
            grad_reduce_group: see materialize_lm_weight; only for a sharded weight.
            loss_weights: [...] factor of each token's loss, differentiable; reduction="sum" only.
        Returns:
            Scalar, or the shape of labels for reduction="none"; float32 (float64 for float64). Under
            autocast both operands are rounded to its dtype first, as F.linear would.
        Raises:
            ValueError: shapes or devices that do not fit, a label that is no class (on a CPU), a count
                or weights without reduction="sum", a sharded weight without its group.
            TypeError: labels that are no integers; hidden_states and lm_weight of two dtypes.
        """
        hidden_states = checks.floats("hidden_states", hidden_states)
        weight_VH = self.materialize_lm_weight(lm_weight, grad_reduce_group=grad_reduce_group)
        weight_VH = checks.floats("lm_weight", weight_VH)
        product_dtype = _product_dtype(hidden_states, weight_VH)
        if weight_VH.dim() != 2 or weight_VH.shape[1] != hidden_states.shape[-1]:
            raise ValueError(
                f"lm_weight has shape {tuple(weight_VH.shape)} but hidden_states has shape "
                f"{tuple(hidden_states.shape)}; lm_weight must be [V, H] with H = {hidden_states.shape[-1]}."
            )
        shape, device = hidden_states.shape[:-1], hidden_states.device
        num_tokens = checks.count("num_label_tokens", num_label_tokens, self.reduction, device)
        weights_T = checks.weights(loss_weights, shape, self.reduction, device)
        labels_T = checks.labels_like(labels, shape, "hidden_states", device)
        keep_T = checks.kept(labels_T, shape, self.ignore_index)
        bad_T = checks.out_of_range(labels_T, keep_T, shape, weight_VH.shape[0], self.ignore_index)
        keep_T = reduction.keep_if_counted(keep_T, num_tokens)
        if bad_T is not None:
            labels_T = torch.where(bad_T, 0, labels_T)
        h_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        softcap = float(self.logit_softcapping)
        if self.reduction == "none":
            loss_T = autograd.LinearCrossEntropy.apply(
                h_TH, weight_VH, labels_T, keep_T, softcap, product_dtype, self._kernel
            )
            return reduction.nan_where(loss_T, bad_T).view(shape)
        coef_T = reduction.coefficients(hidden_states.dtype, keep_T, bad_T, self.reduction, num_tokens, weights_T)
        grad = torch.is_grad_enabled()
        want = (grad and hidden_states.requires_grad, grad and weight_VH.requires_grad)
        args = (h_TH, weight_VH, labels_T, keep_T, coef_T, softcap, product_dtype, want, self._kernel)
        return autograd.LinearCrossEntropySum.apply(*args)[0]


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Dtype to which the operands are rounded: autocast's where it is on, else their own."""
    device = hidden.device
    if weight.device != device:
        raise ValueError(f"hidden_states is on {device} but lm_weight is on {weight.device}; they must match.")
    if torch.is_autocast_enabled(device.type) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device.type)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"hidden_states is {hidden.dtype} but lm_weight is {weight.dtype}; "
            "they must match outside of torch.autocast."
        )
    return hidden.dtype
