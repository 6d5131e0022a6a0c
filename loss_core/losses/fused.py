"""The definition of a loss over hidden states and weights, from that of the same loss over logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from loss_core.losses.definition import LossDef
from loss_core.losses.heads import Head, over_heads
from loss_core.losses.lower import lower_products


def behind_heads(of_logits: LossDef, heads: Sequence[Head], **changed: Any) -> LossDef:
    """The definition of the same loss behind the products of these heads.

    Args:
        of_logits: of the loss over logits.
        changed: attributes of the definition that are not as over logits, its name and arguments among them.
    """
    oracle, lower = over_heads(of_logits.oracle, heads), lower_products(of_logits.oracle, heads)
    return replace(of_logits, oracle=oracle, lower=lower, products=len(heads), **changed)
