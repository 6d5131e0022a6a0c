"""Logits of a block of tokens of the fused loss, made tile by tile of the vocabulary and turned into their gradient.

Each tile of the logits is a dense matrix of its own, [B, C]: products want their operands so.
"""

# B = tokens of a block, b = some of its rows, H = hidden, V = vocabulary (of this rank), C = columns of a tile

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from loss_core.row_terms import Objective, RowTerms, cross_entropy_coefficients
from loss_core_torch.kernels import Linear
from loss_core_torch.kernels.eager.products import Products
from loss_core_torch.kernels.eager.row_blocks import log2_exp, without
from loss_core_torch.kernels.eager.sizes import Sizes


class Tiles:
    """Vocabulary tiles of the weight, rounded to the product dtype, in the dtype of the arithmetic.

    Attributes:
        columns: classes of a tile, more than those of the last one.
        products: what multiplies them.
    """

    def __init__(self, linear: Linear, dtype: torch.dtype, sizes: Sizes) -> None:
        self._w_VH, self._product_dtype, self._dtype = linear.w_VH, linear.product_dtype, dtype
        self.vocab = linear.w_VH.shape[0]
        device = linear.w_VH.device
        self.columns = sizes.tile_columns(self.vocab, device)
        # Rows of which one tile is small enough for a copy: all of them on a CPU.
        self.rows = sizes.block_rows(self.columns, device)
        self.products = Products(dtype, device)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for tile in self.slices():
            yield tile, self._w_VH[tile].to(self._product_dtype).to(self._dtype)

    def slices(self) -> Iterator[slice]:
        """The classes of each tile."""
        for start in range(0, self.vocab, self.columns):
            yield slice(start, min(start + self.columns, self.vocab))


class BlockLogits:
    """Logits of a block, later their gradient, in memory that is given.

    Args:
        memory: flat, in the dtype of the arithmetic; overwritten.
        label_B: int64, counted over this weight; out of it where it owns no target.
        tiles: of the weight.
        softcap: 0 is off. With one, tanh(logit / softcap) is what is kept.
    """

    def __init__(self, memory: Tensor, label_B: Tensor, tiles: Tiles, softcap: float) -> None:
        self._memory, self._rows, self._tiles, self._softcap = memory, label_B.numel(), tiles, softcap
        # A logit is what is kept times this.
        self._factor = softcap or 1.0
        self._owned_B = (label_B >= 0) & (label_B < tiles.vocab)
        self._place_B = self._places(torch.where(self._owned_B, label_B, 0))

    def fill(self, h_BH: Tensor, objective: Objective) -> RowTerms:
        """Make the logits h @ W.T; returns their terms, but for s, which is left 0."""
        m_B = self._memory.new_full((self._rows,), -torch.inf)
        z_sum_B = torch.zeros_like(m_B) if objective.needs_z_sum else None
        for tile, w_CH in self._tiles:
            z_BC = self._piece(tile)
            self._tiles.products.into(z_BC, h_BH, w_CH.t())
            if self._softcap:
                z_BC.div_(self._softcap).tanh_()
            torch.maximum(m_B, z_BC.amax(-1), out=m_B)
            if z_sum_B is not None:
                z_sum_B += z_BC.sum(-1) * self._factor
        t_B = torch.where(self._owned_B, self._memory[self._place_B] * self._factor, -torch.inf)
        return RowTerms(m_B.mul_(self._factor), torch.zeros_like(m_B), t_B, z_sum_B)

    def sums(self, m_B: Tensor) -> Tensor:
        """Sum of exp(z - m) per row; the logits stay as they are."""
        s_B = torch.zeros_like(m_B)
        for b in self._row_slices():
            spare = self._memory.new_empty((b.stop - b.start) * self._tiles.columns)
            for tile in self._tiles.slices():
                z_bC = self._piece(tile)[b]
                y_bC = spare[: z_bC.numel()].view(z_bC.shape)
                number_b = log2_exp(z_bC, self._factor, m_B[b], y_bC)
                s_B[b] += without(number_b, y_bC.exp2_().sum(-1))
        return s_B

    def to_gradient(self, terms: RowTerms, objective: Objective, with_sum: bool) -> tuple[Tensor, Tensor]:
        """Turn the logits into their gradient, but for a factor of each row.

        In the place of the logits come E' = (exp(z - m) - uniform / scale + target / scale at the target) times the
        softcap's slope, each row up to a power of 2. The gradient is E' times `scale` for that power of 2.

        Args:
            terms: with the m of these rows, or of the whole vocabulary.
            with_sum: s is made here, from these classes; not for an objective with a uniform coefficient.
        Returns:
            s, and what E' is to be divided by for the gradient of a loss with the upstream gradient 1.
        """
        found = [self._rows_to_gradient(b, terms, objective, with_sum) for b in self._row_slices()]
        return torch.cat([s_b for s_b, _ in found]), torch.cat([divisor_b for _, divisor_b in found])

    def _rows_to_gradient(
        self, b: slice, terms: RowTerms, objective: Objective, with_sum: bool
    ) -> tuple[Tensor, Tensor]:
        part, place_b = RowTerms(*(None if x_B is None else x_B[b] for x_B in terms)), self._place_B[b]
        ones_b, kept_b = torch.ones_like(part.m), self._memory[place_b]
        unit = None if with_sum else cross_entropy_coefficients(torch, part, ones_b, objective)
        power_b, number_b = torch.zeros_like(part.m), None
        slope = self._memory.new_empty(ones_b.numel() * self._tiles.columns if self._softcap else 0)
        for tile in self._tiles.slices():
            z_bC = self._piece(tile)[b]
            slope_bC = _slope(z_bC, slope[: z_bC.numel()].view(z_bC.shape)) if self._softcap else None
            number_b = log2_exp(z_bC, self._factor, part.m, z_bC)
            z_bC.exp2_()
            if unit is None:
                power_b += z_bC.sum(-1)
            elif unit.uniform is not None:
                z_bC.sub_(_times_power(unit.uniform * _reciprocal(unit.scale), number_b)[:, None])
            if slope_bC is not None:
                z_bC.mul_(slope_bC)
        if unit is None:
            part = part._replace(s=without(number_b, power_b))
            unit = cross_entropy_coefficients(torch, part, ones_b, objective)
        divisor_b = _times_power(_reciprocal(unit.scale), number_b)
        hit_b = unit.target * divisor_b
        if self._softcap:
            hit_b = _slope(kept_b, torch.empty_like(kept_b)).mul_(hit_b)
        self._memory.scatter_add_(0, place_b, torch.where(self._owned_B[b], hit_b, 0.0))
        return part.s, divisor_b

    def add_gradients(
        self, gh_BH: Tensor | None, gw_VH: Tensor | None, scaled_BH: Tensor, *, first: bool, last: bool
    ) -> None:
        """gh += E' @ W and gw += E'.T @ scaled, each where it is wanted.

        Args:
            scaled_BH: hidden states times the factor of each token.
            first, last: block of the sum gw; see `Products.accumulate`.
        """
        products = self._tiles.products
        scaled_HB = scaled_BH.t().contiguous() if products.by_onednn else scaled_BH
        for tile, w_CH in self._tiles:
            z_BC = self._piece(tile)
            if gh_BH is not None:
                products.add(gh_BH, z_BC, w_CH)
            if gw_VH is not None:
                products.accumulate(gw_VH[tile], z_BC, scaled_BH, scaled_HB, first, last)

    def _piece(self, tile: slice) -> Tensor:
        """The logits of a tile."""
        start, columns = self._rows * tile.start, tile.stop - tile.start
        return self._memory[start : start + self._rows * columns].view(self._rows, columns)

    def _places(self, column_B: Tensor) -> Tensor:
        """Where the logits of one class per row, int64 in [0, V), lie in the memory."""
        columns = self._tiles.columns
        start_B = column_B // columns * columns
        width_B = (self._tiles.vocab - start_B).clamp_(max=columns)
        row_B = torch.arange(self._rows, device=column_B.device)
        return start_B * self._rows + row_B * width_B + (column_B - start_B)

    def _row_slices(self) -> Iterator[slice]:
        """Rows of which one tile is small enough for a copy."""
        rows = self._tiles.rows
        for start in range(0, self._rows, rows):
            yield slice(start, min(start + rows, self._rows))


def _slope(tanh: Tensor, out: Tensor) -> Tensor:
    """1 - tanh^2, the slope of the softcap."""
    return torch.mul(tanh, tanh, out=out).neg_().add_(1.0)


def _reciprocal(scale_b: Tensor) -> Tensor:
    """1 / scale; so large a number where a z-loss has made it 0 that the exponentials are nothing beside the target."""
    return torch.where(scale_b == 0, 2.0**64, 1.0 / scale_b)


def _times_power(x_b: Tensor, number_b: Tensor | None) -> Tensor:
    """x 2^n, for the number n of `log2_exp`."""
    return x_b if number_b is None else x_b * number_b.exp2()
