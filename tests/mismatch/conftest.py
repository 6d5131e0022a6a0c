"""A small head of random weights, and the ways in which a system may compute log-probabilities from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

BF16 = torch.bfloat16


class Model:
    """Hidden states, head and labels; `logprobs` computes a system's log-probabilities from its logits."""

    def __init__(self, sequences=5, length=40, vocab=150, hidden=48, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(sequences * length, hidden, generator=generator)
        self.weight = 1.5 * torch.randn(vocab, hidden, generator=generator) / hidden**0.5
        self.labels = torch.randint(vocab, (sequences, length), generator=generator)

    def logits(self, dtype=torch.float32):
        return self.hidden.to(dtype) @ self.weight.to(dtype).T

    def logprobs(self, logits, labels=None):
        labels = self.labels if labels is None else labels
        found = logits.log_softmax(-1).gather(1, labels.reshape(-1, 1))
        return found.reshape(labels.shape).float().numpy()

    def arrays(self, **arrays):
        """Arrays of a dump; both systems compute in float32 unless replaced."""
        known = {
            "labels": self.labels.numpy(),
            "trainer_logprobs": self.logprobs(self.logits()),
            "engine_logprobs": self.logprobs(self.logits()),
            "hidden_states": self.hidden.reshape(*self.labels.shape, -1).numpy(),
            "lm_weight": self.weight.numpy(),
        }
        return {name: np.asarray(a) for name, a in (known | arrays).items() if a is not None}


@pytest.fixture(scope="session")
def model():
    return Model()
