"""The two cross entropies over logits as torch modules. No mathematics here."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from loss_core import BackendUnavailable, KernelChoice, MaskedCrossEntropyConfig, TEParallelCEConfig
from loss_core.row_terms import CrossEntropy
from loss_core_torch import compat, inplace, inputs, metrics
from loss_core_torch.autograd.cross_entropy import Call, CrossEntropyFunction
from loss_core_torch.inputs import Tokens
from loss_core_torch.kernels import KernelSet, Rows, WholeLosses
from loss_core_torch.metrics import Result
from loss_core_torch.modules.base import Kernels, LossModule, cast, has_known_factors, is_whole
from loss_core_torch.reduction import coefficients, reduce_tokens


class _LogitsCrossEntropy(LossModule):
    """Cross entropy over logits; the two public classes differ in their fields alone."""

    ignore_index: int
    reduction: str
    fp32_upcast: bool = True
    inplace_grad: bool = False
    logit_softcapping: float
    metrics: tuple[str, ...]

    def with_kernel_choice(self, choice: KernelChoice) -> LossModule:
        if self.inplace_grad:
            if choice.flag in ("torch:te", "torch:plain"):
                raise BackendUnavailable(
                    f"'{choice.flag}' does not write the gradient over the logits (inplace_grad=True): use "
                    "'torch:triton' or 'torch:eager', or inplace_grad=False."
                )
            # Nor may auto take them for a call.
            able = tuple(kernel for kernel in choice.candidates if kernel not in ("te", "plain"))
            choice = replace(choice, candidates=able)
        return super().with_kernel_choice(choice)

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        num_label_tokens: int | Tensor | None = None,
        loss_weights: Tensor | None = None,
    ) -> Result:
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
            tokens are sharded; with reduction="none" a DTensor, unless labels are plain and this rank's own. With
            metrics a pair: the loss, and a dict of them, detached; "num_valid" an int64 scalar.
        Raises:
            ValueError: shapes that do not fit, no classes, a label that is no class (on a CPU; elsewhere that
                token's loss and gradient are NaN), a count or weights without reduction="sum". Over a group it is
                raised on every rank, whichever rank's arguments are at fault.
            TypeError: labels that are no integers, logits that are no floats; other ranks get a ValueError.
            RuntimeError: with inplace_grad, logits that can't be overwritten; see `inplace.check`.
        """
        kernels = self._kernels_for(logits)
        if not is_whole(self.tp_group, logits):
            return self._sharded(kernels, logits, labels, mask, num_label_tokens, loss_weights)
        logits = inputs.floats("logits", logits)
        inputs.not_empty("logits", "vocabulary (last dimension)", logits)
        tokens = self._tokens(logits, labels, mask, num_label_tokens, loss_weights, vocab=logits.shape[-1])
        compute = self._loss_outside_of_graphs if self.inplace_grad else self._loss
        return compute(kernels, logits, inputs.settled(self._in_range(tokens, logits.shape[-1])))

    # Where `inplace.check` has broken a graph, torch.compile goes on behind it: what a graph computes is in new memory,
    # and the logits would be handed on for their gradient.
    @compat.outside_of_graphs
    def _loss_outside_of_graphs(self, kernels: Kernels, logits: Tensor, tokens: Tokens) -> Result:
        return self._loss(kernels, logits, tokens)

    # Hosts exchange messages there, which no graph can hold.
    @compat.outside_of_graphs
    def _sharded(self, kernels: Kernels, given: Any, labels: Any, mask: Any, count: Any, loss_weights: Any) -> Result:
        from loss_core_torch.parallel import placement

        layout = placement.of_logits("logits", given, self.tp_group)
        logits = layout.local(given)

        def check() -> Tokens:
            lead = inputs.floats("logits", logits).shape[:-1]
            own = [
                layout.token_values(name, value, lead)
                for name, value in (("labels", labels), ("mask", mask), ("loss_weights", loss_weights))
            ]
            return self._tokens(logits, own[0], own[1], count, own[2], given)

        tokens, shards = self._agree(layout.ranks, logits, check)
        if shards is None:
            inputs.not_empty("logits", "vocabulary (last dimension)", logits)
        tokens = inputs.settled(self._in_range(tokens, logits.shape[-1] if shards is None else shards.total))
        found = self._loss(kernels, inputs.floats("logits", logits), tokens, shards, layout.ranks.tokens)
        return layout.token_results(found, labels) if self.reduction == "none" else found

    def _tokens(
        self,
        logits: Tensor,
        labels: Any,
        mask: Any,
        count: Any,
        loss_weights: Any,
        given: Any = None,
        vocab: int | None = None,
    ) -> Tokens:
        if self.inplace_grad and inplace.applies(logits):
            inplace.check(logits if given is None else given)
        return inputs.tokens(
            "logits", logits.shape[:-1], logits.device, self.reduction, self.ignore_index, labels, mask,
            num_tokens=count, loss_weights=loss_weights, vocab=vocab,
        )  # fmt: skip

    def _in_range(self, tokens: Tokens, vocab: int) -> Tokens:
        return inputs.in_range(tokens, vocab, self.ignore_index)

    def _loss(
        self, kernels: Kernels, logits: Tensor, tokens: Tokens, shards: Any = None, token_groups: tuple[Any, ...] = ()
    ) -> Result:
        start, group = (0, None) if shards is None else (shards.start, shards.group)
        objective = CrossEntropy.of(self, logits.shape[-1] if shards is None else shards.total)
        rows = Rows(logits, tokens.labels_T, tokens.keep_T, start, float(self.logit_softcapping))
        if isinstance(kernels, WholeLosses):
            loss = self._whole_loss(kernels, rows, objective, tokens, shards, token_groups)
            found = metrics.of_whole(kernels, rows, tokens.keep_T, objective, self.metrics)
        else:
            loss, found = self._loss_and_metrics(kernels, rows, objective, tokens, group, token_groups)
        loss = cast(loss, self.fp32_upcast, logits)
        if not self.metrics:
            return loss
        return loss, metrics.reduced(self.metrics, found, tokens, self.reduction, token_groups)

    def _whole_loss(
        self, kernels: WholeLosses, rows: Rows, objective: CrossEntropy, tokens: Tokens, shards: Any,
        token_groups: tuple[Any, ...],
    ) -> Tensor:  # fmt: skip
        if shards is not None and not shards.even:
            raise ValueError(
                f"{kernels.flag!r} needs the vocabulary in equal shards, ordered by the group's ranks: use "
                "'torch:eager' or 'torch:triton', or pad the head to a multiple of the group's size."
            )
        group = None if shards is None else shards.group
        if self.reduction != "none" and not token_groups and inputs.all_alike(tokens):
            return kernels.cross_entropy(rows, objective, group, self.reduction)
        loss_T = kernels.cross_entropy(rows, objective, group)
        return reduce_tokens(loss_T, tokens, self.reduction, token_groups)

    def _loss_and_metrics(
        self, kernels: KernelSet, rows: Rows, objective: CrossEntropy, tokens: Tokens, group: Any,
        token_groups: tuple[Any, ...],
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        logits, names = rows.logits, metrics.of_tokens(self.metrics)
        overwrite = self.inplace_grad and inplace.applies(logits)
        call = Call(kernels, objective, rows.softcap, rows.vocab_start, group, overwrite, metrics=names)
        coef_T = None
        if self.reduction != "none" and has_known_factors(tokens, group, token_groups, logits):
            call = call._replace(grad_in_forward=not overwrite and kernels.grad_in_forward(logits.device))
            coef_T = coefficients(tokens, self.reduction, logits.dtype)
        loss, *rest = CrossEntropyFunction.apply(logits, tokens.labels_T, tokens.keep_T, coef_T, call)
        found = rest[len(rest) - len(names) :]
        return (reduce_tokens(loss, tokens, self.reduction, token_groups) if coef_T is None else loss), found


class MaskedCrossEntropy(_LogitsCrossEntropy):
    """Cross entropy over logits, with a mask. Config: `loss_core.MaskedCrossEntropyConfig`."""

    config_class = MaskedCrossEntropyConfig


class TEParallelCrossEntropy(_LogitsCrossEntropy):
    """Cross entropy over logits whose vocabulary is sharded over tp_group, if there is one.

    Config: `loss_core.TEParallelCEConfig`. The name is NeMo AutoModel's; any kernel can run it.
    """

    config_class = TEParallelCEConfig
