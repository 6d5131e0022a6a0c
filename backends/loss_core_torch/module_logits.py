"""The two cross entropies over logits as torch modules. No mathematics here."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, H = hidden

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from loss_core import (
    BackendUnavailable,
    KernelChoice,
    MaskedCrossEntropyConfig,
    TEParallelCEConfig,
)
from loss_core_torch import (
    autograd,
    checks,
    inplace,
    kernels,
    ordinary,
    placement,
    reduction,
    te,
)
from loss_core_torch.checks import Tokens
from loss_core_torch.distributed import Shards
from loss_core_torch.module_base import LossModule
from loss_core_torch.placement import Layout


class _LogitsCrossEntropy(LossModule):
    """Cross entropy over logits; the two public classes differ in their fields alone."""

    ignore_index: int
    reduction: str
    fp32_upcast: bool = True
    tp_group: Any = None
    inplace_grad: bool = False

    def with_kernel_choice(self, choice: KernelChoice) -> LossModule:
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
            labels_T = ordinary.labels_of(logits, labels, vocab, self.ignore_index, self.reduction)
            if labels_T is not None and (loss := self._ordinary(logits, labels_T)) is not None:
                return loss
        layout = placement.of_logits("logits", logits, self.tp_group)
        compute = self._compute if layout.ranks.alone() else self._compute_apart
        return compute(layout, logits, labels, mask, num_label_tokens, loss_weights)

    def _ordinary(self, logits: Tensor, labels_T: Tensor) -> Tensor | None:
        """The loss of an ordinary call, where there is a shorter way to it; see `ordinary`."""
        if self._kernel == "eager":
            loss = ordinary.small_cross_entropy(logits, labels_T, self.reduction)
            if loss is not None:
                return loss
        if not self._one_pass(logits, None):
            wanted = torch.is_grad_enabled() and logits.requires_grad
            wanted = wanted or forward_ad.unpack_dual(logits).tangent is not None
            return None if wanted or self._kernel == "te" else self._evaluated(logits, labels_T)
        tokens = ordinary.tokens(labels_T, logits.dtype, self.reduction)
        loss = autograd.run(autograd.CrossEntropySum, logits, *tokens, self._kernel, False)[0]
        return loss if self.fp32_upcast else loss.to(logits.dtype)

    def _evaluated(self, logits: Tensor, labels_T: Tensor) -> Tensor:
        """The loss of an ordinary call of which no gradient is wanted: no token needs a factor."""
        loss_T = autograd.cross_entropy_values(logits, labels_T, self._kernel)
        loss = loss_T.mean() if self.reduction == "mean" else loss_T.sum()
        return loss if self.fp32_upcast else loss.to(logits.dtype)

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
