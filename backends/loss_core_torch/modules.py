"""The losses as torch modules. No mathematics here: checks, one autograd function, and the reduction over [T]."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from loss_core import (
    BackendUnavailable,
    FusedLinearCEConfig,
    KDLossConfig,
    KernelChoice,
    MaskedCrossEntropyConfig,
    TEParallelCEConfig,
    parse_flag,
)
from loss_core_torch import (
    auto,
    autograd,
    checks,
    distributed,
    inplace,
    kernels,
    ordinary,
    placement,
    placement_linear,
    reduction,
    te,
)
from loss_core_torch.autograd_parallel import ParallelLinearCrossEntropy
from loss_core_torch.checks import Tokens
from loss_core_torch.distributed import Shards
from loss_core_torch.placement import Layout
from loss_core_torch.placement_linear import LinearLayout
from loss_core_torch.values import compute_dtype


class _Loss(nn.Module):
    """What the four modules share.

    Attributes:
        kernel_choice: which kernel runs, and why.
    """

    _fields: tuple[str, ...] = ()
    # The dimension of the tensor that is sharded: logits [..., V].
    _vocab_dim = -1

    def __init__(self) -> None:
        super().__init__()
        self.with_kernel_choice(KernelChoice("torch:eager", "made directly"))

    def with_kernel_choice(self, choice: KernelChoice) -> _Loss:
        """Run the kernels that the choice names; returns the module."""
        self.kernel_choice = choice
        self._kernel = kernels.load(parse_flag(choice.flag).kernel)
        return self

    def kernel_for(self, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> KernelChoice:
        """Which kernel would run for a call, and why.

        Args:
            device, dtype: of the logits or hidden states.
            shape: (T, V), or (T, V, H) for the fused loss.
        """
        candidates = self.kernel_choice.candidates
        if len(candidates) < 2:
            return self.kernel_choice
        return auto.choose(type(self).__name__, device, dtype, shape, candidates)

    def _take_kernel(self, like: Any, weight: Any = None) -> None:
        """With `auto`: change to the kernel of this call, before anything else looks at it.

        Args:
            like: logits, or hidden states beside the weight [V, H]; not checked yet.
        """
        # A graph keeps the kernel that the loss had when it was traced: what is tuned can't be read there.
        if len(self.kernel_choice.candidates) < 2 or torch.compiler.is_compiling():
            return
        if not isinstance(like, Tensor) or like.dim() == 0 or not (weight is None or isinstance(weight, Tensor)):
            return
        tokens = like.numel() // max(like.shape[-1], 1)
        shape = (tokens, like.shape[-1]) if weight is None else (tokens, *weight.shape)
        choice = self.kernel_for(like.device, like.dtype, shape)
        if choice != self.kernel_choice:
            self.with_kernel_choice(choice)

    def _agree(
        self, layout: Layout, like: Any, check: Callable[[], Tokens], **more: Any
    ) -> tuple[Tokens, Shards | None]:
        """The checked tokens of a call and the shards of its vocabulary, once the other ranks are of the same mind."""
        if layout.ranks.alone():
            return check(), None
        settings = {name: getattr(self, name) for name in self._fields} | more
        what = f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"
        return distributed.agree(layout.ranks, what, like, self._vocab_dim, settings["ignore_index"], check)

    def extra_repr(self) -> str:
        values = [f"{name}={getattr(self, name)!r}" for name in self._fields]
        return ", ".join([*values, f"kernel={self.kernel_choice.flag!r}"])


class _LogitsCrossEntropy(_Loss):
    """Cross entropy over logits; the two public classes differ in their fields alone."""

    ignore_index: int
    reduction: str
    fp32_upcast: bool = True
    tp_group: Any = None
    inplace_grad: bool = False

    def with_kernel_choice(self, choice: KernelChoice) -> _Loss:
        if self.inplace_grad and choice.flag == te.FLAG:
            raise BackendUnavailable(
                f"'{te.FLAG}' does not write the gradient over the logits (inplace_grad=True): use 'torch:triton' or "
                "'torch:eager', or inplace_grad=False."
            )
        return super().with_kernel_choice(choice)

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
            logits: [..., V] float32, bfloat16, float16 or float64, any strides; not changed (with
                inplace_grad: the backward leaves its gradient there). With tp_group: this rank's part of the
                vocabulary, of any size, in rank order. Or a DTensor, which needs no tp_group, and gets a gradient of
                its own placement.
            labels: [...] integers: a class in [0, V over all ranks) or ignore_index; not changed. The same on every
                rank of the group. This, mask and loss_weights: plain, or DTensors that lie as the logits' tokens do;
                plain values may also be those of all tokens of a DTensor of logits.
            mask: shape of labels, or broadcasting to it; bool, integer or float; 0 ignores the position.
            num_label_tokens: divides the sum; number or 0-d tensor. 0 gives a loss of 0 and zero gradients.
            loss_weights: [...] factor of each token's loss, differentiable; reduction="sum" only.
        Returns:
            Scalar, or the shape of labels for reduction="none"; float32 (float64 for float64 logits),
            the dtype of the logits with fp32_upcast=False. Of all tokens of a DTensor, on every rank, also where its
            tokens are sharded; with reduction="none" a DTensor, unless labels are plain and this rank's own.
        Raises:
            ValueError: shapes that do not fit, a label that is no class (on a CPU; elsewhere that
                token's loss and gradient are NaN), a count or weights without reduction="sum". Over a group it is
                raised on every rank, whichever rank's arguments are at fault.
            TypeError: labels that are no integers, logits that are no floats; other ranks get a ValueError.
            RuntimeError: with inplace_grad, logits that can't be overwritten; see `inplace.check`.
        """
        self._take_kernel(logits)
        if mask is None and num_label_tokens is None and loss_weights is None and self._simple():
            vocab = logits.shape[-1] if isinstance(logits, Tensor) and logits.dim() else 0
            found = ordinary.tokens(logits, labels, vocab, self.ignore_index, self.reduction)
            if found is not None and self._one_pass(logits, None):
                loss = autograd.run(autograd.CrossEntropySum, logits, *found, self._kernel, False)[0]
                return loss if self.fp32_upcast else loss.to(logits.dtype)
        layout = placement.of_logits("logits", logits, self.tp_group)
        compute = self._compute if layout.ranks.alone() else self._compute_apart
        return compute(layout, logits, labels, mask, num_label_tokens, loss_weights)

    def _simple(self) -> bool:
        """Whether the fields ask for nothing but the loss and a new gradient."""
        return self.tp_group is None and not self.inplace_grad and self.reduction != "none"

    def _compute(self, layout: Layout, logits: Any, labels: Any, mask: Any, count: Any, loss_weights: Any) -> Tensor:
        given, logits = logits, layout.local(logits)
        overwrite = self.inplace_grad and isinstance(logits, Tensor) and inplace.applies(logits)

        def check() -> Tokens:
            lead = checks.floats("logits", logits).shape[:-1]
            if overwrite:
                inplace.check(given)
            own = [
                layout.token_values(name, value, lead)
                for name, value in (("labels", labels), ("mask", mask), ("loss_weights", loss_weights))
            ]
            return checks.tokens(
                "logits", lead, logits.device, self.reduction, self.ignore_index, own[0], own[1], num_tokens=count,
                loss_weights=own[2],
            )  # fmt: skip

        tokens, shards = self._agree(layout, logits, check)
        shape, labels_T, keep_T, num_tokens, weights_T, _ = tokens
        vocab = logits.shape[-1] if shards is None else shards.total
        bad_T = checks.out_of_range(labels_T, keep_T, shape, vocab, self.ignore_index)
        keep_T = reduction.keep_if_counted(keep_T, num_tokens)
        if shards is None and not layout.ranks.tokens and self._one_pass(logits, weights_T):
            coef_T = reduction.coefficients(logits.dtype, keep_T, bad_T, self.reduction, num_tokens, weights_T)
            loss = autograd.CrossEntropySum.apply(logits, labels_T, keep_T, coef_T, self._kernel, overwrite)[0]
            return loss if self.fp32_upcast else loss.to(logits.dtype)
        loss_T = self._per_token(logits, labels_T, keep_T, bad_T, shards, overwrite)
        loss = reduction.reduce_tokens(
            loss_T, keep_T, shape, self.reduction, num_tokens, weights_T, layout.ranks.tokens
        )
        loss = loss if self.fp32_upcast else loss.to(logits.dtype)
        return layout.token_result(loss, labels) if self.reduction == "none" else loss

    # Hosts exchange messages there, which no graph can hold.
    _compute_apart = torch.compiler.disable(_compute)

    def _per_token(
        self,
        logits: Tensor,
        labels_T: Tensor,
        keep_T: Tensor,
        bad_T: Tensor | None,
        shards: Shards | None,
        overwrite: bool,
    ) -> Tensor:
        if self._kernel == "te":
            if shards is not None and not shards.even:
                raise ValueError(
                    "'torch:te' needs the vocabulary in equal shards, ordered by the group's ranks: use 'torch:eager' "
                    "or 'torch:triton', or pad the head to a multiple of the group's size."
                )
            group = None if shards is None else shards.group
            return te.cross_entropy_per_token(logits, labels_T, keep_T, bad_T, group)
        args = (logits, labels_T, keep_T, bad_T, shards, self._kernel, overwrite)
        return autograd.CrossEntropy.apply(*args)[0]

    def _one_pass(self, logits: Tensor, weights_T: Tensor | None) -> bool:
        """Whether loss and gradient can be made together: the factor of each token is known before."""
        return (
            kernels.has_one_pass(self._kernel, "cross_entropy", logits.device)
            and self.reduction != "none"
            and torch.is_grad_enabled()
            and logits.requires_grad
            # Their gradient is the loss of each token, which may be differentiated again.
            and not (weights_T is not None and weights_T.requires_grad)
            # A traced graph can neither hand a buffer over nor be told to recompute.
            and not torch.compiler.is_compiling()
        )


class MaskedCrossEntropy(_LogitsCrossEntropy):
    """Cross entropy over logits, with a mask. Config: `loss_core.MaskedCrossEntropyConfig`."""

    _fields = ("fp32_upcast", "ignore_index", "reduction", "inplace_grad")

    def __init__(
        self,
        fp32_upcast: bool = True,
        ignore_index: int = -100,
        reduction: str = "sum",
        tp_group: Any = None,
        inplace_grad: bool = False,
    ) -> None:
        """Fields as in MaskedCrossEntropyConfig, which validates them."""
        super().__init__()
        config = MaskedCrossEntropyConfig(fp32_upcast, ignore_index, reduction, None, inplace_grad)
        self.fp32_upcast, self.ignore_index, self.reduction = config.fp32_upcast, config.ignore_index, config.reduction
        self.tp_group, self.inplace_grad = tp_group, config.inplace_grad


class TEParallelCrossEntropy(_LogitsCrossEntropy):
    """Cross entropy over logits whose vocabulary is sharded over tp_group, if there is one.

    Config: `loss_core.TEParallelCEConfig`. The name is NeMo AutoModel's; any kernel can run it.
    """

    _fields = ("ignore_index", "reduction", "inplace_grad")

    def __init__(
        self, ignore_index: int = -100, reduction: str = "sum", tp_group: Any = None, inplace_grad: bool = False
    ) -> None:
        """Fields as in TEParallelCEConfig, which validates them."""
        super().__init__()
        config = TEParallelCEConfig(ignore_index, reduction, None, inplace_grad)
        self.ignore_index, self.reduction, self.tp_group = config.ignore_index, config.reduction, tp_group
        self.inplace_grad = config.inplace_grad


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
            found = ordinary.tokens(student_logits, labels, vocab, self.ignore_index, "mean", scale)
            if found is not None and student_logits.shape == teacher_logits.shape and self._one_pass(student_logits):
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


class FusedLinearCrossEntropy(_Loss):
    """Cross entropy of hidden_states @ lm_weight.T without the [T, V] logits.

    Config: `loss_core.FusedLinearCEConfig`. On a CPU, ignored tokens take part in no product;
    elsewhere so with skip_ignored=True, or where forward is given num_valid_tokens (whole vocabularies).
    """

    _fields = ("ignore_index", "logit_softcapping", "reduction", "sequence_parallel", "skip_ignored")
    # Numbers that give tensors their shape: no tensors themselves, for the bridge.
    static_arguments = ("num_valid_tokens",)
    # lm_weight [V, H].
    _vocab_dim = 0

    def __init__(
        self,
        ignore_index: int = -100,
        logit_softcapping: float = 0.0,
        reduction: str = "sum",
        tp_group: Any = None,
        sequence_parallel: bool = False,
        skip_ignored: bool | None = None,
    ) -> None:
        """Fields as in FusedLinearCEConfig, which validates them."""
        super().__init__()
        config = FusedLinearCEConfig(ignore_index, logit_softcapping, reduction, None, sequence_parallel, skip_ignored)
        self.ignore_index, self.reduction = config.ignore_index, config.reduction
        self.logit_softcapping, self.skip_ignored = config.logit_softcapping, config.skip_ignored
        self.tp_group, self.sequence_parallel = tp_group, config.sequence_parallel

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
        num_valid_tokens: int | None = None,
    ) -> Tensor:
        """Cross entropy of the head's logits and labels.

        Args:
            hidden_states: [..., H] float; not changed. With sequence_parallel: this rank's share of the first
                dimension. A DTensor's placement says as much, and its loss is that of all its tokens.
            labels: [...] integers: a class in [0, V over all ranks) or ignore_index; not changed. All tokens of the
                group over which the vocabulary is sharded, the same on each of its ranks.
            lm_weight: [V, H], dtype and device of hidden_states. With tp_group: this rank's rows. A DTensor stays
                sharded over the dimension of its mesh that is tp_group's, or is named "tp", or over which FSDP did
                not cut it, or over which the DTensor of hidden_states is replicated; it is gathered over the others.
            num_label_tokens: divides the sum; number or 0-d tensor. 0 gives a loss of 0 and zero gradients.
            grad_reduce_group: see materialize_lm_weight; only for a weight that is gathered.
            loss_weights: [...] factor of each token's loss, differentiable; reduction="sum" only.
            num_valid_tokens: how many labels are not ignore_index, in this call, as a Python integer; the others then
                take part in no product on any device, without a host sync and with static shapes. A wrong number
                is a ValueError on a CPU, a NaN elsewhere.
        Returns:
            Scalar, or the shape of labels for reduction="none"; float32 (float64 for float64). Under
            autocast both operands are rounded to its dtype first, as F.linear would.
        Raises:
            ValueError: shapes or devices that do not fit, a label that is no class (on a CPU), a count
                or weights without reduction="sum", a sharded weight without its group, placements that can't be
                served, num_valid_tokens with skip_ignored=False; over a group on every rank.
            TypeError: labels that are no integers; hidden_states and lm_weight of two dtypes.
        """
        self._take_kernel(hidden_states, lm_weight)
        given = (num_label_tokens, grad_reduce_group, loss_weights, num_valid_tokens)
        if all(x is None for x in given) and (loss := self._ordinary(hidden_states, labels, lm_weight)) is not None:
            return loss
        layout = placement_linear.of_linear(
            hidden_states, lm_weight, self.tp_group, grad_reduce_group, self.sequence_parallel
        )
        if layout.placed:
            weight = placement_linear.local_weight(layout, lm_weight)
        else:
            weight = self.materialize_lm_weight(lm_weight, grad_reduce_group=grad_reduce_group)
        compute = self._compute if layout.tokens.ranks.alone() else self._compute_apart
        return compute(layout, hidden_states, labels, weight, num_label_tokens, loss_weights, num_valid_tokens)

    def _ordinary(self, hidden: Any, labels: Any, weight: Any) -> Tensor | None:
        """The loss of an ordinary call, None for any other; see `ordinary`."""
        if (
            self.tp_group is not None
            or self.sequence_parallel
            or self.skip_ignored is not None
            or not ordinary.same_kind(hidden, weight)
            or weight.dim() != 2
            or hidden.shape[-1:] != weight.shape[1:]
            or torch.is_autocast_enabled("cpu")
        ):
            return None
        found = ordinary.tokens(hidden, labels, weight.shape[0], self.ignore_index, self.reduction)
        if found is None:
            return None
        grad = torch.is_grad_enabled()
        want = (grad and hidden.requires_grad, grad and weight.requires_grad)
        args = (float(self.logit_softcapping), hidden.dtype, want, self._kernel, None, None)
        h_TH = hidden.reshape(-1, hidden.shape[-1])
        return autograd.run(autograd.LinearCrossEntropySum, h_TH, weight, *found, *args)[0]

    def _compute(
        self,
        linear: LinearLayout,
        hidden: Any,
        labels: Any,
        weight: Any,
        count: Any,
        loss_weights: Any,
        num_valid: int | None,
    ) -> Tensor:
        layout = linear.tokens
        hidden = layout.local(hidden)

        def check() -> Tokens:
            checks.floats("hidden_states", hidden)
            checks.floats("lm_weight", weight)
            _product_dtype(hidden, weight)
            if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
                raise ValueError(
                    f"lm_weight has shape {tuple(weight.shape)} but hidden_states has shape {tuple(hidden.shape)}; "
                    f"lm_weight must be [V, H] with H = {hidden.shape[-1]}."
                )
            lead = placement_linear.whole_lead(linear, hidden)
            own = [layout.token_values(n, x, lead) for n, x in (("labels", labels), ("loss_weights", loss_weights))]
            found = checks.tokens(
                "hidden_states", lead, hidden.device, self.reduction, self.ignore_index, own[0], num_tokens=count,
                loss_weights=own[1],
            )  # fmt: skip
            return found._replace(one_or_nan=checks.valid_tokens(num_valid, found.keep_T, self.skip_ignored))

        trains = torch.is_grad_enabled() and isinstance(hidden, Tensor) and hidden.requires_grad
        tokens, shards = self._agree(
            layout, weight, check, hidden_states_require_grad=trains, num_valid_tokens=num_valid
        )
        shape, labels_T, keep_T, num_tokens, weights_T, one_or_nan = tokens
        product_dtype = _product_dtype(hidden, weight)
        vocab = weight.shape[0] if shards is None else shards.total
        bad_T = checks.out_of_range(labels_T, keep_T, shape, vocab, self.ignore_index)
        skip = (self.skip_ignored, num_valid)
        keep_T = reduction.keep_if_counted(keep_T, num_tokens)
        if shards is None and self.reduction != "none" and not layout.ranks.tokens:
            tokens = Tokens(shape, labels_T, keep_T, num_tokens, weights_T)
            loss = self._with_gradients(hidden, weight, tokens, bad_T, product_dtype, skip)
            return loss if one_or_nan is None else loss * one_or_nan
        loss_T = self._per_token(
            hidden, weight, labels_T, keep_T, bad_T, product_dtype, shards, linear.sequence_dim, skip
        )
        loss_T = loss_T if one_or_nan is None else loss_T * one_or_nan
        loss = reduction.reduce_tokens(
            loss_T, keep_T, shape, self.reduction, num_tokens, weights_T, layout.ranks.tokens
        )
        return layout.token_result(loss, labels) if self.reduction == "none" else loss

    # Hosts exchange messages there, which no graph can hold.
    _compute_apart = torch.compiler.disable(_compute)

    def _with_gradients(
        self,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tokens,
        bad_T: Tensor | None,
        product_dtype: torch.dtype,
        skip: tuple[bool | None, int | None],
    ) -> Tensor:
        """The reduced loss over a whole vocabulary: the factor of each token is known, so one pass makes all."""
        _, labels_T, keep_T, num_tokens, weights_T, _ = tokens
        coef_T = reduction.coefficients(hidden.dtype, keep_T, bad_T, self.reduction, num_tokens, weights_T)
        if bad_T is not None:
            labels_T = torch.where(bad_T, 0, labels_T)
        h_TH = hidden.reshape(-1, hidden.shape[-1])
        grad = torch.is_grad_enabled()
        want = (grad and hidden.requires_grad, grad and weight.requires_grad)
        softcap = float(self.logit_softcapping)
        args = (h_TH, weight, labels_T, keep_T, coef_T, softcap, product_dtype, want, self._kernel, *skip)
        return autograd.LinearCrossEntropySum.apply(*args)[0]

    def _per_token(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels_T: Tensor,
        keep_T: Tensor,
        bad_T: Tensor | None,
        product_dtype: torch.dtype,
        shards: Shards | None,
        sequence_dim: int | None,
        skip: tuple[bool | None, int | None],
    ) -> Tensor:
        softcap = float(self.logit_softcapping)
        if shards is not None:
            return ParallelLinearCrossEntropy.apply(
                hidden, weight, labels_T, keep_T, bad_T, softcap, product_dtype, shards, sequence_dim, self._kernel,
                *skip,
            )  # fmt: skip
        if bad_T is not None:
            labels_T = torch.where(bad_T, 0, labels_T)
        h_TH = hidden.reshape(-1, hidden.shape[-1])
        args = (h_TH, weight, labels_T, keep_T, softcap, product_dtype, self._kernel, *skip)
        loss_T = autograd.LinearCrossEntropy.apply(*args)
        return reduction.nan_where(loss_T, bad_T)


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Dtype to which the operands are rounded: autocast's where it is on, else their own."""
    device = hidden.device
    if weight.device != device:
        raise ValueError(f"hidden_states is on {device} but lm_weight is on {weight.device}; they must match.")
    # "meta" (shapes without values, as the bridge asks for) is unknown to autocast.
    autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    if autocast and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device.type)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"hidden_states is {hidden.dtype} but lm_weight is {weight.dtype}; "
            "they must match outside of torch.autocast."
        )
    return hidden.dtype
