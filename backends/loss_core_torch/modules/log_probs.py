"""Log-probabilities and entropies as torch modules. No mathematics here."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loss_core import BackendUnavailable, FusedLinearLogProbsConfig, LogProbsConfig, TokenLogProbs
from loss_core_torch import compat, inputs
from loss_core_torch.autograd import log_probs
from loss_core_torch.inputs import Tokens
from loss_core_torch.kernels import Rows, WholeLosses
from loss_core_torch.modules.base import Kernels, LossModule, is_whole
from loss_core_torch.modules.linear import LinearCall, LinearModule
from loss_core_torch.reduction import reduce_tokens, zero_where_ignored
from loss_core_torch.temperature import inverse_temperature
from loss_core_torch.tracing import compute_dtype


class LogProbs(LossModule):
    """Log-probability of each label, and the entropy of its distribution. Config: `loss_core.LogProbsConfig`."""

    config_class = LogProbsConfig
    ignore_index: int
    temperature: float
    logit_softcapping: float
    entropy: bool

    def forward(self, logits: Tensor, labels: Tensor, temperature: float | Tensor | None = None) -> TokenLogProbs:
        """Log-probabilities of labels under softmax(softcap(logits) / temperature).

        Args:
            logits: [..., V] float, any strides; not changed. With tp_group, or as a DTensor: as in MaskedCrossEntropy.
            labels: [...] integers: a class in [0, V over all ranks) or ignore_index; not changed.
            temperature: > 0, a number, or a tensor of one number or [...]; not differentiated. None: the config's.
                Below 2**-63 it is taken for that.
        Returns:
            Log-probabilities [...], and entropies [...] in nats where the config asks for them; float32 (float64 for
            float64 logits), 0 where ignored. Both are differentiable, each with an upstream gradient of its own.
        Raises:
            ValueError: shapes that do not fit, no classes; a label that is no class, a temperature that is not > 0 (on
                a CPU; elsewhere that token is NaN).
            TypeError: labels that are no integers, logits that are no floats.
        """
        kernels = self._kernels_for(logits)
        if not is_whole(self.tp_group, logits):
            found: TokenLogProbs = self._sharded(kernels, logits, labels, temperature)
            return found
        logits = inputs.floats("logits", logits)
        inputs.not_empty("logits", "vocabulary (last dimension)", logits)
        tokens = self._tokens(logits, labels, temperature)
        tokens = inputs.settled(inputs.in_range(tokens, logits.shape[-1], self.ignore_index))
        return self._results(kernels, logits, tokens)

    # Hosts exchange messages there, which no graph can hold.
    @compat.outside_of_graphs
    def _sharded(self, kernels: Kernels, given: Any, labels: Any, temperature: Any) -> Any:
        from loss_core_torch.parallel import placement

        layout = placement.of_logits("logits", given, self.tp_group)
        logits = layout.local(given)

        def check() -> Tokens:
            lead = inputs.floats("logits", logits).shape[:-1]
            own = [layout.token_values(n, x, lead) for n, x in (("labels", labels), ("temperature", temperature))]
            return self._tokens(logits, *own)

        tokens, shards = self._agree(layout.ranks, logits, check)
        if shards is None:
            inputs.not_empty("logits", "vocabulary (last dimension)", logits)
        vocab = logits.shape[-1] if shards is None else shards.total
        tokens = inputs.settled(inputs.in_range(tokens, vocab, self.ignore_index))
        return layout.token_results(self._results(kernels, logits, tokens, shards), labels)

    def _tokens(self, logits: Tensor, labels: Any, temperature: Any) -> Tokens:
        tokens = inputs.tokens("logits", logits.shape[:-1], logits.device, "none", self.ignore_index, labels)
        return _tempered(tokens, temperature, self.temperature, logits)

    def _results(self, kernels: Kernels, logits: Tensor, tokens: Tokens, shards: Any = None) -> TokenLogProbs:
        start, group = (0, None) if shards is None else (shards.start, shards.group)
        softcap, inverse_T = float(self.logit_softcapping), tokens.inverse_temperature_T
        if isinstance(kernels, WholeLosses):
            if group is not None:
                raise BackendUnavailable(
                    f"{kernels.flag!r} needs the whole vocabulary: use 'torch:eager' with a tp_group."
                )
            rows = Rows(logits, tokens.labels_T, tokens.keep_T, start, softcap, inverse_T)
            return _packed(kernels.log_probs(rows, self.entropy), tokens, self.entropy)
        call = log_probs.Call(kernels, self.entropy, softcap, start, group)
        found = log_probs.LogProbabilities.apply(logits, tokens.labels_T, tokens.keep_T, inverse_T, call)
        return _packed(found[:2], tokens, self.entropy)


class FusedLinearLogProbs(LinearModule):
    """Log-probabilities and entropies of hidden_states @ lm_weight.T without the [T, V] logits.

    Config: `loss_core.FusedLinearLogProbsConfig`. On a CPU, ignored tokens take part in no product.
    """

    config_class = FusedLinearLogProbsConfig
    temperature: float
    entropy: bool
    _values = ("temperature",)

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
        given = {"temperature": temperature}
        found: TokenLogProbs = self._evaluate(hidden_states, labels, lm_weight, lm_bias, given)
        return found

    def _tokens(
        self, lead: torch.Size, hidden: Tensor, labels: Any, given: Mapping[str, Any], num_valid: Any
    ) -> Tokens:
        tokens = inputs.tokens("hidden_states", lead, hidden.device, "none", self.ignore_index, labels)
        return _tempered(tokens, given["temperature"], self.temperature, hidden)

    def _of_tokens(self) -> bool:
        return True

    def _loss(self, call: LinearCall) -> TokenLogProbs:
        kernels, tokens = call.kernels, call.tokens
        if isinstance(kernels, WholeLosses):
            return _packed(kernels.linear_log_probs(call.whole(), self.entropy), tokens, self.entropy)
        how = log_probs.LinearCall(kernels, self.entropy, call.source, call.wanted())
        found = log_probs.LinearLogProbabilities.apply(
            call.hidden, call.weight, call.bias, tokens.labels_T, tokens.keep_T, call.places_N,
            tokens.inverse_temperature_T, how,
        )  # fmt: skip
        return _packed(found[:2], tokens, self.entropy)


def _tempered(tokens: Tokens, temperature: Any, default: float, like: Tensor) -> Tokens:
    dtype = compute_dtype(like.dtype)
    inverse_T = inverse_temperature(temperature, default, tokens.labels_T, tokens.shape, dtype)
    return tokens._replace(inverse_temperature_T=inverse_T)


def _packed(found: tuple[Tensor, ...], tokens: Tokens, with_entropy: bool) -> TokenLogProbs:
    """Results of tokens in the shape of labels, NaN where a label is no class."""
    results = (
        reduce_tokens(zero_where_ignored(x_T, tokens.keep_T), tokens, "none") for x_T in found[: 1 + with_entropy]
    )
    return TokenLogProbs(*results)
