"""Losses for recipes of NeMo AutoModel, for their `_target_`.

    loss_fn:
      _target_: loss_core_torch.integrations.nemo.fused_ce
      reduction: sum

Tried with nemo-automodel 0.7. NeMo shifts the labels: labels[b, s] is the token after position s. Unshifted labels give
a wrong loss. These are functions because NeMo silently replaces a class that has the name of one of its own.
"""

# B = batch, S = sequence, V = vocabulary, H = hidden

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from loss_core import FusedLinearCEConfig, KDLossConfig, LossConfig, MaskedCrossEntropyConfig
from loss_core_torch import metrics

# The ignored label of NeMo's datasets; it is replaced by a loss's own ignore_index.
_DATASET_IGNORED = -100


def masked_ce(*, backend: str = "torch", **fields: Any) -> nn.Module:
    """Cross entropy over the logits, as `MaskedCrossEntropy` of NeMo AutoModel.

    Args:
        backend: flag of the loss, such as "torch:triton".
        fields: of MaskedCrossEntropyConfig.
    Returns:
        An instance of NeMo's MaskedCrossEntropy, which a recipe accepts for every model.
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
        An instance of NeMo's LinearCrossEntropy, its base class for losses of hidden states. A recipe uses it for
        models whose forward takes logits_to_keep; for others it uses its own MaskedCrossEntropy, and warns. NeMo passes
        only the weight of the head: use `masked_ce` for a head with a bias.
    Raises:
        TypeError, ValueError: as FusedLinearCEConfig.
        ImportError: nemo-automodel is missing.
    """
    return _for_nemo(FusedLinearCEConfig(**fields), backend)


def kd(*, backend: str = "torch", **fields: Any) -> nn.Module:
    """Knowledge distillation for `kd_loss_fn` of a recipe, as `KDLoss` of NeMo AutoModel.

    The recipe's loss is (1 - kd_ratio) * cross entropy + kd_ratio * this, both over the labels of the whole step.

    Args:
        backend: flag of the loss, such as "torch:triton".
        fields: of KDLossConfig.
    Raises:
        TypeError, ValueError: as KDLossConfig.
    """
    built: nn.Module = KDLossConfig(**fields).build(backend=backend)
    return built


def _for_nemo(config: MaskedCrossEntropyConfig | FusedLinearCEConfig, backend: str) -> nn.Module:
    """The loss in a subclass of the class that NeMo expects."""
    metrics.refuse(config, "NeMo AutoModel")
    built: nn.Module = _classes()[type(config)](config, config.build(backend=backend))
    return built


@functools.cache
def _classes() -> dict[type[LossConfig], Any]:
    """Subclasses of NeMo's classes, by config. Defined at the first use: importing this module needs no NeMo."""
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
