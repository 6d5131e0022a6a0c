"""Log-probabilities and entropies: `LogProbs` over logits, `FusedLinearLogProbs` over hidden states and weight."""

# T = tokens (any leading dimensions), V = vocabulary, H = hidden

from __future__ import annotations

from typing import Any

import jax

from loss_core import FusedLinearLogProbsConfig, LogProbsConfig, TokenLogProbs
from loss_core.row_terms import LogProbability
from loss_core_jax import inputs
from loss_core_jax.inputs import ArrayLike
from loss_core_jax.losses.base import Loss, has_fields_of
from loss_core_jax.losses.linear import arithmetic_dtype, read_source
from loss_core_jax.losses.rows import PerRow, RowLoss, results_from_head, results_from_logits
from loss_core_jax.parallel.layout import layout_for
from loss_core_jax.temperature import inverse_temperature

_results_from_logits = jax.jit(results_from_logits, static_argnums=(2, 3))


class _LogProbs(Loss):
    """The preprocessing that is the same over logits and over hidden states."""

    temperature: float
    entropy: bool

    def _per_row(self, labels: ArrayLike, temperature: Any, vocab: int, dtype: Any) -> PerRow:
        target = inputs.as_jax(inputs.read_labels(labels, None, self.ignore_index, vocab))
        return PerRow(target, inverse_temperature(temperature, self.temperature, labels, dtype))


@has_fields_of(LogProbsConfig)
class LogProbs(_LogProbs):
    """Log-probability of each label, and the entropy of its distribution.

    Fields are those of `loss_core.LogProbsConfig`; tp_group is the name of a mesh axis, or a tuple of names.
    """

    def __call__(
        self, logits: ArrayLike, labels: ArrayLike, temperature: float | ArrayLike | None = None
    ) -> TokenLogProbs:
        """Log-probabilities of labels under softmax(softcap(logits) / temperature).

        Args:
            logits: [..., V] floating.
            labels: [...] integers of any width, in [0, V) or ignore_index.
            temperature: > 0, a number, or a floating array, 0-d or [...]; its gradient is 0. None: that of the config.
                Values below 2**-63 are clamped to it.
        Returns:
            Log-probabilities [...], and entropies [...] in nats if the config has entropy=True; float32 (float64 for
            float64 logits), 0 where ignored.
        Raises:
            TypeError: labels are floating or boolean, logits are not floating.
            ValueError: shapes do not match; a readable label or temperature is out of range.
        """
        inputs.check_arrays(logits=logits, labels=labels)
        inputs.check_logits("logits", logits, labels)
        layout = layout_for(self.tp_group, logits, logits, -1)
        vocab = layout.vocab(logits.shape[-1])
        logits = inputs.as_jax(logits)
        per_row = self._per_row(labels, temperature, vocab, inputs.arithmetic_dtype(logits))
        row_loss = RowLoss.of(self, LogProbability(self.entropy), layout, vocab)
        values, _ = _results_from_logits(logits, per_row, row_loss, layout)
        return TokenLogProbs(*values)


@has_fields_of(FusedLinearLogProbsConfig)
class FusedLinearLogProbs(_LogProbs):
    """Log-probabilities and entropies of `hidden_states @ lm_weight.T`; all logits never exist at a time.

    Fields are those of `loss_core.FusedLinearLogProbsConfig`; tp_group is the name of a mesh axis, or a tuple of names.
    """

    _vocab_axis = ("lm_weight", 0)

    def __call__(
        self,
        hidden_states: ArrayLike,
        labels: ArrayLike,
        lm_weight: ArrayLike,
        temperature: float | ArrayLike | None = None,
        lm_bias: ArrayLike | None = None,
    ) -> TokenLogProbs:
        """Log-probabilities of labels under softmax(softcap(hidden_states @ lm_weight.T) / temperature).

        Args:
            hidden_states: as in FusedLinearCrossEntropy.
            labels: as in FusedLinearCrossEntropy.
            lm_weight: as in FusedLinearCrossEntropy.
            temperature: as in LogProbs.
            lm_bias: as in FusedLinearCrossEntropy.
        Returns:
            As LogProbs.
        Raises:
            TypeError, ValueError: as FusedLinearCrossEntropy and LogProbs.
        """
        inputs.check_arrays(hidden_states=hidden_states, labels=labels, lm_weight=lm_weight)
        source, layout = read_source(self, hidden_states, labels, lm_weight, lm_bias)
        vocab = layout.vocab(lm_weight.shape[0])
        per_row = self._per_row(labels, temperature, vocab, arithmetic_dtype(source))
        row_loss = RowLoss.of(self, LogProbability(self.entropy), layout, vocab)
        values, _ = results_from_head(source, per_row, row_loss, layout)
        return TokenLogProbs(*values)
