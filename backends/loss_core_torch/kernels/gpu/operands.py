"""Operands of the fused losses of `torch:triton`, as the vendor's matrix products take them."""

# T = tokens, B = some of them, H = hidden, V = vocabulary (of this rank), C = columns of a tile of it

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from loss_core_torch.kernels import Linear, Rows
from loss_core_torch.kernels.gpu.launch import Launcher
from loss_core_torch.kernels.gpu.products import multiply
from loss_core_torch.tracing import compute_dtype

# The largest coefficient has this exponent, or one more; see `Operands.exponent`.
_FLOAT16_EXPONENT = 15

EVERY = slice(None)


class Part(NamedTuple):
    """Some tokens.

    Attributes:
        at: which of them.
        hidden_BH: as products take them.
        labels_B, inverse_B: as in `Linear`.
    """

    at: slice
    hidden_BH: Tensor
    labels_B: Tensor
    inverse_B: Tensor | None


class Operands:
    """Hidden states and weight of a call.

    Attributes:
        dtype: of the arithmetic, and of logits; operand: of what enters products.
        num_tokens, vocab: T and V.
    """

    def __init__(self, launcher: Launcher, linear: Linear) -> None:
        self.linear = linear
        self.dtype = compute_dtype(linear.h_TH.dtype)
        self.operand = launcher.operand_dtype(linear.product_dtype, linear.h_TH.device)
        self.num_tokens, self.vocab = len(linear.h_TH), len(linear.w_VH)

    def hidden(self, at: slice = EVERY) -> Tensor:
        """Hidden states of some tokens."""
        return self.linear.h_TH[at].to(self.linear.product_dtype).to(self.operand)

    def weight(self, tile: slice = EVERY) -> Tensor:
        """Rows of the weight."""
        return self.linear.w_VH[tile].to(self.linear.product_dtype).to(self.operand)

    def part(self, at: slice) -> Part:
        """What is known of some tokens before their logits."""
        inverse_T = self.linear.inverse_temperature_T
        return Part(at, self.hidden(at), self.linear.labels_T[at], None if inverse_T is None else inverse_T[at])

    def make_logits(self, z_BC: Tensor, part: Part, w_CH: Tensor, tile: slice = EVERY) -> Rows:
        """h @ W.T + b of some tokens and a tile, written to z_BC, as rows."""
        multiply(part.hidden_BH, w_CH.t(), z_BC)
        if self.linear.bias_V is not None:
            z_BC += self.linear.bias_V[tile].to(z_BC.dtype)
        return self.rows(z_BC, part, tile)

    def rows(self, z_BC: Tensor, part: Part, tile: slice = EVERY) -> Rows:
        """Logits of some tokens and a tile, and what is known of them."""
        start = self.linear.vocab_start + (tile.start or 0)
        return Rows(z_BC, part.labels_B, None, start, self.linear.softcap, part.inverse_B)

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory; zeros where no product would write it, since there are no tokens or no classes."""
        make = torch.empty if self.num_tokens and self.vocab else torch.zeros
        return make(shape, dtype=dtype or self.dtype, device=self.linear.h_TH.device)

    def exponent(self, *factors: Tensor | None, room: int = 0) -> Tensor | None:
        """n of the power 2^n by which to multiply coefficients so that the operands can hold the gradient.

        A mean over 8192 tokens would put every probability below 2e-4 beneath what float16 can hold. The largest
        factor becomes at least 2^14 (float16 ends at 2^16): then a probability of 2^-28 is still a normal number.

        Args:
            factors: [T] each; of the exponentials, of a row's loss.
            room: binary digits by which the gradient may be larger than they are.
        """
        if self.operand != torch.float16 or self.num_tokens == 0:
            return None
        # A NaN is the mark of one token; it must not reach the others.
        largest = [factor_T.nan_to_num(nan=0.0).abs().amax() for factor_T in factors if factor_T is not None]
        _, exponent = torch.frexp(torch.stack(largest).amax())
        return _FLOAT16_EXPONENT - room - exponent.clamp(-100, 100)

    def undone(self, exponent: Tensor) -> Tensor:
        """2^-n, a scalar in the dtype of the arithmetic."""
        return torch.ldexp(torch.ones_like(exponent, dtype=self.dtype), -exponent)


def slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """Of at most `step`; a single empty one if there is nothing."""
    for at in range(start, max(stop, start + 1), max(step, 1)):
        yield slice(at, min(at + step, stop))
