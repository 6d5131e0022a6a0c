"""Calls a fused loss inside the head module, so that the hooks around the head surround the loss.

Tried with torch 2.13: plain modules, FSDP2 (`fully_shard`), torch.compile.
"""

# V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def call_in_head(
    head: nn.Module, hidden: Tensor, labels: Tensor, loss: Callable[..., Tensor], **arguments: Any
) -> Tensor:
    """`loss(hidden, labels, head.weight, **arguments)`, computed in place of the head's forward.

    FSDP2 gathers a head's parameters, and reduces their gradients, in hooks around the head's own call. Where they are
    read within that call they are whole, and the loss needs no `grad_reduce_group`.

    Args:
        head: `torch.nn.Linear` [V, H], or what `fully_shard` has made of one; as before after the call. Its bias, if it
            has one, is given to the loss as `lm_bias`.
        hidden: [..., H] float, what the head would be called with.
        labels: [...] integers. Not shifted here: hidden[..., t, :] predicts labels[..., t].
        loss: such as `FusedLinearCEConfig().build()`: takes hidden states, labels and the weight [V, H].
        arguments: passed on to the loss, such as num_label_tokens.
    Returns:
        What the loss returns; in the `output_dtype` of the head's MixedPrecisionPolicy, if it has one.
    Raises:
        TypeError: the head is no `torch.nn.Linear`, or computes something else than one (LoRA, quantised).
    """
    check_head(head)
    # Where accelerate has put a hook around the forward (device_map, CPU offload), the forward is the inner one.
    name = "_old_forward" if "_old_forward" in vars(head) else "forward"
    before = vars(head).get(name)

    def forward(hidden: Tensor, labels: Tensor) -> Tensor:
        bias = {} if head.bias is None else {"lm_bias": head.bias}
        return loss(hidden, labels, head.weight, **bias, **arguments)

    setattr(head, name, forward)
    try:
        result: Tensor = head(hidden, labels)
    finally:
        if before is None:
            # Not delattr: torch.compile would run it on a head whose forward it has not set.
            vars(head).pop(name, None)
        else:
            setattr(head, name, before)
    return result


def check_head(head: Any, what: str = "head") -> None:
    """Refuse a head whose weight and bias do not say what it computes; errors as in `call_in_head`.

    Args:
        what: how messages call it.
    """
    kind = f"{type(head).__module__}.{type(head).__qualname__}"
    if isinstance(head, Tensor):
        raise TypeError(f"{what} is a tensor; pass the module that holds it, so that its hooks run.")
    if not isinstance(head, nn.Module):
        raise TypeError(f"{what} is {kind}; pass the torch.nn.Linear that makes the logits, such as model.lm_head.")
    if hasattr(head, "lora_A"):
        raise TypeError(
            f"{what} is {kind}: it has a LoRA adapter, which a loss that reads its weight would leave out. Take "
            "the head out of target_modules and name it in modules_to_save, or compute the loss from logits."
        )
    # fully_shard makes a subclass; quantised and adapted heads have a forward of their own.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise TypeError(
            f"{what} is {kind}, whose forward is not that of torch.nn.Linear (quantised, adapted or wrapped), so its "
            "weight does not say what it computes. Pass a torch.nn.Linear, or compute the loss from logits."
        )
