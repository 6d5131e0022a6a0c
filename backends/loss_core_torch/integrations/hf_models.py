"""The head of a transformers model, and the scale and softcap that its forward applies to the logits.

Tried with transformers 5.24 and peft 0.21.
"""

# B = batch, S = sequence, V = vocabulary, H = hidden

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from loss_core_torch.integrations.heads import check_head

# Factors of the logits: Cohere, Muse, Falcon-H1.
_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
# Gemma and others; RecurrentGemma.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
# A logit that a softcap leaves nearly unchanged and one that it bounds; a tolerance above the rounding of bfloat16.
_PROBE, _TOLERANCE = (1.0, 100.0), 0.02


class Logits(NamedTuple):
    """The logits of a model: `softcap(scale * (hidden @ weight.T + bias))`.

    Attributes:
        softcap: c in c * tanh(x / c), 0 is off.
    """

    scale: float
    softcap: float


def read_logits(config: Any, *, from_head: bool = True) -> Logits:
    """Scale and softcap in a text config.

    Args:
        from_head: the scale applies to the inputs of the head; False: to the outputs of the model's last layer.
    """
    scale = 1.0
    for name in _FACTORS:
        scale *= _number(config, name, 1.0)
    divisor = _number(config, "logits_scaling", 1.0)
    # HyperCLOVA X multiplies by it, MiniCPM3 divides the hidden states before the head; Granite divides the logits.
    kind = str(getattr(config, "model_type", ""))
    if kind.startswith("hyperclovax"):
        scale *= divisor
    elif not (kind == "minicpm3" and from_head):
        scale /= divisor
    return Logits(scale, next((cap for name in _SOFTCAPS if (cap := _number(config, name, 0.0))), 0.0))


def scaled(loss: Callable[..., Tensor], scale: float) -> Callable[..., Tensor]:
    """The loss of hidden states, labels, weight and maybe lm_bias, with the logits multiplied by a scale."""
    if scale == 1.0:
        return loss

    def scaled_loss(hidden: Tensor, labels: Tensor, weight: Tensor, lm_bias: Tensor | None = None) -> Tensor:
        bias = {} if lm_bias is None else {"lm_bias": lm_bias * scale}
        return loss(hidden * scale, labels, weight, **bias)

    return scaled_loss


def _number(config: Any, name: str, default: float) -> float:
    value = getattr(config, name, None)
    return default if value is None else float(value)


def base_model(model: Any) -> Any:
    """The causal language model itself, out of PEFT's wrapper.

    Raises:
        TypeError: not a causal language model, or one in another wrapper.
    """
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    for inner in ("module", "_orig_mod"):
        if isinstance(getattr(model, inner, None), nn.Module):
            raise TypeError(f"model is wrapped by {kind}; pass the model inside, model.{inner}, before it is wrapped.")
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not (isinstance(model, nn.Module) and hasattr(model, "get_output_embeddings") and hasattr(model, "config")):
        raise TypeError(f"model is {kind}; pass a transformers model with a language modelling head.")
    from transformers.loss.loss_utils import ForCausalLMLoss

    if getattr(model.config, "is_encoder_decoder", False) or model.loss_function is not ForCausalLMLoss:
        raise TypeError(
            f"model is {kind}, whose loss is not that of a causal language model (labels shifted by one). Pass a "
            "decoder-only model, or compute the loss from logits."
        )
    return model


def head_of(model: Any) -> nn.Linear:
    """The head that the next forward uses.

    Raises:
        TypeError: as `heads.check_head`, or the model has no head.
    """
    embeddings = model.get_output_embeddings()
    if embeddings is None:
        raise TypeError(
            f"{type(model).__name__} has no head: get_output_embeddings() gave None. Pass the model with its head, "
            "such as AutoModelForCausalLM makes it."
        )
    name = next((name for name, module in model.named_modules() if module is embeddings), "head")
    head = _active(embeddings)
    check_head(head, f"{type(model).__name__}.{name}")
    return head


def _active(head: Any) -> Any:
    """The copy that PEFT trains, for a head in modules_to_save."""
    if "peft" not in sys.modules:
        return head
    from peft.utils import ModulesToSaveWrapper

    if not isinstance(head, ModulesToSaveWrapper):
        return head
    if head.disable_adapters or not head.active_adapters:
        return head.original_module
    return head.modules_to_save[head.active_adapters[0]]


class HeadProbe(nn.Module):
    """A replacement for the head in a forward: stores the hidden states, and returns two known logits [B, S, 2]."""

    hidden: Tensor | None = None

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        # In a tuple, so that it is no submodule and its parameters have one name.
        self._head = (head,)

    @property
    def head(self) -> nn.Linear:
        return self._head[0]

    def __getattr__(self, name: str) -> Any:
        # Models read the dtype of their head's weight.
        return super().__getattr__(name) if name.startswith("_") else getattr(self._head[0], name)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.hidden is not None:
            raise RuntimeError("The model calls its head more than once in a forward: a fused loss can't stand for it.")
        self.hidden = hidden
        logits = hidden.detach().new_full((*hidden.shape[:-1], 2), _PROBE[0])
        logits[..., 1] = _PROBE[1]
        return logits

    def hidden_states(self, model: Any) -> Tensor:
        """The hidden states with which the model's forward called its head.

        Raises:
            RuntimeError: it did not call its head.
        """
        if self.hidden is None:
            raise RuntimeError(f"{type(model).__name__}.forward makes its logits without calling its head.")
        return self.hidden


@contextmanager
def replaced_head(model: Any, probe: HeadProbe) -> Iterator[None]:
    """Context in which the probe replaces the model's head in all modules that hold it."""
    head = model.get_output_embeddings()
    owners = [(module, name) for module in model.modules() for name, child in module._modules.items() if child is head]
    for module, name in owners:
        module._modules[name] = probe
    try:
        yield
    finally:
        for module, name in owners:
            module._modules[name] = head


@contextmanager
def loss_function(model: Any, loss: Any) -> Iterator[None]:
    """Context in which the model's forward calls the loss as `self.loss_function`."""
    before = vars(model).get("_loss_function")
    model.loss_function = loss
    try:
        yield
    finally:
        if before is None:
            del model._loss_function
        else:
            model.loss_function = before


def check_probe(model: Any, logits: Tensor, expected: Logits) -> None:
    """Compare the probe's logits after the model's forward with those by its config; one device sync.

    Raises:
        RuntimeError: they differ, so the fused loss would be another one.
    """
    wanted = [x * expected.scale for x in _PROBE]
    if expected.softcap:
        wanted = [expected.softcap * math.tanh(x / expected.softcap) for x in wanted]
    found = logits.reshape(-1, logits.shape[-1])[0].tolist()
    if len(found) != 2 or not all(math.isclose(*pair, rel_tol=_TOLERANCE) for pair in zip(found, wanted, strict=True)):
        raise RuntimeError(
            f"{type(model).__name__}.forward turns the logits {list(_PROBE)} into {found}, where its config says "
            f"{wanted} ({expected.scale=:g}, {expected.softcap=:g}): it does something to its logits that is not known "
            "here. Compute the loss from logits: Trainer(compute_loss_func=causal_lm_loss(...))."
        )
