"""The oracle of a fused linear loss, logits = h @ W.T + b, from that of the loss over logits."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from loss_core.losses.definition import Arrays, Floats, Oracle, Result, Upstream
from loss_core.losses.reduction import masked_rows, valid_tokens


class Head(NamedTuple):
    """Argument names of one linear head: hidden states [T, H], weight [V, H], optional bias [V].

    Attributes:
        logits: argument name of the head's logits in the loss over logits.
        dim: "H", or "H_t" for the teacher's hidden size.
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
    """The oracle of a fused linear loss.

    Args:
        of_logits: oracle of the same loss over logits.
        products: how the matrix products are computed.
    """

    def oracle(config: Any, arrays: Arrays, upstream: Upstream) -> Result:
        keep_T, lead = valid_tokens(arrays, config.ignore_index), np.shape(arrays["labels"])
        operands, call = [], dict(arrays)
        for head in heads:
            h_TH, w_VH = masked_rows(call.pop(head.hidden), keep_T), np.asarray(call.pop(head.weight), np.float64)
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
