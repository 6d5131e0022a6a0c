"""The fused distillation in TRL's DistillationTrainer, which keeps its metrics.

Tried with trl 1.16. TRL's divergences and its `beta` are those of KDLossConfig, without the factor T^2.
"""

# B = batch, S = completion tokens, V = vocabulary, H = hidden

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loss_core import FusedLinearKDConfig, FusedLinearLogProbsConfig

_IGNORED = -100
# TRL's function for the loss, and its arguments in supported versions.
_FUNCTION = "_chunked_divergence_loss"
_ARGUMENTS = (
    "student_hidden_states", "teacher_hidden_states", "student_lm_head_weight", "teacher_lm_head_weight",
    "completion_mask", "beta", "num_items_in_batch", "student_lm_head_bias", "teacher_lm_head_bias",
    "student_logit_scale", "teacher_logit_scale", "student_final_logit_softcapping",
    "teacher_final_logit_softcapping", "temperature",
)  # fmt: skip
_NOT_TAKEN = (
    "student_lm_head_bias", "teacher_lm_head_bias", "student_final_logit_softcapping", "teacher_final_logit_softcapping"
)  # fmt: skip


def use_fused_distillation(*, backend: str = "torch") -> Callable[[], None]:
    """Patch the DistillationTrainers of this process to compute their loss with `FusedLinearKDLoss`.

    `FusedLinearLogProbs` computes the student's entropy, which the trainer logs, with one more product with its head.

    Args:
        backend: flag of both, such as "torch:triton".
    Returns:
        A function that undoes this.
    Raises:
        ImportError: trl is missing.
        RuntimeError: this version of trl computes the divergence in another way.
        ValueError: the trainers are patched already. At a call: a head with a bias, a softcap, or a scale that is not
            > 0, or one that DeepSpeed ZeRO-3 has partitioned.
    """
    try:
        trainer = importlib.import_module("trl.trainer.distillation_trainer")
    except ImportError as error:
        raise ImportError(f"use_fused_distillation needs trl ({error}): pip install 'trl>=1.16'") from error
    theirs = getattr(trainer, _FUNCTION, None)
    if isinstance(theirs, _Divergence):
        raise ValueError("TRL takes its divergence from loss_core already; undo that first.")
    found = () if theirs is None else tuple(inspect.signature(theirs).parameters)
    if found != _ARGUMENTS:
        raise RuntimeError(f"This trl makes divergences from {found}; known is {_ARGUMENTS}. pip install 'trl==1.16.*'")
    ours = _Divergence(backend)
    setattr(trainer, _FUNCTION, ours)

    def undo() -> None:
        if getattr(trainer, _FUNCTION) is not ours:
            raise RuntimeError("TRL's divergence is not this one any more; undo what replaced it first.")
        setattr(trainer, _FUNCTION, theirs)

    return undo


class _Divergence:
    """Replaces TRL's function, with the same arguments and results."""

    def __init__(self, backend: str) -> None:
        self._built = functools.cache(lambda config, **fields: config(**fields).build(backend=backend))
        # An unusable flag raises here.
        self._built(FusedLinearKDConfig, temperature=1.0, divergence="forward_kl", beta=0.0)

    def __call__(
        self,
        student_hidden_states: Tensor,
        teacher_hidden_states: Tensor,
        student_lm_head_weight: Tensor,
        teacher_lm_head_weight: Tensor,
        completion_mask: Tensor,
        beta: float,
        num_items_in_batch: int | Tensor | None = None,
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
        temperature: float = 1.0,
        **others: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the sum of the student's entropies, and the number of valid tokens.

        Args:
            student_hidden_states: [B, S, H]; the teacher's: [B, S, H_t].
            student_lm_head_weight: [V, H]; the teacher's: [V, H_t].
            completion_mask: [B, S], 1 where a token is valid.
            num_items_in_batch: divides the sum; None: the mean over valid tokens.
            others: biases and softcaps; each must be None.
        """
        _check(student_lm_head_weight, teacher_lm_head_weight, student_logit_scale, teacher_logit_scale, others)
        # The student's scale is part of the temperature, which avoids rounding scaled hidden states.
        student_temperature = temperature / student_logit_scale
        if teacher_logit_scale != student_logit_scale:
            teacher_hidden_states = teacher_hidden_states * (teacher_logit_scale / student_logit_scale)
        labels = torch.where(completion_mask != 0, 0, _IGNORED)
        kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(float(beta), "jsd")
        divergence = self._built(
            FusedLinearKDConfig, temperature=student_temperature, divergence=kind, beta=float(beta)
        )
        loss = divergence(
            student_hidden_states, student_lm_head_weight, teacher_hidden_states, teacher_lm_head_weight, labels,
            num_items_in_batch,
        )  # fmt: skip
        with torch.no_grad():
            log_probs = self._built(FusedLinearLogProbsConfig, temperature=student_temperature, entropy=True)
            entropy = log_probs(student_hidden_states, labels, student_lm_head_weight).entropy
        return loss / student_temperature**2, entropy.sum(), (labels != _IGNORED).sum()


def _check(
    student_weight: Tensor, teacher_weight: Tensor, student_scale: float, teacher_scale: float, others: Any
) -> None:
    """Refuse heads whose logits FusedLinearKDLoss does not compute."""
    if set(others) - set(_NOT_TAKEN):
        raise TypeError(f"unknown arguments {sorted(set(others) - set(_NOT_TAKEN))}; known are {_ARGUMENTS}.")
    for name in _NOT_TAKEN:
        if others.get(name) is not None:
            raise ValueError(
                f"{name} is given, which FusedLinearKDLoss does not have: its logits are hidden_states @ lm_weight.T. "
                "Leave the divergence of this model to TRL."
            )
    for of, scale in (("student", student_scale), ("teacher", teacher_scale)):
        if not scale > 0.0:
            raise ValueError(f"The {of}'s logit scale is {scale}; it must be > 0.")
    for of, weight in (("student", student_weight), ("teacher", teacher_weight)):
        if hasattr(weight, "ds_id"):
            raise ValueError(
                f"The {of}'s head is partitioned by DeepSpeed ZeRO-3, which would take it away before the backward "
                "needs it. Leave the divergence to TRL, or train with FSDP2."
            )
