"""Log-probabilities and entropies as torch modules, over logits and over hidden states. No mathematics here."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loss_core import FusedLinearLogProbsConfig, LogProbsConfig, TokenLogProbs
from loss_core.row_terms import LogProbability
from loss_core_torch import inputs
from loss_core_torch.inputs import Tokens
from loss_core_torch.modules.linear import LinearModule
from loss_core_torch.modules.logits import LogitsModule
from loss_core_torch.modules.rows import RowCall, RowModule
from loss_core_torch.reduction import reduce_tokens
from loss_core_torch.temperature import inverse_temperature
from loss_core_torch.tracing import compute_dtype


class _LogProbs(RowModule):
    """Log-probabilities over logits or hidden states."""

    temperature: float
    entropy: bool
    _token_arguments = ("temperature",)

    def _tokens(
        self, of: str, like: Tensor, lead: torch.Size, labels: Any, args: Mapping[str, Any], vocab: int | None = None
    ) -> Tokens:
        tokens = inputs.tokens(of, lead, like.device, "none", self.ignore_index, labels, vocab=vocab)
        inverse_T = inverse_temperature(
            args["temperature"], self.temperature, tokens.labels_T, lead, compute_dtype(like.dtype)
        )
        return tokens._replace(inverse_temperature_T=inverse_T)

    def _returns_tokens(self) -> bool:
        return True

    def _loss(self, call: RowCall) -> TokenLogProbs:
        values, _ = call.values(LogProbability(self.entropy))
        return TokenLogProbs(*(reduce_tokens(x_T, call.tokens, "none") for x_T in values))


class LogProbs(_LogProbs, LogitsModule):
    """Log-probability of each label, and the entropy of its distribution. Config: `loss_core.LogProbsConfig`."""

    config_class = LogProbsConfig

    def forward(self, logits: Tensor, labels: Tensor, temperature: float | Tensor | None = None) -> TokenLogProbs:
        """Log-probabilities of labels under softmax(softcap(logits) / temperature).

        Args:
            logits: [..., V] float, any strides; not changed. With tp_group, or as a DTensor: as in MaskedCrossEntropy.
            labels: [...] integers: a class in [0, V over all ranks) or ignore_index; not changed.
            temperature: > 0, a number, or a tensor of one number or [...]; not differentiated. None: the config's.
                Values below 2**-63 are raised to it.
        Returns:
            Log-probabilities [...], and entropies [...] in nats with entropy=True; float32 (float64 for float64
            logits), 0 where ignored. Both are differentiable.
        Raises:
            ValueError: shapes that do not fit, no classes; a label that is no class, a temperature that is not > 0 (on
                a CPU; elsewhere that token is NaN).
            TypeError: labels that are no integers, logits that are no floats.
        """
        found: TokenLogProbs = self._evaluate(logits, labels, {"temperature": temperature})
        return found


class FusedLinearLogProbs(_LogProbs, LinearModule):
    """Log-probabilities and entropies of hidden_states @ lm_weight.T without the [T, V] logits.

    Config: `loss_core.FusedLinearLogProbsConfig`. On a CPU, ignored tokens are excluded from the products.
    """

    config_class = FusedLinearLogProbsConfig

    def forward(
        self,
        hidden_states: Tensor,
        labels: Tensor,
        lm_weight: Tensor,
        temperature: float | Tensor | None = None,
        lm_bias: Tensor | None = None,
    ) -> TokenLogProbs:
        """Log-probabilities of labels under softmax(softcap(hidden_states @ lm_weight.T) / temperature).

        Args:
            hidden_states: as in FusedLinearCrossEntropy.
            labels: likewise.
            lm_weight: likewise.
            temperature: as in LogProbs.
            lm_bias: as in FusedLinearCrossEntropy.
        Returns:
            As LogProbs.
        Raises:
            ValueError, TypeError: as FusedLinearCrossEntropy and LogProbs.
        """
        found: TokenLogProbs = self._evaluate(hidden_states, labels, lm_weight, lm_bias, {"temperature": temperature})
        return found
