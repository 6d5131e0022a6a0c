"""The precisions that are tried for a head.

Each has a format for the operands of the product, for the stored logits, for the steps after it (scale, softcap,
temperature), and for the log-probability. Sums are in float32 in all of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loss_core.dtypes import round_to

Floats = NDArray[np.float64]

# Mantissa bits of a float32 that shorter formats with the same exponent lack.
_MISSING_BITS = {"bfloat16": 16, "tf32": 13}


# x - max x, its exp, their sum, the sum's log, and max x + log.
SOFTMAX_STEPS = ("shifted", "exp", "sum", "log", "lse")

# The steps whose results 16-bit log-softmaxes store: none (torch on GPUs), torch on CPUs, JAX as fused by XLA, every
# operation separately, and x - torch.logsumexp(x).
STORED_STEPS = ((), ("sum", "log"), ("shifted", "sum", "log"), ("shifted", "exp", "sum", "log"), SOFTMAX_STEPS)


class Precision(NamedTuple):
    """One way to compute log-probabilities from hidden states and a head.

    Attributes:
        name: in reports; precisions of the same name are variants that a reader need not distinguish.
        operands: format to which hidden states, weight and bias are rounded before the product.
        logits: format in which the logits are stored.
        steps: format in which scale, softcap and temperature store their results.
        result: format of the log-probability.
        softmax: the SOFTMAX_STEPS whose results are stored in the format of the result, too.
        advice: what to do about it.
    """

    name: str
    operands: str
    logits: str
    steps: str
    result: str
    softmax: tuple[str, ...] = ()
    advice: str = ""


_HEAD = "compute the head in float32 (cast hidden states and weight before the product)"
_SOFTMAX = "cast the logits to float32 before the log-softmax, and compute the head in float32"
# Both have 11 significant bits: they differ in range, and in how ties are rounded.
_ELEVEN_BITS = "TF32 or float16 operands"
_TF32 = "turn TF32 off for the head's product, or compute it in float32"


def _sixteen_bits(fmt: str) -> tuple[Precision, ...]:
    f32 = "float32"
    kept = f"keep the logits in float32: store no {fmt} logits"
    return (
        Precision(_ELEVEN_BITS if fmt == "float16" else f"{fmt} operands", fmt, f32, f32, f32, advice=_HEAD),
        Precision(f"{fmt} logits", fmt, fmt, f32, f32, advice=_HEAD),
        Precision(f"{fmt} logits of a float32 product", f32, fmt, f32, f32, advice=kept),
        Precision(f"{fmt} logits, scaled in {fmt}", fmt, fmt, fmt, f32, advice=_HEAD),
        *(
            Precision(f"{fmt} log-softmax", fmt, fmt, fmt, fmt, softmax=steps, advice=_SOFTMAX)
            for steps in STORED_STEPS
        ),
        Precision(
            f"log-probabilities stored in {fmt}", f32, f32, f32, fmt, advice="store log-probabilities in float32"
        ),
        Precision(f"{fmt} operands, log-probabilities stored in {fmt}", fmt, f32, f32, fmt, advice=_HEAD),
    )


FLOAT32 = Precision("float32", "float32", "float32", "float32", "float32")

PRECISIONS = (
    FLOAT32,
    # PTX's cvt.rna.tf32 rounds ties away from 0, software emulation rounds them to even, and matrix engines with
    # float32 inputs truncate.
    Precision(_ELEVEN_BITS, "tf32-away", "float32", "float32", "float32", advice=_TF32),
    Precision(_ELEVEN_BITS, "tf32-even", "float32", "float32", "float32", advice=_TF32),
    Precision(_ELEVEN_BITS, "tf32-truncated", "float32", "float32", "float32", advice=_TF32),
    *_sixteen_bits("bfloat16"),
    *_sixteen_bits("float16"),
)


def rounded_operand(values: NDArray[Any], fmt: str) -> Floats:
    """Round the operands of a product to its format; to bfloat16 and TF32 by way of float32.

    >>> rounded_operand(np.array([1 + 2**-11, 1 + 3 * 2**-11]), "tf32-away").tolist() == [1 + 2**-10, 1 + 2**-9]
    True
    """
    name, _, ties = fmt.partition("-")
    if name not in _MISSING_BITS:
        return round_to(values, fmt)
    missing = np.uint32(_MISSING_BITS[name])
    bits = np.asarray(values, np.float32).view(np.uint32)
    kept = bits >> missing
    if ties != "truncated":
        first_missing = (bits >> (missing - np.uint32(1))) & np.uint32(1)
        # Ties are rounded away from 0, except to an even number.
        is_tie = (bits & ((np.uint32(1) << missing) - np.uint32(1))) == np.uint32(1) << (missing - np.uint32(1))
        rounds_down = is_tie & (kept & np.uint32(1) == 0) if ties != "away" else False
        kept = kept + np.where(rounds_down, np.uint32(0), first_missing)
    rounded = (kept << missing).view(np.float32)
    return np.where(np.isfinite(values), rounded, values).astype(np.float64)
