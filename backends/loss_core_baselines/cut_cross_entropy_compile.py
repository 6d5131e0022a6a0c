"""cut-cross-entropy's implementation for torch.compile, which also runs on a CPU."""

from __future__ import annotations

from loss_core_baselines import Losses
from loss_core_baselines.cut_cross_entropy import OPTIONS, linear_cross_entropy

LOSSES: Losses = {"linear_cross_entropy": (linear_cross_entropy("torch_compile"), OPTIONS)}
