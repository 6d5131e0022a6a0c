"""The fused losses in TRL's trainers, which keep their metrics.

Tried with trl 1.16 and transformers 5.24. TRL replaces the head of every model (`add_fused_lm_head`) by one that
computes per-token log-probabilities and bypasses the model's forward, so `hf.use_fused_loss` has no effect there.
Labels are unshifted, as in TRL: shifted ones give a wrong loss. For a loss over the logits:
`SFTTrainer(compute_loss_func=hf.causal_lm_loss(config))`.
"""

# B = batch, S = sequence, T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

import functools
import importlib
import inspect
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loss_core import FusedLinearCEConfig, FusedLinearLogProbsConfig
from loss_core.row_terms import CrossEntropy
from loss_core_torch import metrics
from loss_core_torch.integrations import hf_models
from loss_core_torch.integrations.heads import call_in_head

_IGNORED = -100
# Largest accepted difference from TRL's log-probabilities; both may come from bfloat16 products.
_TOLERANCE = 0.1
# Arguments of TRL's function for log-probabilities in supported versions.
_ARGUMENTS = (
    "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale",
    "outputs",
)  # fmt: skip


def use_fused_log_probs(*, backend: str = "torch") -> Callable[[], None]:
    """Patch the trainers of this process to compute log-probabilities and entropies with `FusedLinearLogProbs`.

    In SFT, DPO, KTO, GRPO and RLOO, for policies and reference models, in training and evaluation. TRL still computes
    the other values for the metrics of SFT, DPO and KTO (whether a label is the most likely token, mean logits, sums of
    squared probabilities), with one more product with the head.

    Args:
        backend: flag of the loss, such as "torch:triton".
    Returns:
        A function that undoes this.
    Raises:
        ImportError: trl is missing.
        RuntimeError: this version of trl computes log-probabilities in another way.
        ValueError: the trainers are patched already. At a call: a head under DeepSpeed ZeRO-3, a logit scale that is
            not > 0.
    """
    utils = _trl("trainer.utils")
    theirs = getattr(utils, "_ChunkedLogProbFunction", None)
    if isinstance(theirs, _LogProbs):
        raise ValueError("TRL takes its log-probabilities from loss_core already; undo that first.")
    found = () if theirs is None else tuple(inspect.signature(theirs.forward).parameters)[1:]
    if found != _ARGUMENTS:
        raise RuntimeError(
            f"This trl makes log-probabilities from {found}; known is {_ARGUMENTS}. pip install 'trl==1.16.*'"
        )
    ours = utils._ChunkedLogProbFunction = _LogProbs(theirs, backend)

    def undo() -> None:
        if utils._ChunkedLogProbFunction is not ours:
            raise RuntimeError("TRL's log-probabilities are not these any more; undo what replaced them first.")
        utils._ChunkedLogProbFunction = theirs

    return undo


class _LogProbs:
    """Replaces TRL's `ChunkedLogProbFunction`, with the same arguments and results."""

    def __init__(self, theirs: Any, backend: str) -> None:
        self.theirs = theirs
        self._built = functools.cache(lambda **fields: FusedLinearLogProbsConfig(**fields).build(backend=backend))
        self._built(entropy=False, logit_softcapping=0.0)  # An unusable flag raises here.

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        """Log-probabilities, entropies and TRL's three metrics, each [T], or None where not in `outputs`.

        Args:
            hidden: [T, H]; weight: [V, H]; bias: [V] or None.
            targets: [T] classes, shifted already.
        """
        if hasattr(weight, "ds_id"):
            raise ValueError(
                "The head is partitioned by DeepSpeed ZeRO-3, which would take it away before the backward needs it. "
                "Leave the log-probabilities to TRL, or train with FSDP2."
            )
        if not logit_scale > 0.0:
            raise ValueError(f"The model's logit scale is {logit_scale}; it must be > 0.")
        # c tanh(s r / c) / t = (c / s) tanh(r / (c / s)) / (t / s): no scaled copy, no rounding.
        softcap = (final_logit_softcapping or 0.0) / logit_scale
        log_probs = self._built(entropy="entropy" in outputs, logit_softcapping=softcap)
        if weight.dtype.itemsize < hidden.dtype.itemsize:
            # `cast_lm_head_to_fp32`; TRL casts the head in pieces.
            weight = weight.to(hidden.dtype)
        found = log_probs(hidden, targets, weight, temperature / logit_scale, bias)
        metrics = tuple(name for name in outputs if name not in ("log_probs", "entropy"))
        if not metrics:
            return *found, None, None, None
        with torch.no_grad():
            theirs = self.theirs.apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, metrics
            )
        return *found, *theirs[2:]


def use_fused_loss(
    trainer: Any, config: FusedLinearCEConfig | None = None, *, backend: str = "torch"
) -> Callable[[], None]:
    """Patch an SFTTrainer to compute its training loss with a fused loss; its other metrics stay TRL's.

    In training, `log_probs` of the model's outputs are the negative loss of each token, from which the trainer computes
    its loss (`loss_type` "nll" or "dft"). TRL still computes its metrics, with one more product with the head. At the
    first call both log-probabilities are compared. Evaluation stays TRL's.

    Args:
        trainer: an SFTTrainer whose model `hf.use_fused_loss` accepts.
        config: its reduction may be "sum" or "mean", without effect. logit_softcapping: 0 takes the model's.
        backend: flag of the loss, such as "torch:triton".
    Returns:
        A function that undoes this.
    Raises:
        TypeError, ValueError: as `hf.use_fused_loss`; or the trainer is no SFTTrainer of a known version, or has a
            compute_loss_func or label smoothing, with which it would not use this loss.
        RuntimeError: at the first call, if TRL's log-probabilities differ.
    """
    config = FusedLinearCEConfig() if config is None else config
    if not isinstance(config, FusedLinearCEConfig):
        raise TypeError(f"use_fused_loss takes a FusedLinearCEConfig, got a {type(config).__name__}.")
    if config.ignore_index != _IGNORED or config.reduction == "none" or config.tp_group is not None:
        raise ValueError(f"config must have ignore_index=-100, a reduction and no tp_group for TRL, got {config}.")
    metrics.refuse(config, "SFTTrainer")
    _check_trainer(trainer, config)
    model = hf_models.base_model(trainer.model)
    hf_models.head_of(model)
    logits = hf_models.read_logits(model.config.get_text_config(), from_head=False)
    if config.logit_softcapping not in (0.0, logits.softcap):
        raise ValueError(
            f"logit_softcapping is {config.logit_softcapping} in config, but {logits.softcap} in the model."
        )
    loss = replace(config, reduction="none", logit_softcapping=logits.softcap).build(backend=backend)
    return _patch(model, loss, logits.scale, compared=not any(CrossEntropy.of(config, 0).options.values()))


def _patch(model: Any, loss: Any, scale: float, compared: bool) -> Callable[[], None]:
    before, to_compare = model.forward, [compared]

    @functools.wraps(type(model).forward)
    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        if not (kwargs.get("fused_lm_head") and self.training and torch.is_grad_enabled() and labels is not None):
            return before(*args, **kwargs)
        hidden_states: list[Tensor] = []

        def store(module: Any, args: Any, outputs: Any) -> Any:
            hidden_states.append(outputs.last_hidden_state)
            # TRL's metrics need no gradient.
            outputs.last_hidden_state = outputs.last_hidden_state.detach()
            return outputs

        handle = self.base_model.register_forward_hook(store)
        try:
            outputs = before(*args, **kwargs)
        finally:
            handle.remove()
        log_probs = _log_probs(self, hidden_states[0], labels, kwargs.get("shift_labels"), loss, scale)
        if to_compare[0]:
            _compare(model, log_probs, outputs.log_probs)
            to_compare[0] = False
        return type(outputs)(**{**outputs, "loss": None, "log_probs": log_probs})

    patched_forward = types.MethodType(patched, model)

    def undo() -> None:
        if vars(model).get("forward") is not patched_forward:
            raise RuntimeError(f"{type(model).__name__}.forward is not this one any more; undo what replaced it first.")
        model.forward = before

    model.forward = patched_forward
    return undo


def _log_probs(
    model: Any, hidden: Tensor, labels: Tensor, shift_labels: Tensor | None, loss: Any, scale: float
) -> Tensor:
    targets = F.pad(labels, (0, 1), value=_IGNORED)[..., 1:] if shift_labels is None else shift_labels
    loss_BS = call_in_head(hf_models.head_of(model), hidden, targets, hf_models.scaled(loss, scale))
    # TRL drops the last position, unless labels are shifted already.
    return -(loss_BS[:, :-1] if shift_labels is None else loss_BS)


def _compare(model: Any, ours: Tensor, trls: Tensor) -> None:
    difference = float((ours.detach().float() - trls.detach().float()).abs().max()) if ours.numel() else 0.0
    if not difference <= _TOLERANCE:
        raise RuntimeError(
            f"The log-probabilities of {type(model).__name__} differ from TRL's by up to {difference:.3g}: its logits "
            "are made in a way that is not known here. Leave the loss to TRL, or use hf.causal_lm_loss."
        )


def _check_trainer(trainer: Any, config: FusedLinearCEConfig) -> None:
    kind = type(trainer).__name__
    if not isinstance(trainer, _trl("trainer.sft_trainer").SFTTrainer):
        raise TypeError(f"trainer is a {kind}; pass a trl.SFTTrainer, made already.")
    if trainer.compute_loss_func is not None or trainer.label_smoother is not None:
        raise ValueError(
            f"{kind} has a compute_loss_func or a label_smoothing_factor, so it would not use this loss. Leave them "
            "out; label_smoothing is a field of FusedLinearCEConfig."
        )
    options = {name: value for name, value in CrossEntropy.of(config, 0).options.items() if value}
    if trainer.args.loss_type != "nll" and options:
        raise ValueError(f"{', '.join(options)} of config have no meaning for {trainer.args.loss_type=}.")


def _trl(module: str) -> Any:
    try:
        return importlib.import_module(f"trl.{module}")
    except ImportError as error:
        raise ImportError(f"loss_core_torch.integrations.trl needs trl ({error}): pip install 'trl>=1.16'") from error
