"""A loss behind products: its oracle from that of the loss over logits z = h @ W.T + b."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from loss_core.losses.definition import Arrays, Floats, Oracle, Result, Upstream
from loss_core.losses.reduction import kept_rows, kept_tokens


class Head(NamedTuple):
    """Names of the arguments of one product: hidden states [T, H], weight [V, H], bias [V], which may be left out.

    Attributes:
        logits: name of the product in the loss over logits.
        dim: "H", or "H_t" for a hidden size of its own.
    """

    hidden: str
    weight: str
    logits: str
    bias: str = "lm_bias"
    dim: str = "H"


class Products(NamedTuple):
    """How products are computed: logits from h [T, H] and W [V, H]; the weight's gradient from dL/dz [T, V] and h."""

    logits: Callable[[Floats, Floats], Floats] = lambda h_TH, w_VH: h_TH @ w_VH.T
    weight_grad: Callable[[Floats, Floats], Floats] = lambda dz_TV, h_TH: dz_TV.T @ h_TH


EXACT = Products()


def over_heads(of_logits: Oracle[Result], heads: Sequence[Head], products: Products = EXACT) -> Oracle[Result]:
    """The oracle of a loss over hidden states and weights.

    Args:
        of_logits: that of the same loss over logits.
    """

    def oracle(config: Any, arrays: Arrays, upstream: Upstream) -> Result:
        keep_T, lead = kept_tokens(arrays, config.ignore_index), np.shape(arrays["labels"])
        operands, call = [], dict(arrays)
        for head in heads:
            h_TH, w_VH = kept_rows(call.pop(head.hidden), keep_T), np.asarray(call.pop(head.weight), np.float64)
            z_TV = products.logits(h_TH, w_VH) + np.asarray(call.pop(head.bias, 0.0), np.float64)
            call[head.logits] = z_TV.reshape(*lead, len(w_VH))
            operands.append((h_TH, w_VH))
        found = of_logits(config, call, upstream)
        grads = dict(found.grads)
        for head, (h_TH, w_VH) in zip(heads, operands, strict=True):
            dz_TV = grads.pop(head.logits).reshape(len(h_TH), len(w_VH))
            grads[head.hidden] = (dz_TV @ w_VH).reshape(np.shape(arrays[head.hidden]))
            grads[head.weight] = products.weight_grad(dz_TV, h_TH)
            if head.bias in arrays:
                grads[head.bias] = dz_TV.sum(0)
        return replace(found, grads=grads)

    return oracle
