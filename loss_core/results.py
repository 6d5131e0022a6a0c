"""Result types of losses that return more than one array."""

from __future__ import annotations

from typing import Any, NamedTuple


class TokenLogProbs(NamedTuple):
    """Log-probabilities of given tokens.

    Attributes:
        logprobs: [...] log-probability of each label, float32 (float64 for float64 inputs); 0 where ignored.
        entropy: [...] entropy of each token's distribution, in nats, same dtype; None if the config has entropy=False.
    """

    logprobs: Any
    entropy: Any = None
