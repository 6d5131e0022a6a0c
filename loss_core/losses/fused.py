"""The definition of a loss over hidden states and weights, from that of the same loss over logits."""

# T = tokens (all leading dimensions of labels), V = vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from loss_core.losses.definition import Argument, LossDef, Recipe
from loss_core.losses.heads import Head, over_heads
from loss_core.losses.lower import lower_products

# Of every loss with a head of its own.
BIAS = Argument("lm_bias", ("V",), optional=True)
BIAS_RECIPE = Recipe("bias", "a bias left out, or without a gradient", extras=("lm_bias", "upstream"))


def behind_heads(of_logits: LossDef, heads: Sequence[Head], *more: Argument, **changed: Any) -> LossDef:
    """The definition of the same loss behind the products of these heads.

    Its arguments are hidden states and weights in place of the logits, the others but for a mask, and those of `more`.

    Args:
        of_logits: of the loss over logits.
        changed: attributes of the definition that are not as over logits, its name among them.
    """
    trained = {a.name: a.trained for a in of_logits.arguments}
    operands = [
        Argument(name, dims, trained=trained[head.logits])
        for head in heads
        for name, dims in ((head.hidden, ("T", head.dim)), (head.weight, ("V", head.dim)))
    ]
    others = [a for a in of_logits.arguments if a.kind != "mask" and a.name not in {head.logits for head in heads}]
    return replace(
        of_logits,
        arguments=(*operands, *others, *more),
        oracle=over_heads(of_logits.oracle, heads),
        lower=lower_products(of_logits.oracle, heads),
        products=len(heads),
        **changed,
    )
