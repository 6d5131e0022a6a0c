"""Losses for Hugging Face models: over the logits in `Trainer`, or fused with the head inside of the model.

Tried with transformers 5.24, peft 0.21, accelerate 1.15 and trl 1.16. Labels are unshifted, as in transformers:
labels[b, s] is the token input_ids[b, s], and is shifted by one here. Shifted labels give a wrong loss.
"""

# B = batch, S = sequence, V = vocabulary, H = hidden

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from loss_core import FusedLinearCEConfig, LossConfig, MaskedCrossEntropyConfig, TEParallelCEConfig
from loss_core.row_terms import CrossEntropy
from loss_core_torch import metrics
from loss_core_torch.integrations import hf_models
from loss_core_torch.integrations.heads import call_in_head

# The label that Trainer excludes from num_items_in_batch.
_IGNORED = -100
_UNDO = "_loss_core_undo"


def causal_lm_loss(config: LossConfig | None = None, *, backend: str = "torch") -> Callable[..., Tensor]:
    """A loss for `Trainer(compute_loss_func=...)`: next-token cross entropy over the model's logits.

    Args:
        config: MaskedCrossEntropyConfig (the default) or TEParallelCEConfig. Its reductions "sum" and "mean" are the
            same here: the sum divided by num_items_in_batch, or the mean where that is None (evaluation).
        backend: flag of the loss, such as "torch:triton".
    Returns:
        `loss(outputs, labels, num_items_in_batch=None)`. outputs: the model's, with logits [B, S, V]; labels: [B, S]
        integers, unshifted; num_items_in_batch: number, or tensor of shape [], [1] or [n_gpu, 1].
    Raises:
        TypeError: config is of another loss.
        ValueError: its reduction is "none", or its ignore_index is not the -100 of transformers.
    """
    config = MaskedCrossEntropyConfig() if config is None else config
    if not isinstance(config, MaskedCrossEntropyConfig | TEParallelCEConfig):
        hint = "; for it there is use_fused_loss(model, config)" if isinstance(config, FusedLinearCEConfig) else ""
        raise TypeError(
            "causal_lm_loss takes a MaskedCrossEntropyConfig or a TEParallelCEConfig, a loss of logits and labels; got "
            f"a {type(config).__name__}{hint}."
        )
    metrics.refuse(config, "Trainer")
    reduced = _by_count(config, backend)

    def loss(outputs: Any, labels: Tensor | None, num_items_in_batch: Any = None) -> Tensor:
        if labels is None:
            raise ValueError("labels is None: the batches of the Trainer need labels [B, S], unshifted.")
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        return reduced(logits, labels, num_items_in_batch=num_items_in_batch)

    return loss


def use_fused_loss(
    model: Any, config: FusedLinearCEConfig | None = None, *, backend: str = "torch"
) -> Callable[[], None]:
    """Patch a causal language model to compute its training loss without logits.

    `model(..., labels=labels)` in training mode then returns the fused loss, and None as logits; everything else,
    auxiliary losses too, is the model's own forward. In evaluation mode it returns the logits, and the loss of the same
    config over them. The model's logit scale and softcap are read from its config, and compared with its forward at the
    first call. A scale multiplies the head's bias, and the hidden states in their dtype, which rounds them. Not under
    DataParallel.

    Args:
        model: a transformers model with a `torch.nn.Linear` head, tied or not, before Trainer or DDP wrap it; or a PEFT
            model, where the head may be in modules_to_save.
        config: reduction as in causal_lm_loss. logit_softcapping: 0 takes the model's.
        backend: flag of the loss, such as "torch:triton".
    Returns:
        A function that undoes this.
    Raises:
        TypeError: model or config is of another type; the head is no plain linear one (LoRA, quantised). Also at the
            forward, for a head that was replaced since.
        ValueError: config has another softcap than the model, a tp_group, or a field that causal_lm_loss refuses; the
            model has a fused loss already.
        RuntimeError: at the forward, for a model that computes its logits or its loss in an unknown way.
    """
    config = FusedLinearCEConfig() if config is None else config
    if not isinstance(config, FusedLinearCEConfig):
        raise TypeError(f"use_fused_loss takes a FusedLinearCEConfig, got a {type(config).__name__}.")
    metrics.refuse(config, "A transformers model")
    if config.tp_group is not None:
        raise ValueError("config has a tp_group, but a transformers model calls its head whole. Leave it out.")
    model = hf_models.base_model(model)
    if _UNDO in vars(model):
        raise ValueError(f"{type(model).__name__} has a fused loss already; undo that one first.")
    hf_models.head_of(model)
    logits = hf_models.read_logits(model.config.get_text_config())
    if config.logit_softcapping not in (0.0, logits.softcap):
        raise ValueError(
            f"logit_softcapping is {config.logit_softcapping} in config, {logits.softcap} in {type(model).__name__}: "
            "leave it at 0, and the model's own is taken."
        )
    fused = _by_count(replace(config, logit_softcapping=logits.softcap), backend)
    over_logits = _by_count(
        MaskedCrossEntropyConfig(ignore_index=config.ignore_index, **CrossEntropy.of(config, 0).options), backend
    )
    before = vars(model).get("forward")
    forward = _FusedForward(type(model).forward, before, fused, over_logits, logits)

    # Trainer drops the columns of a batch that are missing in the signature of the forward.
    @functools.wraps(type(model).forward)
    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    def undo() -> None:
        if getattr(vars(model).get("forward"), "__func__", None) is not patched:
            raise RuntimeError(f"{type(model).__name__}.forward is not this one any more; undo what replaced it first.")
        del model.forward, model._loss_core_undo
        if before is not None:
            model.forward = before

    # A bound method: a deep copy of the model then has one that is bound to the copy.
    model.forward, model._loss_core_undo = types.MethodType(patched, model), undo
    return undo


class _FusedForward:
    """The forward of a model with a fused loss; called with the model, which may be a copy of the one patched."""

    def __init__(self, own: Any, before: Any, fused: Any, over_logits: Any, expected: hf_models.Logits) -> None:
        self.own, self.before, self.fused, self.over_logits = own, before, fused, over_logits
        self.expected, self.checked, self.signature = expected, False, inspect.signature(own)

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        original = functools.partial(self.own, model) if self.before is None else self.before
        if self.signature.bind(model, *args, **kwargs).arguments.get("labels") is None:
            return original(*args, **kwargs)
        if not model.training:
            with hf_models.loss_function(model, self._over_logits):
                return original(*args, **kwargs)
        probe, losses = hf_models.HeadProbe(hf_models.head_of(model)), []

        def loss(logits: Tensor, labels: Tensor, vocab_size: int, **arguments: Any) -> Tensor:
            losses.append(self._in_head(model, probe, logits, labels, vocab_size, arguments))
            return losses[-1]

        with hf_models.loss_function(model, loss), hf_models.replaced_head(model, probe):
            outputs = original(*args, **{**kwargs, "return_dict": True})
        if len(losses) != 1:
            raise RuntimeError(
                f"{type(model).__name__}.forward called self.loss_function {len(losses)} times, so no fused loss can "
                "stand for it. Undo it, and compute the loss from logits: Trainer(compute_loss_func=causal_lm_loss())."
            )
        outputs = type(outputs)(**{**outputs, "logits": None})
        wants_tuple = kwargs.get("return_dict", getattr(model.config, "return_dict", True)) is False
        return outputs.to_tuple() if wants_tuple else outputs

    def _over_logits(self, logits: Tensor, labels: Tensor, vocab_size: int, **arguments: Any) -> Tensor:
        return self.over_logits(logits, labels, **arguments)

    def _in_head(
        self, model: Any, probe: hf_models.HeadProbe, logits: Tensor, labels: Tensor, vocab_size: int, arguments: Any
    ) -> Tensor:
        hidden = probe.hidden_states(model)
        if not self.checked:
            hf_models.check_probe(model, logits, self.expected)
            self.checked = True

        def loss(hidden: Tensor, labels: Tensor, weight: Tensor, **bias: Tensor) -> Tensor:
            if weight.shape[0] != vocab_size:
                raise ValueError(f"The head of {type(model).__name__} has {weight.shape[0]} rows for {vocab_size=}.")
            return self.fused(hidden, labels, weight, **bias, **arguments)

        return call_in_head(probe.head, hidden, labels, hf_models.scaled(loss, self.expected.scale))


def _by_count(config: Any, backend: str) -> Callable[..., Tensor]:
    """The loss as transformers calls it: shifts labels; the sum divided by a count, or without one the mean."""
    if config.reduction == "none" or config.ignore_index != _IGNORED:
        raise ValueError(
            f"config has reduction={config.reduction!r} and ignore_index={config.ignore_index}; transformers needs a "
            f"reduced loss, 'sum' or 'mean', and leaves the label {_IGNORED} out of its counts."
        )
    total = replace(config, reduction="sum").build(backend=backend)
    mean = replace(config, reduction="mean").build(backend=backend)

    def loss(
        scores: Tensor,
        labels: Tensor,
        *weight: Tensor,
        num_items_in_batch: Any = None,
        shift_labels: Tensor | None = None,
        lm_bias: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        bias = {} if lm_bias is None else {"lm_bias": lm_bias}
        # The labels are padded by one: logits without their last position would have to be copied.
        targets = F.pad(labels, (0, 1), value=_IGNORED)[..., 1:] if shift_labels is None else shift_labels
        if num_items_in_batch is None:
            return mean(scores, targets, *weight, **bias)
        if isinstance(num_items_in_batch, Tensor):
            # Trainer repeats the count for each device of DataParallel, and multiplies the loss by their number.
            num_items_in_batch = num_items_in_batch.sum()
        return total(scores, targets, *weight, num_label_tokens=num_items_in_batch, **bias)

    return loss
