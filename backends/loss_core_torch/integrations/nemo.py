"""Losses for recipes of NeMo AutoModel: what `_target_` of a recipe names.

    loss_fn:
      _target_: loss_core_torch.integrations.nemo.fused_ce
      reduction: sum

Tried with nemo-automodel 0.7. Labels are shifted already there: labels[b, s] is the token after position s. Unshifted
ones give a wrong number. A class of this library in place of these functions would silently become NeMo's own: NeMo
goes by the name of what it is given.
"""

# B = batch, S = sequence, V = vocabulary, H = hidden

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from loss_core import FusedLinearCEConfig, KDLossConfig, LossConfig, MaskedCrossEntropyConfig
from loss_core_torch import metrics

# What NeMo's datasets mark with; a loss that ignores another label gets that one in its place.
_DATASET_IGNORED = -100


def masked_ce(*, backend: str = "torch", **fields: Any) -> nn.Module:
    """Cross entropy over the logits, as `MaskedCrossEntropy` of NeMo AutoModel.

    Args:
        backend: flag of the loss, such as "torch:triton".
        fields: of MaskedCrossEntropyConfig.
    Returns:
        An instance of NeMo's MaskedCrossEntropy, which a recipe keeps for every model.
    Raises:
        TypeError, ValueError: as MaskedCrossEntropyConfig.
        ImportError: nemo-automodel is missing.
    """
    return _for_nemo(MaskedCrossEntropyConfig(**fields), backend)


def fused_ce(*, backend: str = "torch", **fields: Any) -> nn.Module:
    """Cross entropy fused with the head, as `FusedLinearCrossEntropy` of NeMo AutoModel.

    Args:
        backend: flag of the loss, such as "torch:triton".
        fields: of FusedLinearCEConfig.
    Returns:
        An instance of NeMo's LinearCrossEntropy, the base by which it knows losses of hidden states. A recipe keeps it
        for models whose forward takes logits_to_keep; for others it takes its own MaskedCrossEntropy, and warns.
        NeMo gives it the head's weight alone: a bias would be left out, so take `masked_ce` for a head that has one.
    Raises:
        TypeError, ValueError: as FusedLinearCEConfig.
        ImportError: nemo-automodel is missing.
    """
    return _for_nemo(FusedLinearCEConfig(**fields), backend)


def kd(*, backend: str = "torch", **fields: Any) -> nn.Module:
    """Knowledge distillation for `kd_loss_fn` of a recipe, as `KDLoss` of NeMo AutoModel.

    The recipe mixes it: (1 - kd_ratio) * cross entropy + kd_ratio * this, both over the labels of the whole step.

    Args:
        backend: flag of the loss, such as "torch:triton".
        fields: of KDLossConfig.
    Raises:
        TypeError, ValueError: as KDLossConfig.
    """
    built: nn.Module = KDLossConfig(**fields).build(backend=backend)
    return built


def _for_nemo(config: MaskedCrossEntropyConfig | FusedLinearCEConfig, backend: str) -> nn.Module:
    """The loss within the class that NeMo expects."""
    metrics.refuse(config, "NeMo AutoModel")
    built: nn.Module = _classes()[type(config)](config, config.build(backend=backend))
    return built


@functools.cache
def _classes() -> dict[type[LossConfig], Any]:
    """By config, classes that derive from NeMo's; made at the first use, so that importing this needs no NeMo."""
    try:
        from nemo_automodel.components.loss.linear_ce_base import LinearCrossEntropy
        from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
    except ImportError as error:
        raise ImportError(
            f"loss_core_torch.integrations.nemo needs nemo-automodel ({error}): pip install 'nemo-automodel>=0.7'"
        ) from error

    class MaskedCE(MaskedCrossEntropy):
        """A loss over logits where NeMo expects its own."""

        def __init__(self, config: MaskedCrossEntropyConfig, loss: nn.Module) -> None:
            super().__init__(config.fp32_upcast, config.ignore_index, config.reduction)
            self.loss = loss

        def forward(
            self,
            logits: Tensor,
            labels: Tensor,
            mask: Tensor | None = None,
            num_label_tokens: int | Tensor | None = None,
            loss_weights: Tensor | None = None,
        ) -> Tensor:
            result: Tensor = self.loss(
                logits, _as_ignored(labels.to(logits.device), self.ignore_index), mask, num_label_tokens, loss_weights
            )
            return result

    class FusedCE(LinearCrossEntropy):
        """A loss over hidden states and the head's weight where NeMo expects its own."""

        def __init__(self, config: FusedLinearCEConfig, loss: nn.Module) -> None:
            super().__init__()
            self.ignore_index, self.reduction, self.loss = config.ignore_index, config.reduction, loss

        def forward(
            self,
            hidden_states: Tensor,
            labels: Tensor,
            lm_weight: Tensor,
            num_label_tokens: int | Tensor | None = None,
            grad_reduce_group: Any = None,
            loss_weights: Tensor | None = None,
        ) -> Tensor:
            result: Tensor = self.loss(
                hidden_states, _as_ignored(labels, self.ignore_index), lm_weight, num_label_tokens, grad_reduce_group,
                loss_weights,
            )  # fmt: skip
            return result

    return {MaskedCrossEntropyConfig: MaskedCE, FusedLinearCEConfig: FusedCE}


def _as_ignored(labels: Tensor, ignore_index: int) -> Tensor:
    if ignore_index == _DATASET_IGNORED:
        return labels
    return labels.masked_fill(labels == _DATASET_IGNORED, ignore_index)
