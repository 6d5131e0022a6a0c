"""The configs of this library, written out by hand, and losses that are not of this library."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest

from loss_core import (
    ChunkedCEConfig,
    FusedLinearCEConfig,
    FusedLinearKDConfig,
    FusedLinearLogProbsConfig,
    FusedLinearTopKDistillationConfig,
    KDLossConfig,
    LogProbsConfig,
    LossConfig,
    LossFromFactoryConfig,
    MaskedCrossEntropyConfig,
    TEParallelCEConfig,
    TopKDistillationConfig,
)

# Fields of nemo_automodel.components.loss.loss, in its order, with its defaults. Written out by hand.
NEMO = {
    MaskedCrossEntropyConfig: {"fp32_upcast": True, "ignore_index": -100, "reduction": "sum"},
    FusedLinearCEConfig: {"ignore_index": -100, "logit_softcapping": 0.0, "reduction": "sum"},
    TEParallelCEConfig: {"ignore_index": -100, "reduction": "sum", "tp_group": None},
    KDLossConfig: {"ignore_index": -100, "temperature": 1.0, "fp32_upcast": True, "tp_group": None, "chunk_size": 0},
    LossFromFactoryConfig: {"factory": None, "kwargs": {}},
    ChunkedCEConfig: {"chunk_len": 512, "compile": True, "ignore_index": -100, "reduction": "sum"},
}
REGISTRY = {
    "MaskedCrossEntropy": MaskedCrossEntropyConfig,
    "FusedLinearCrossEntropy": FusedLinearCEConfig,
    "TEParallelCrossEntropy": TEParallelCEConfig,
    "ChunkedCrossEntropy": ChunkedCEConfig,
    "KDLoss": KDLossConfig,
    "FusedLinearKDLoss": FusedLinearKDConfig,
    "TopKDistillation": TopKDistillationConfig,
    "FusedLinearTopKDistillation": FusedLinearTopKDistillationConfig,
    "LogProbs": LogProbsConfig,
    "FusedLinearLogProbs": FusedLinearLogProbsConfig,
}
# No field has its default, so that a round trip that drops one shows.
CHANGED = {
    "MaskedCrossEntropy": MaskedCrossEntropyConfig(fp32_upcast=False, ignore_index=0, reduction="none"),
    "FusedLinearCrossEntropy": FusedLinearCEConfig(
        ignore_index=-1, logit_softcapping=30.0, reduction="mean", sequence_parallel=True
    ),
    "TEParallelCrossEntropy": TEParallelCEConfig(ignore_index=7, reduction="mean"),
    "KDLoss": KDLossConfig(
        ignore_index=3, temperature=2.5, fp32_upcast=False, chunk_size=128, divergence="jsd", beta=0.25
    ),
    "LogProbs": LogProbsConfig(ignore_index=3, temperature=2.5, logit_softcapping=30.0, entropy=True),
    "FusedLinearLogProbs": FusedLinearLogProbsConfig(
        ignore_index=3, temperature=0.5, logit_softcapping=5.0, entropy=True, sequence_parallel=True
    ),
    "FusedLinearKDLoss": FusedLinearKDConfig(
        ignore_index=3, temperature=2.5, divergence="jsd", beta=0.25, sequence_parallel=True
    ),
    "TopKDistillation": TopKDistillationConfig(
        ignore_index=3, temperature=2.5, fp32_upcast=False, logit_softcapping=30.0, tail=False
    ),
    "ChunkedCrossEntropy": ChunkedCEConfig(chunk_len=7, compile=False, ignore_index=3, reduction="none"),
    "FusedLinearTopKDistillation": FusedLinearTopKDistillationConfig(
        ignore_index=3, temperature=2.5, logit_softcapping=30.0, tail=False, sequence_parallel=True
    ),
}
TYPED = list(REGISTRY.values())

by_class = pytest.mark.parametrize("cls", TYPED, ids=lambda cls: cls.__name__)
by_config = pytest.mark.parametrize("config", CHANGED.values(), ids=CHANGED)


@dataclass
class ZLossConfig(LossConfig):
    weight: float = 1e-4
    per_class: list[float] = dataclasses.field(default_factory=list)

    def validate(self):
        if self.weight < 0:
            raise ValueError(f"weight must be >= 0, got {self.weight!r}.")


def of_another_library(name):
    """A class of this name that takes any keyword argument."""
    return type(name, (), {"__module__": "elsewhere", "__init__": lambda self, **kwargs: vars(self).update(kwargs)})
