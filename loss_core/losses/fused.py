"""The definition of a fused linear loss (hidden states and weights), from that of the same loss over logits."""

# T = tokens (all leading dimensions of labels), V = vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from loss_core.losses.definition import Argument, LossDef, Recipe
from loss_core.losses.heads import Head, over_heads
from loss_core.losses.lower import lower_products

# The bias of every fused loss with a single head.
BIAS = Argument("lm_bias", ("V",), optional=True)
BIAS_RECIPE = Recipe("bias", "a bias that is not added, or has no gradient", extras=("lm_bias", "upstream"))


def fused_definition(over_logits: LossDef, heads: Sequence[Head], *more: Argument, **changed: Any) -> LossDef:
    """The definition of the same loss with its logits computed by linear heads.

    Its arguments are hidden states and weight of each head in place of the logits, then the others except the mask.

    Args:
        over_logits: definition of the loss over logits.
        more: further arguments.
        changed: attributes of the definition that differ from those of over_logits, at least its name.
    """
    trained = {a.name: a.trained for a in over_logits.arguments}
    operands = [
        Argument(name, dims, trained=trained[head.logits])
        for head in heads
        for name, dims in ((head.hidden, ("T", head.dim)), (head.weight, ("V", head.dim)))
    ]
    others = [a for a in over_logits.arguments if a.kind != "mask" and a.name not in {head.logits for head in heads}]
    return replace(
        over_logits,
        arguments=(*operands, *others, *more),
        oracle=over_heads(over_logits.oracle, heads),
        lower=lower_products(over_logits.oracle, heads),
        products=len(heads),
        **changed,
    )
