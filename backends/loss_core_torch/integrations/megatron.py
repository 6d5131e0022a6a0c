"""The loss of Megatron-core's language models: per token, over logits that are sharded and sequence-first.

Tried with megatron-core 0.16: `LanguageModule.compute_language_model_loss`. Megatron shifts the labels: labels[b, s] is
the token after position s. Unshifted labels give a wrong loss.
"""

# B = batch, S = sequence, V = vocabulary

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from loss_core import LossConfig, MaskedCrossEntropyConfig, TEParallelCEConfig
from loss_core_torch import metrics


def language_model_loss(config: LossConfig | None = None, *, backend: str = "torch") -> Callable[..., Tensor]:
    """A function for `model.compute_language_model_loss`: cross entropy of every token.

        model.compute_language_model_loss = language_model_loss(TEParallelCEConfig(reduction="none"))

    Args:
        config: TEParallelCEConfig (the default) or MaskedCrossEntropyConfig, with reduction="none": Megatron masks and
            sums the losses. tp_group None is Megatron's tensor-parallel group, where there is one at the first call.
        backend: flag of the loss, such as "torch:triton".
    Returns:
        `loss(labels, logits)`, which returns [B, S] as `MaskedCrossEntropy`. labels: [B, S] integers, a class of the
        full vocabulary or ignore_index; logits: [S, B, V over the ranks of tp_group] float, any strides, not copied.
    Raises:
        TypeError: config is of another loss.
        ValueError: its reduction is not "none". At a call: labels and logits that don't fit.
    """
    config = TEParallelCEConfig(reduction="none") if config is None else config
    if not isinstance(config, MaskedCrossEntropyConfig | TEParallelCEConfig):
        raise TypeError(
            "language_model_loss takes a TEParallelCEConfig or a MaskedCrossEntropyConfig, of logits and labels; "
            f"got a {type(config).__name__}."
        )
    if config.reduction != "none":
        raise ValueError(
            f"config has reduction={config.reduction!r}, but Megatron takes one loss per token and reduces them by "
            "itself. Use reduction='none'."
        )
    metrics.refuse(config, "Megatron")
    config.build(backend=backend)  # An unusable flag raises here, not at the first call.
    built: list[Any] = []

    def loss(labels: Tensor, logits: Tensor) -> Tensor:
        if labels.dim() != 2 or logits.dim() != 3 or logits.shape[:2] != labels.shape[::-1]:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)} and logits {tuple(logits.shape)}; Megatron's are labels "
                "[batch, sequence] and sequence-first logits [sequence, batch, vocabulary]."
            )
        if not built:
            group = _tensor_parallel_group() if config.tp_group is None else config.tp_group
            built.append(replace(config, tp_group=group).build(backend=backend))
        # The labels are transposed, not the logits, which are thousands of times larger.
        loss_SB: Tensor = built[0](logits, labels.transpose(0, 1))
        return loss_SB.transpose(0, 1).contiguous()

    return loss


def _tensor_parallel_group() -> Any:
    """Megatron's tensor-parallel group, or None where it has none or a single rank."""
    if "megatron.core.parallel_state" not in sys.modules:
        return None
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized() or parallel_state.get_tensor_model_parallel_world_size() < 2:
        return None
    return parallel_state.get_tensor_model_parallel_group()
