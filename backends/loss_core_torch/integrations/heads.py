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

    FSDP2 gathers a head's parameters, and reduces their gradients, in hooks around the head's own call. Within that
    call they are unsharded, and the loss needs no `grad_reduce_group`.

    Args:
        head: `torch.nn.Linear` [V, H], also after `fully_shard`; unchanged after the call. Its bias, if it has one, is
            passed to the loss as `lm_bias`.
        hidden: [..., H] float, the input of the head.
        labels: [...] integers. Not shifted here: hidden[..., t, :] predicts labels[..., t].
        loss: such as `FusedLinearCEConfig().build()`; called with hidden states, labels and the weight [V, H].
        arguments: passed on to the loss, such as num_label_tokens.
    Returns:
        What the loss returns; in the `output_dtype` of the head's MixedPrecisionPolicy, if it has one.
    Raises:
        TypeError: the head is no `torch.nn.Linear`, or has another forward (LoRA, quantised).
    """
    check_head(head)
    # accelerate's hooks (device_map, CPU offload) replace `forward` and call the original as `_old_forward`.
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
            # Not delattr: torch.compile would run it on the head without having set its forward.
            vars(head).pop(name, None)
        else:
            setattr(head, name, before)
    return result


def check_head(head: Any, what: str = "head") -> None:
    """Refuse a head whose logits are not hidden @ weight.T + bias; errors as in `call_in_head`.

    Args:
        what: name of the head in messages.
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
    # fully_shard changes the class to a subclass; quantised and adapted heads have another forward.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise TypeError(
            f"{what} is {kind}, whose forward is not that of torch.nn.Linear (quantised, adapted or wrapped), so its "
            "weight does not say what it computes. Pass a torch.nn.Linear, or compute the loss from logits."
        )
