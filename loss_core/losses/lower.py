"""Results of a call in the next lower arithmetic, rounded to the dtypes in which a loss returns them.

A comparison that such a result passes proves nothing about the arithmetic. Each result is the oracle's with one step
computed in fewer bits and everything else exact, so that its error is a lower bound for that arithmetic:

    inputs      over logits                           products
    float64     z - max z rounded to float32          operands rounded to float32
    float32     z - max z rounded to bfloat16         operands rounded to TF32
    16 bits     z - max z rounded to these 16 bits    the logits in these 16 bits; the weight's gradient summed in them

z - max z is the first step of a softmax. A `LossDef` can replace this with its `lower`.
"""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.dtypes import TF32_BITS, round_bits, round_to
from loss_core.losses.bounds.rounding import result_dtypes
from loss_core.losses.definition import Arrays, Floats, LossDef, Oracle, OracleResult, Upstream, need_definition
from loss_core.losses.heads import Head, Products, over_heads

# (definition, config, arrays, dtype, upstream) -> results by name of the arithmetic.
Lower = Callable[[LossDef, Any, Arrays, str, Upstream], dict[str, OracleResult]]

# Input dtypes that are also the compute dtype -> the next lower one.
_LOWER = {"float64": "float32", "float32": "bfloat16"}

# Tokens per block of a weight gradient; small, because the cases have few tokens.
_BLOCK = 8


def lower_results(config: Any, arrays: Arrays, dtype: str, upstream: Upstream = None) -> dict[str, dict[str, Floats]]:
    """Loss and gradients in the next lower arithmetic.

    Args:
        config, arrays, upstream: as for `evaluate`.
        dtype: of the floating inputs.
    Returns:
        Name of the arithmetic, such as "TF32 products" -> "loss" and each gradient, rounded to the dtype of the result.
    """
    definition = need_definition(config)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        found = (definition.lower or lower_inputs)(definition, config, arrays, dtype, upstream)
        return {name: _rounded(config, result, dtype) for name, result in found.items()}


def _rounded(config: Any, result: OracleResult, dtype: str) -> dict[str, Floats]:
    dtypes = result_dtypes(config, dtype, result.grads)
    return {name: round_to(value, dtypes[name]) for name, value in {"loss": result.loss, **result.grads}.items()}


def lower_inputs(
    definition: LossDef, config: Any, arrays: Arrays, dtype: str, upstream: Upstream
) -> dict[str, OracleResult]:
    """`LossDef.lower` derived from the arguments: a lower softmax for logits, else lower products of floating inputs.

    Operands in 16 bits are exact in every product, so for those the result is rounded to 16 bits instead.
    """
    if logits := [a.name for a in definition.inputs if a.dims == ("T", "V")]:
        fmt = _LOWER.get(dtype, dtype)
        changed = {name: _round_softmax_input(arrays[name], fmt) for name in logits}
        return {f"{fmt} softmax": definition.oracle(config, {**arrays, **changed}, upstream)}
    if dtype in _LOWER:
        name, changed = _round_operands(arrays, [a.name for a in definition.inputs], dtype)
        return {name: definition.oracle(config, {**arrays, **changed}, upstream)}
    exact = definition.oracle(config, arrays, upstream)
    return {f"{dtype} result": OracleResult(round_to(exact.loss, dtype), exact.grads)}


def lower_products(of_logits: Oracle[OracleResult], heads: Sequence[Head]) -> Lower:
    """`LossDef.lower` of a fused linear loss; same arguments as `over_heads`."""

    def lower(
        definition: LossDef, config: Any, arrays: Arrays, dtype: str, upstream: Upstream
    ) -> dict[str, OracleResult]:
        if dtype in _LOWER:
            operands = [name for head in heads for name in (head.hidden, head.weight)]
            name, changed = _round_operands(arrays, operands, dtype)
            return {name: definition.oracle(config, {**arrays, **changed}, upstream)}
        steps = {
            f"{dtype} logits": Products(logits=lambda h_TH, w_VH: round_to(h_TH @ w_VH.T, dtype)),
            f"{dtype} accumulator": Products(weight_grad=lambda dz_TV, h_TH: _weight_grad_in(dtype, dz_TV, h_TH)),
        }
        return {
            name: over_heads(of_logits, heads, products)(config, arrays, upstream) for name, products in steps.items()
        }

    return lower


def _round_softmax_input(z: NDArray[Any], fmt: str) -> Floats:
    """Logits [..., V] with z - max z rounded to the format."""
    top = np.max(z, axis=-1, keepdims=True)
    # -inf - (-inf) would be NaN. Values of ignored rows, such as inf or NaN, do not matter.
    top = np.where(np.isfinite(top), top, 0.0)
    return np.asarray(top + round_to(z - top, fmt))


def _round_operands(arrays: Arrays, names: Iterable[str], dtype: str) -> tuple[str, dict[str, Floats]]:
    """Name of the lower arithmetic, and these arguments rounded to the operands of its products."""
    if dtype == "float64":
        return "float32 products", {name: round_to(arrays[name], "float32") for name in names}
    return "TF32 products", {name: round_bits(arrays[name], TF32_BITS) for name in names}


def _weight_grad_in(fmt: str, dz_TV: Floats, h_TH: Floats) -> Floats:
    """dz.T @ h [V, H], accumulated over blocks of tokens and rounded to the format after each block."""
    sum_VH = np.zeros((dz_TV.shape[1], h_TH.shape[1]))
    for start in range(0, len(h_TH), _BLOCK):
        block = slice(start, start + _BLOCK)
        sum_VH = round_to(sum_VH + dz_TV[block].T @ h_TH[block], fmt)
    return sum_VH
